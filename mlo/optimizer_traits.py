"""What is known of an optimizer without making its step: its decay, its direction, its code.

Optimizers of torch.optim show it by their class and options. Another one is tried on a copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.errors import ProblemError
from mlo.inner_optimizer import innermost, is_foreign
from mlo.problem import Problem
from mlo.randomness import preserved
from mlo.sharding import is_sharded
from mlo.tensors import copied_options

__all__ = [
    "acts_around_step",
    "bare_copy",
    "check_settings",
    "decays_outside_gradient",
    "has_code_around_step",
    "has_differentiable_step",
    "is_fused",
    "is_linear",
    "l2_penalty",
    "makes_known_step",
    "maximized",
    "moves_on_surface",
]


def acts_around_step(problem: Problem) -> bool:
    """Whether a step is more than the optimizers', and depends on its reads even at fixed g."""
    return (
        problem.settings is not None
        or problem.after_step is not None
        or problem.restart_from is not None
    )


def l2_penalty(problem: Problem) -> dict[str, float]:
    """Parameter → the c of the penalty c/2 ‖θ‖² that its optimizer adds by weight decay.

    Decay that is no such penalty (AdamW's, Lion's) counts as 0 (see `decays_outside_gradient`).
    """
    coefficient_of: dict[int, float] = {}
    for optimizer in problem.optimizers.values():
        for group in optimizer.param_groups:
            outside = decays_outside_gradient(optimizer, group)
            decay = 0.0 if outside else float(group.get("weight_decay", 0.0))
            # A maximizing optimizer descends -L + c/2 ‖θ‖²: relative to L the penalty changes sign.
            decay = -decay if group.get("maximize") else decay
            coefficient_of |= {id(parameter): decay for parameter in group["params"]}
    return {name: coefficient_of[id(parameter)] for name, parameter in problem.parameters.items()}


def maximized(problem: Problem) -> frozenset[str]:
    """The parameters whose optimizer climbs their loss (`maximize=True`)."""
    held: set[int] = set()
    for optimizer in problem.optimizers.values():
        for group in optimizer.param_groups:
            if group.get("maximize"):
                held.update(map(id, group["params"]))
    return frozenset(name for name, p in problem.parameters.items() if id(p) in held)


def decays_outside_gradient(optimizer: Optimizer, group: dict[str, Any]) -> bool | None:
    """Whether weight decay is decoupled: no part of the gradient, so no L2 penalty of the loss.

    Optimizers of torch.optim say so by an option or by their name. Another one is tried: with an
    L2 penalty, ∇L = −c θ is a stationary point, so a step with that gradient does not move θ.

    Args:
        optimizer: whose step.
        group: one of its groups of parameters.

    Returns:
        The answer; None where the step could not be tried.
    """
    if not group.get("weight_decay"):
        return False
    optimizer = innermost(optimizer)
    if not is_foreign(optimizer):
        known = type(optimizer).__name__ in ("AdamW", "Muon", "Adafactor")
        return known or bool(group.get("decoupled_weight_decay"))
    # A step on a copy, whose answer is kept. It may depend on the shape (Muon takes matrices only).
    answers = _TRIED.setdefault(optimizer, {})
    shape = group["params"][0].shape
    if shape not in answers:
        answers[shape] = _moves_at_penalized_optimum(optimizer, group)
    return answers[shape]


_TRIED: WeakKeyDictionary[Optimizer, dict[torch.Size, bool | None]] = WeakKeyDictionary()
"""Optimizer → shape of a parameter → whether its decay is decoupled."""


def _moves_at_penalized_optimum(optimizer: Optimizer, group: dict[str, Any]) -> bool | None:
    """Makes a step of a twin on θ = 1 with the gradient −c θ, and one with another gradient."""
    # "Does not move" needs a scale: the step that the same optimizer makes with a gradient of 1.
    moved = []
    for gradient in (-float(group["weight_decay"]), 1.0):
        like = group["params"][0]
        parameter = torch.nn.Parameter(torch.ones_like(like, requires_grad=False))
        moved.append(_moved(optimizer, group, parameter, torch.full_like(parameter, gradient)))
    still, usual = moved
    if still is None or not usual:
        return None
    return still > 1e-3 * usual


