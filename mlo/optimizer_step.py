"""One step of a `torch.optim` optimizer as a differentiable function of its gradient.

The step is recomputed by the optimizer's own `differentiable=True` code on copies of its state, so
momentum, weight decay, bias correction and the rest are exactly those of the update that was made,
for every optimizer of `torch.optim`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from mlo.errors import EngineError
from mlo.problem import Problem, Tensors

__all__ = [
    "OptimizerStep",
    "clip_by_norm",
    "has_decoupled_decay",
    "has_differentiable_step",
    "l2_penalty",
]


COUNTERS = ("step", "mu_product", "eta", "mu")
"""Entries of optimizer states that no gradient flows through."""

DIFFERENTIABLE = {"differentiable": True, "foreach": False, "fused": None}
"""Options of the twin: the step in plain operations, one parameter after the other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """One parameter's optimizer, its options and state (None: not kept), before the step."""

    optimizer: Optimizer
    options: dict[str, Any]
    state: dict[str, Any] | None
    shape: torch.Size
    gradient_coefficient: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerStep:
    """A step θ' = step(θ, g), with the optimizer's state and learning rates as they were before it.

    Attributes:
        problem: name of the problem, for messages.
        groups: parameter → its optimizer's options and state.
        grad_clip: largest Euclidean norm to which the step scales its gradient, or None.
    """

    problem: str
    groups: dict[str, _Group]
    grad_clip: float | None

    @classmethod
    def capture(cls, problem: Problem, *, linear_state: bool = True) -> OptimizerStep:
        """Copies the optimizers' state before a step.

        Args:
            problem: whose optimizers.
            linear_state: whether also of those whose step is linear in its gradient;
                `gradient_coefficient` needs none.
        """
        groups: dict[str, _Group] = {}
        name_of = {id(parameter): key for key, parameter in problem.parameters.items()}
        for optimizer in problem.optimizers.values():
            for group in optimizer.param_groups:
                options = {key: _copied(value) for key, value in group.items() if key != "params"}
                for parameter in group["params"]:
                    name = name_of.get(id(parameter))
                    if name is None:  # frozen
                        continue
                    state = optimizer.state.get(parameter, {})
                    coefficient = _gradient_coefficient(optimizer, options, state)
                    kept = None
                    if linear_state or coefficient is None:
                        kept = {key: _copied(value) for key, value in state.items()}
                    groups[name] = _Group(
                        optimizer=optimizer,
                        options=dict(options),
                        state=kept,
                        shape=parameter.shape,
                        gradient_coefficient=coefficient,
                    )
        return cls(problem=problem.name, groups=groups, grad_clip=problem.grad_clip)

    def learning_rate(self, name: str) -> float:
        """Of a parameter's optimizer at this step; negative where it maximizes."""
        options = self.groups[name].options
        return -float(options["lr"]) if options.get("maximize") else float(options["lr"])

    def gradient_coefficient(self, name: str) -> float | None:
        """The c of a step θ' = c g + (what does not depend on g), as SGD's is; None of other steps.

        Where the step clips, g is the clipped gradient.
        """
        return self.groups[name].gradient_coefficient

    def clipped(self, gradients: Tensors) -> Tensors:
        """The gradients as the step takes them, clipped all together."""
        if self.grad_clip is None:
            return gradients
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.values()]
        return clip_by_norm(gradients, self.grad_clip, torch.linalg.vector_norm(torch.stack(norms)))

    def apply(self, parameters: Tensors, gradients: Tensors) -> Tensors:
        """Returns the parameters after the step, differentiable in `parameters` and `gradients`.

        Args:
            parameters: name → tensor before the step.
            gradients: name → gradient, for the same names; all of the problem's where the step
                clips.

        Raises:
            EngineError: if an optimizer has no differentiable step.
        """
        return self._apply(parameters, gradients, {})[0]

    def differentiable_state(self) -> dict[tuple[str, str], Tensor]:
        """(parameter, key) → the entries of state that a step makes of gradients: no counters."""
        return {
            (name, key): value
            for name, group in self.groups.items()
            for key, value in (group.state or {}).items()
            if _is_differentiable(key, value, group.shape)
        }

    def apply_with_state(
        self, parameters: Tensors, gradients: Tensors, state: Mapping[tuple[str, str], Tensor]
    ) -> tuple[Tensors, dict[tuple[str, str], Tensor]]:
        """The step as a function of the optimizers' state too.

        Args:
            parameters: name → tensor before the step.
            gradients: name → gradient.
            state: (parameter, key) → tensor in the place of the captured state's.

        Returns:
            The parameters and the state after the step, differentiable in all three.
        """
        moved, twins = self._apply(parameters, gradients, state)
        after: dict[tuple[str, str], Tensor] = {}
        for key, tensor in moved.items():
            for entry, value in twins[key].state[tensor].items():
                if _is_differentiable(entry, value, tensor.shape):
                    after[key, entry] = value
        return moved, after

    def _apply(
        self, parameters: Tensors, gradients: Tensors, state: Mapping[tuple[str, str], Tensor]
    ) -> tuple[Tensors, dict[str, Optimizer]]:
        """The parameters after the step, and the twin of the optimizer that moved each."""
        gradients = self.clipped({key: _nudged(gradient) for key, gradient in gradients.items()})
        # A step changes its parameters in place: give it a copy that is not a leaf.
        moved = {key: parameters[key] * 1.0 for key in gradients}
        by_optimizer: dict[int, list[str]] = defaultdict(list)
        for key in gradients:
            by_optimizer[id(self.groups[key].optimizer)].append(key)
        twins: dict[str, Optimizer] = {}
        for keys in by_optimizer.values():
            twins |= dict.fromkeys(keys, self._step(keys, moved, gradients, state))
        return moved, twins

    def _step(
        self,
        keys: list[str],
        moved: Tensors,
        gradients: Tensors,
        given: Mapping[tuple[str, str], Tensor],
    ) -> Optimizer:
        """Moves parameters of one optimizer by a twin of it, which is returned."""
        original = self.groups[keys[0]].optimizer
        if not has_differentiable_step(original):
            raise EngineError(
                f"Problem {self.problem!r}: the optimizer {type(original).__name__} has no "
                "differentiable step (an option `differentiable` like torch.optim's). Use a "
                "torch.optim optimizer, or an engine that does not differentiate the step, such as "
                "'direct'."
            )
        # Of the same class, and so with the same step, but without what the original holds.
        twin = copy.copy(original)
        twin.defaults = {**original.defaults, **DIFFERENTIABLE}
        twin.state = defaultdict(dict)
        twin.param_groups = []
        fresh = False
        for key in keys:
            options, state = self._options_and_state(key, moved[key], given)
            moved[key].grad = gradients[key]
            twin.state[moved[key]] = state
            twin.param_groups.append({**options, "params": [moved[key]]})
            fresh |= not state
        # Only an optimizer without state makes its counters in the step.
        with torch.enable_grad(), _DoubleCounters() if fresh else nullcontext():
            # The class's own step, without the hooks that the user's optimizer or scheduler put
            # around it.
            type(original).step(twin)
        for key in keys:
            moved[key].grad = None
        return twin

    def _options_and_state(
        self, key: str, like: Tensor, given: Mapping[tuple[str, str], Tensor]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the twin gets for the parameter `like`, the differentiable state from `given`."""
        group = self.groups[key]
        if group.state is None:
            raise EngineError(
                f"Problem {self.problem!r}: the state of its {type(group.optimizer).__name__} was "
                "not kept, so its step cannot be applied again. An engine that applies steps "
                "captures them with their state: `OptimizerStep.capture(problem)`."
            )
        # Copies, which the step changes in place; the counter as `_DoubleCounters` would make it.
        state: dict[str, Any] = {}
        for entry, value in group.state.items():
            if isinstance(value, Tensor):
                state[entry] = value.clone()
                if entry == "step":
                    state[entry] = state[entry].double()
            else:
                state[entry] = value
        for (name, entry), tensor in given.items():
            if name == key:
                state[entry] = tensor * 1.0
        options = {**group.options, **DIFFERENTIABLE, "capturable": False}
        is_sgd = isinstance(group.optimizer, torch.optim.SGD)
        if is_sgd and options.get("momentum") and "momentum_buffer" not in state:
            # SGD's first buffer is the bare gradient, and torch detaches it. An explicit zero
            # buffer without dampening gives the same number, with its derivative.
            state["momentum_buffer"] = torch.zeros_like(like)
            options["dampening"] = 0.0
        return options, state


def clip_by_norm(gradients: Tensors, largest: float, norm: Tensor) -> Tensors:
    """The gradients scaled, all together, where their norm is above the largest.

    Args:
        gradients: name → gradient.
        largest: largest Euclidean norm.
        norm: the norm of all of them.
    """
    # torch.nn.utils.clip_grad_norm_ scales by this, 1e-6 included.
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
    return {key: gradient * scale for key, gradient in gradients.items()}


def l2_penalty(problem: Problem) -> dict[str, float]:
    """Parameter → the c of the penalty c/2 ‖θ‖² that its optimizer adds by weight decay.

    Decoupled decay (AdamW, Muon, Adafactor) is not the gradient of a penalty and counts as 0.
    """
    coefficient_of: dict[int, float] = {}
    for optimizer in problem.optimizers.values():
        for group in optimizer.param_groups:
            decoupled = _is_decoupled(optimizer, group)
            decay = 0.0 if decoupled else float(group.get("weight_decay", 0.0))
            # A maximizing optimizer descends -L + decay: relative to L the penalty's sign turns.
            decay = -decay if group.get("maximize") else decay
            coefficient_of |= {id(parameter): decay for parameter in group["params"]}
    return {name: coefficient_of[id(parameter)] for name, parameter in problem.parameters.items()}


def has_decoupled_decay(problem: Problem) -> bool:
    """Whether an optimizer of the problem decays weights outside the gradient (AdamW)."""
    return any(
        _is_decoupled(optimizer, group) and bool(group.get("weight_decay"))
        for optimizer in problem.optimizers.values()
        for group in optimizer.param_groups
    )


def has_differentiable_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step has torch.optim's option `differentiable`."""
    return "differentiable" in optimizer.defaults


def _gradient_coefficient(
    optimizer: Optimizer, options: Mapping[str, Any], state: Mapping[str, Any]
) -> float | None:
    """See `OptimizerStep.gradient_coefficient`."""
    if type(optimizer) is not torch.optim.SGD:  # a subclass may make another step
        return None
    momentum, rate = options["momentum"], float(options["lr"])
    # SGD's first buffer is the bare gradient.
    dampened = momentum and state.get("momentum_buffer") is not None
    in_buffer = 1.0 - options["dampening"] if dampened else 1.0
    direction = 1.0 + momentum * in_buffer if options["nesterov"] else in_buffer
    return rate * direction if options["maximize"] else -rate * direction


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay")) or type(optimizer).__name__ in (
        "AdamW",
        "Muon",
        "Adafactor",
    )


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class _DoubleCounters(TorchFunctionMode):
    """Makes optimizers create their step counters in double precision, in this thread only.

    A plain step computes bias corrections in Python floats, a differentiable one from the counter
    tensor, in its dtype: with the usual float32 counter the two differ by 1e-7.
    """

    FACTORIES = (torch.tensor, torch.as_tensor, torch.zeros, torch.ones)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.FACTORIES and made.dim() == 0 and made.is_floating_point():
            return made.double()
        return made


def _is_differentiable(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry of state is made of gradients: of the parameter's shape, and no counter."""
    return isinstance(value, Tensor) and value.shape == shape and key not in COUNTERS


def _nudged(gradient: Tensor) -> Tensor:
    """Moves exact zeros off zero, where Adam's square root has no derivative although its step has
    one.

    For m = (1-b1) g and v = (1-b2) g^2 the step is proportional to g / (|g| + eps), smooth enough
    at g = 0 with slope 1/eps; autograd computes it as 0 · inf. At |g| = tiny << eps the same
    formula gives the slope to tiny/eps.
    """
    tiny = 1e-40 if gradient.dtype == torch.float64 else 1e-15
    return gradient + tiny * (gradient.detach() == 0)
