"""Makes the step of a torch.optim optimizer without what PyTorch wraps around it.

`optimizer.step()` names the step to a profiler, calls hooks, looks for accelerators, and finds its
state and its implementation anew. For a few small parameters this takes longer than the step. So a
step that needs none of it is made by PyTorch's own code inside: the same operators, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

__all__ = ["leaves_gradients", "make_step", "needs_whole_step"]

Bare = Callable[[Optimizer], Any]
"""A class's own code of a step."""

FOLDER = Path(torch_optimizer.__file__).parent

ASKED = (
    (torch_optimizer, "_global_optimizer_pre_hooks"),
    (torch_optimizer, "_global_optimizer_post_hooks"),
    (torch._C._autograd, "_profiler_enabled"),
)
"""What tells, under private names of PyTorch, whether anything else takes part in a step."""

_BARE: dict[type[Optimizer], tuple[Any, Bare | None]] = {}
"""Class → its `step`, and the code that is left of it without PyTorch's wrappers (None: none)."""


def make_step(optimizer: Optimizer) -> None:
    """Lets an optimizer move its parameters, as `optimizer.step()` does."""
    if needs_whole_step(optimizer):
        optimizer.step()
        return
    kind = type(optimizer)
    quick = _QUICK.get(kind)
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(False)  # `no_grad` takes twice the time, in each step
    try:
        if quick is None or not quick(optimizer):
            bare = _bare(kind)[1]
            assert bare is not None
            bare(optimizer)
    finally:
        torch.set_grad_enabled(enabled)
    if "step" in vars(optimizer):
        # A scheduler counts calls there, and looks here for whether there was one.
        optimizer._opt_called = True  # type: ignore[attr-defined]


def needs_whole_step(optimizer: Optimizer) -> str:
    """Why `step()` must be called as it is; empty where its bare code does the same."""
    kind = type(optimizer)
    whole, bare = _bare(kind)
    if bare is None or kind.step is not whole:
        return "its class is not torch.optim's, or was changed"
    own = vars(optimizer).get("step")
    if own is not None and not _counts_only(own, whole):
        return "the object has a step of its own"
    if not all(hasattr(owner, name) for owner, name in ASKED):
        return "this version of PyTorch does not tell what else takes part in a step"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "hooks are registered on it"
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        return "hooks are registered on all optimizers"
    if optimizer.defaults.get("differentiable"):
        return "it was made with differentiable=True"
    if torch._C._autograd._profiler_enabled():
        return "a profiler is on, which shows steps by name"
    return ""


def leaves_gradients(optimizer: Optimizer) -> bool:
    """Whether its step surely leaves the gradients that it is given as they are."""
    # Steps of single tensors do, of these classes; foreach steps reuse gradients as memory.
    if type(optimizer) not in _QUICK or needs_whole_step(optimizer):
        return False
    return all(map(_is_single, optimizer.param_groups))


def _bare(kind: type[Optimizer]) -> tuple[Any, Bare | None]:
    found = _BARE.get(kind)
    if found is None:
        found = _BARE[kind] = kind.step, _unwrapped(kind.step)
    return found


def _unwrapped(step: Any) -> Bare | None:
    """The innermost function of a step that only PyTorch's optimizers have wrapped."""
    while hasattr(step, "__wrapped__"):
        if step.__code__.co_filename != torch_optimizer.__file__:
            return None
        step = step.__wrapped__
    own = hasattr(step, "__code__") and Path(step.__code__.co_filename).parent == FOLDER
    return step if own else None


def _counts_only(own: Any, whole: Any) -> bool:
    """Whether a `step` on an object is what a scheduler puts there, around the class's."""
    if not hasattr(own, "_wrapped_by_lr_sched"):
        return False
    inner = getattr(own, "__wrapped__", None)
    return getattr(inner, "__func__", inner) is whole


# ------------------------------ steps of single tensors on the CPU


def _is_single(group: dict[str, Any]) -> bool:
    """Whether a group's parameters move one by one: PyTorch's choice on the CPU."""
    if group["foreach"] or group["fused"] or group["maximize"]:
        return False
    for parameter in group["params"]:
        if type(parameter) is not Parameter or not parameter.is_cpu:
            return False
    return True


def _quick_sgd(optimizer: Optimizer) -> bool:
    """Makes a step of SGD, if its state is there and its parameters move one by one."""
    ready: list[tuple[dict[str, Any], list[Tensor], list[Tensor], list[Any]]] = []
    for group in optimizer.param_groups:
        if not _is_single(group):
            return False
        parameters, gradients = _moving(group)
        buffers: list[Any] = [None] * len(parameters)
        if group["momentum"]:
            state, buffers = optimizer.state, []
            for parameter in parameters:
                buffer = state[parameter].get("momentum_buffer")
                if buffer is None:
                    return False
                buffers.append(buffer)
        ready.append((group, parameters, gradients, buffers))
    for group, parameters, gradients, buffers in ready:
        sgd(
            parameters,
            gradients,
            buffers,
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
    return True


def _quick_adam(optimizer: Optimizer) -> bool:
    """Makes a step of Adam or AdamW, if its state is there and parameters move one by one."""
    ready: list[tuple[dict[str, Any], list[Tensor], list[Tensor], list[dict[str, Any]]]] = []
    for group in optimizer.param_groups:
        if not _is_single(group) or group["capturable"] or group["amsgrad"]:
            return False
        parameters, gradients = _moving(group)
        states = list(map(optimizer.state.__getitem__, parameters))
        if not all(states) or any(map(torch.is_complex, parameters)):
            return False
        ready.append((group, parameters, gradients, states))
    for group, parameters, gradients, states in ready:
        beta1, beta2 = group["betas"]
        adam(
            parameters,
            gradients,
            [kept["exp_avg"] for kept in states],
            [kept["exp_avg_sq"] for kept in states],
            [],
            [kept["step"] for kept in states],
            foreach=False,
            fused=False,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
    return True


def _moving(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have a gradient, and their gradients."""
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is not None:
            parameters.append(parameter)
            gradients.append(gradient)
    return parameters, gradients


_QUICK: dict[type[Optimizer], Callable[[Optimizer], bool]] = {SGD: _quick_sgd}
# (Before torch 2.7 AdamW is a class of its own, and Adam's function knows no decoupled decay.)
if issubclass(AdamW, Adam) and "decoupled_weight_decay" in signature(adam).parameters:
    _QUICK |= {Adam: _quick_adam, AdamW: _quick_adam}