def moves_on_surface(optimizer: Optimizer) -> bool:
    """Whether an optimizer moves a parameter on a surface, such as a sphere or a Stiefel manifold.

    It then leaves out the part of a gradient that is normal to the surface. There, that is at least
    the direction of θ itself: a step with the gradient θ does not move θ, and other steps do.
    """
    optimizer = innermost(optimizer)
    if not is_foreign(optimizer):
        return False
    seen: set[tuple[type, torch.Size]] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kind = type(parameter), parameter.shape  # its class may know its surface
            if kind in seen or parameter.is_meta or is_sharded(parameter):
                continue
            seen.add(kind)
            theta = parameter.detach().clone().as_subclass(torch.Tensor)
            other = torch.linspace(1.0, 2.0, theta.numel()).to(theta).reshape(theta.shape)
            other = other * (theta.norm() / other.norm())
            still, usual = [
                _moved(optimizer, group, copy.deepcopy(parameter), g) for g in (theta, other)
            ]
            if still is None or usual is None:
                continue
            # A step may also be lost by rounding, as one of 1e-3 θ in bfloat16: that shows nothing.
            rounding = torch.finfo(theta.dtype).eps * float(theta.norm())
            if usual > 8.0 * rounding and still < 1e-3 * usual:
                return True
    return False


def _moved(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, gradient: Tensor
) -> float | None:
    """How far a twin's step with a gradient moves a parameter; None if it cannot be made."""
    before = parameter.detach().clone()
    parameter.grad = gradient
    twin = bare_copy(optimizer)
    if twin is None:
        return None
    twin.param_groups = [{**copied_options(group), "params": [parameter]}]
    try:
        with torch.no_grad(), preserved():
            type(optimizer).step(twin)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return None
    return float((parameter.detach() - before).norm())


def bare_copy(optimizer: Optimizer) -> Optimizer | None:
    """An optimizer of the same class and attributes, without the original's state and hooks.

    (`copy.copy` of an optimizer drops what a subclass has put on it.)

    Returns:
        The copy; None if an attribute of a class that is not torch.optim's cannot be copied.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.state = defaultdict(dict)
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    if is_foreign(optimizer):
        # A step may change what the class keeps in attributes: a dict of momenta, a counter that is
        # a tensor, a generator. What refers to the original then refers to the twin.
        memo: dict[int, Any] = {id(optimizer): twin}
        try:
            for key, value in optimizer.__dict__.items():
                if key not in _usual_attributes():
                    twin.__dict__[key] = copy.deepcopy(value, memo)
        except (RuntimeError, ValueError, TypeError, AttributeError, copy.Error):
            return None
    return twin


@lru_cache
def _usual_attributes() -> frozenset[str]:
    """What every optimizer has, and what others put around its step; a twin has its own.

    (A function, since making an optimizer imports much of PyTorch.)
    """
    return frozenset(vars(Optimizer([torch.zeros(())], {}))) | {"step"}


def is_fused(optimizer: Optimizer) -> bool:
    """Whether an optimizer uses the fused step."""
    return any([group.get("fused") for group in optimizer.param_groups])  # noqa: C419 - is faster


def check_settings(problem: str, group: Mapping[str, Any]) -> None:
    """Refuses settings of an optimizer whose derivative would be lost.

    Raises:
        ProblemError: naming the setting.
    """
    for key, value in group.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ProblemError(
                f"Problem {problem!r}: its optimizer's {key} is a tensor that requires a "
                "gradient, but a step of the optimizer would not pass that gradient on. Give it "
                "a number, or a tensor that requires none. To learn a setting, use "
                "Problem(settings=...)."
            )


def has_differentiable_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step has torch.optim's option `differentiable`."""
    return "differentiable" in innermost(optimizer).defaults


def makes_known_step(optimizer: Optimizer) -> bool:
    """Whether an optimizer surely makes torch.optim's own step, whose derivative is right.

    Whether another one can be differentiated shows when it is made.
    """
    own = type(optimizer).step.__module__.startswith("torch.optim")
    return own and not has_code_around_step(optimizer)


def has_code_around_step(optimizer: Optimizer) -> bool:
    """Whether there is code around the step: hooks, a `step` on the object, another optimizer."""
    if innermost(optimizer) is not optimizer:
        return True
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    # A scheduler wraps `step` on the object as well, to count calls; that changes nothing.
    own = optimizer.__dict__.get("step")
    return own is not None and not hasattr(own, "_wrapped_by_lr_sched")


def is_linear(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step is linear in the gradient."""
    return type(optimizer) is torch.optim.SGD  # a subclass may make another step
