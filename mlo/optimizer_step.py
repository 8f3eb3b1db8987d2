"""One step of a `torch.optim` optimizer as a differentiable function of its gradient.

A twin of the optimizer recomputes the step by its own `differentiable=True` code, on copies of its
state. So momentum, weight decay, bias correction and the rest are exactly those of the actual
update, for every optimizer of `torch.optim`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from mlo.errors import EngineError, ProblemError
from mlo.inner_optimizer import innermost, is_foreign
from mlo.problem import Problem, Tensors
from mlo.randomness import preserved
from mlo.sharding import is_sharded
from mlo.step_formulas import formula_step
from mlo.tensors import copied_options, in_precision, map_tensors, real_inner, scaled

__all__ = [
    "OptimizerStep",
    "StateKey",
    "acts_around_step",
    "check_settings",
    "clip",
    "clip_by_norm",
    "decays_outside_gradient",
    "has_code_around_step",
    "has_differentiable_step",
    "is_fused",
    "l2_penalty",
    "makes_known_step",
    "maximized",
    "moves_on_surface",
    "plain_steps",
]


COUNTERS: dict[type[Optimizer], tuple[str, ...]] = {
    torch.optim.ASGD: ("eta", "mu"),
    torch.optim.NAdam: ("mu_product",),
}
"""Class → entries of its state that only count steps, besides "step" of all classes."""

StateKey = tuple[str, tuple[Any, ...]]
"""A parameter, and the keys that lead to a tensor of its state (or, from `GROUP`, of its group)."""

GROUP = "(its group)"
"""First key of what an optimizer keeps in a group: of the group's first parameter."""

DIFFERENTIABLE = {"differentiable": True, "foreach": False, "fused": None}
"""Options of the optimizer's twin: the step in plain operations, one parameter at a time."""

DISPLACEMENT = 1e-5
"""Relative displacement of the gradient in the finite-difference check."""


@dataclass(kw_only=True, eq=False)
class _ParameterState:
    """Before the step: one parameter's optimizer, its options, and its state (None: not kept).

    If no state is kept, several parameters share one entry, and the shape is that of any of them.
    """

    optimizer: Optimizer
    index: int
    options: dict[str, Any]
    state: dict[str, Any] | None
    shape: torch.Size
    gradient_coefficient: float | None

    def in_double(self) -> _ParameterState:
        """The same with its state in double precision."""
        parts = [map_tensors(kept, _in_double) for kept in (self.state or {}, self.options)]
        return replace(self, state=parts[0], options=parts[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerStep:
    """A step θ' = step(θ, g), with the optimizer's state and learning rates as they were before it.

    Attributes:
        problem: name of the problem, for messages.
        groups: parameter → its optimizer's options and state.
        grad_clip: largest Euclidean norm to which the step scales its gradient, or None.
        unused: parameters without a gradient, which the step does not move.
        by_formula: whether the formula of `step_formulas.py`, in which settings are tensors, makes
            the step instead of a twin.
    """

    problem: str
    groups: dict[str, _ParameterState]
    grad_clip: float | None
    unused: frozenset[str] = frozenset()
    by_formula: bool = False

    @classmethod
    def capture(
        cls,
        problem: Problem,
        *,
        linear_state: bool = True,
        unused: frozenset[str] = frozenset(),
    ) -> OptimizerStep:
        """Copies the optimizers' state before a step.

        Args:
            problem: whose optimizers.
            linear_state: whether to keep its tensors even if the steps of all optimizers are linear
                in the gradient, as SGD's are. `gradient_coefficient` does not need them.
            unused: parameters on which the loss does not depend.
        """
        optimizers = [innermost(optimizer) for optimizer in problem.optimizers.values()]
        linear_state = linear_state or not all(map(_is_linear, optimizers))
        groups: dict[str, _ParameterState] = {}
        parameters = problem.parameters
        name_of = dict(zip(map(id, parameters.values()), parameters, strict=True))
        for optimizer in optimizers:
            for index, group in enumerate(optimizer.param_groups):
                check_settings(problem.name, group)
                options = copied_options(group)
                # One coefficient for all parameters of a group with a buffer, one for the rest, and
                # one entry for those whose state is not kept.
                coefficients: dict[bool, float | None] = {}
                without_state: dict[bool, _ParameterState] = {}
                for parameter in group["params"]:
                    name = name_of.get(id(parameter))
                    if name is None:  # frozen
                        continue
                    state = optimizer.state.get(parameter) or {}
                    buffered = state.get("momentum_buffer") is not None
                    if buffered in without_state:
                        groups[name] = without_state[buffered]
                        continue
                    if buffered not in coefficients:
                        coefficients[buffered] = _gradient_coefficient(optimizer, options, buffered)
                    coefficient, kept = coefficients[buffered], None
                    if linear_state or coefficient is None or not buffered:
                        kept = map_tensors(state, _copied)
                    groups[name] = _ParameterState(
                        optimizer=optimizer,
                        index=index,
                        options=options,
                        state=kept,
                        shape=parameter.shape,
                        gradient_coefficient=coefficient,
                    )
                    if kept is None:
                        without_state[buffered] = groups[name]
        return cls(
            problem=problem.name,
            groups=groups,
            grad_clip=problem.grad_clip,
            unused=unused,
            by_formula=problem.settings is not None,
        )

    def with_settings(self, settings: Mapping[str, Mapping[str, Any]]) -> OptimizerStep:
        """The same step with other settings.

        Args:
            settings: parameter → setting → number or tensor, as `resolve_settings` returns it.
        """
        groups = {
            name: replace(group, options={**group.options, **settings.get(name, {})})
            for name, group in self.groups.items()
        }
        return replace(self, groups=groups)

    @property
    def couples_parameters(self) -> bool:
        """Whether the step of one parameter may depend on the gradients of others."""
        if self.grad_clip is not None:
            return True
        # By optimizer, since there are few, and not by parameter.
        asked: Optimizer | None = None
        for group in self.groups.values():
            if group.optimizer is not asked:
                asked = group.optimizer
                if is_foreign(asked):
                    return True
        return False

    def learning_rate(self, name: str) -> float:
        """The parameter's learning rate at this step; negative if its optimizer maximizes."""
        options = self.groups[name].options
        return -float(options["lr"]) if options.get("maximize") else float(options["lr"])

    def gradient_coefficient(self, name: str) -> float | None:
        """The c of a step θ' = c g + terms without g, linear in g as SGD's is; otherwise None.

        Where the step clips, g is the clipped gradient.
        """
        return self.groups[name].gradient_coefficient

    def clipped(self, gradients: Tensors) -> Tensors:
        """The gradients as the step takes them: clipped by the norm of all together."""
        return gradients if self.grad_clip is None else clip(gradients, self.grad_clip)

    def apply(
        self, parameters: Tensors, gradients: Tensors, *, differentiated: bool = True
    ) -> Tensors:
        """Returns the parameters after the step, differentiable in `parameters` and `gradients`.

        Args:
            parameters: name → tensor before the step.
            gradients: name → gradient, for the same names; all of the problem's if the step clips.
            differentiated: whether derivatives are wanted. Entries of a gradient that are exactly
                zero are then moved off zero.

        Raises:
            EngineError: if an optimizer has no differentiable step.
        """
        if differentiated:
            gradients = {key: _nudged(gradient) for key, gradient in gradients.items()}
        return self._apply(parameters, gradients, {})[0]

    def derivative_error(self, parameters: Tensors, gradients: Tensors) -> float:
        """The relative error of the derivative in one direction, against a finite difference.

        Of one step, and of two, the second with a constant gradient: it shows what the state that
        the first one leaves passes on.

        Args:
            parameters: name → tensor before the step.
            gradients: name → gradient.
        """
        return max(self._derivative_error(parameters, gradients, steps) for steps in (1, 2))

    def _derivative_error(self, parameters: Tensors, gradients: Tensors, steps: int) -> float:
        # In double precision, where a difference of steps is accurate to many digits.
        step = replace(
            self, groups={name: group.in_double() for name, group in self.groups.items()}
        )
        theta = {name: in_precision(parameters[name], torch.float64) for name in gradients}
        g = {
            name: in_precision(gradient, torch.float64).requires_grad_()
            for name, gradient in gradients.items()
        }
        # Directions of the size of the gradient and of 1, the same in every process.
        noise = torch.Generator().manual_seed(0)
        u: Tensors = {}
        v: Tensors = {}
        for name, gradient in g.items():
            size = gradient.detach().abs().square().mean().sqrt().clamp(min=1e-12)
            draws = torch.randn(2, *gradient.shape, generator=noise, dtype=gradient.dtype)
            u[name], v[name] = (draws[0].to(gradient.device) * size, draws[1].to(gradient.device))

        def after(gradient: Tensors) -> Tensors:
            moved, state, left = step._with_what_is_left(theta, gradient)
            if steps == 1:
                return moved
            constant = {name: entry.detach() for name, entry in g.items()}
            return left.apply_with_state(moved, constant, state)[0]

        # ⟨(∂θ'/∂g)ᵀ v, u⟩ by autograd, and ⟨v, θ'(g + h u) − θ'(g − h u)⟩ / 2h, should agree.
        moved = after(g)
        outputs = [moved[name] for name in g if moved[name].requires_grad]
        found: Sequence[Tensor | None] = [None] * len(g)
        if outputs:
            cotangents = [v[name] for name in g if moved[name].requires_grad]
            found = torch.autograd.grad(outputs, list(g.values()), cotangents, allow_unused=True)
        exact = sum(
            float(real_inner(w, u[n])) for n, w in zip(g, found, strict=True) if w is not None
        )

        sides = []
        for sign in (1.0, -1.0):
            displaced = {name: g[name].detach() + sign * DISPLACEMENT * u[name] for name in g}
            reached = after(displaced)
            sides.append(sum(float(real_inner(v[name], reached[name].detach())) for name in g))
        difference = (sides[0] - sides[1]) / (2.0 * DISPLACEMENT)
        scale = max(abs(exact), abs(difference))
        return abs(exact - difference) / scale if scale > 0.0 else 0.0

    def differentiable_state(self) -> dict[StateKey, Tensor]:
        """The tensors of the optimizers' state that steps make of gradients: no counters."""
        found: dict[StateKey, Tensor] = {}
        for name, group in self.groups.items():
            found |= _made_of_gradients(name, group.optimizer, group.state or {})
        for owner, group in self._foreign_groups().items():
            found |= _kept_in_group(owner, group.options)
        return found

    def apply_with_state(
        self, parameters: Tensors, gradients: Tensors, state: Mapping[StateKey, Tensor]
    ) -> tuple[Tensors, dict[StateKey, Tensor]]:
        """The step as a function of the optimizers' state too.

        Args:
            parameters: name → tensor before the step.
            gradients: name → gradient.
            state: key → tensor that replaces the captured one.

        Returns:
            The parameters and the state after the step, differentiable in all three.
        """
        gradients = {key: _nudged(gradient) for key, gradient in gradients.items()}
        moved, states = self._apply(parameters, gradients, state)
        return moved, self._differentiable(states)

    def _differentiable(self, states: Mapping[str, Mapping[Any, Any]]) -> dict[StateKey, Tensor]:
        """What `differentiable_state` is after a step."""
        after: dict[StateKey, Tensor] = {}
        for name, state in states.items():
            after |= _made_of_gradients(name, self.groups[name].optimizer, state)
            if GROUP in state:
                after |= _kept_in_group(name, state[GROUP])
        return after

    def _with_what_is_left(
        self, parameters: Tensors, gradients: Tensors
    ) -> tuple[Tensors, dict[StateKey, Tensor], OptimizerStep]:
        """Parameters and state after the step, and the step that would be next."""
        gradients = {key: _nudged(gradient) for key, gradient in gradients.items()}
        moved, states = self._apply(parameters, gradients, {})
        options: dict[tuple[int, int], dict[str, Any]] = {}
        for name, state in states.items():
            if GROUP in state:
                group = self.groups[name]
                options[id(group.optimizer), group.index] = copied_options(state[GROUP])
        groups: dict[str, _ParameterState] = {}
        for name, group in self.groups.items():
            kept = {key: entry for key, entry in states.get(name, {}).items() if key != GROUP}
            groups[name] = replace(
                group,
                state=map_tensors(kept, _copied) if name in states else group.state,
                options=options.get((id(group.optimizer), group.index), group.options),
            )
        return moved, self._differentiable(states), replace(self, groups=groups)

    def _foreign_groups(self) -> dict[str, _ParameterState]:
        """First parameter → its group, for the groups of optimizers that are not torch.optim's."""
        found: dict[tuple[int, int], str] = {}
        for name, group in self.groups.items():
            if name not in self.unused and is_foreign(group.optimizer):
                found.setdefault((id(group.optimizer), group.index), name)
        return {name: self.groups[name] for name in found.values()}

    @torch.no_grad()
    def make(self, problem: Problem) -> None:
        """Moves the problem's live parameters, and its optimizers' state, by the formula.

        Args:
            problem: whose parameters are where they were when the step was captured, with clipped
                gradients in `parameter.grad`. Parameters without one stay.
        """
        live: Tensors = {k: p for k, p in problem.parameters.items() if p.grad is not None}
        gradients = {key: p.grad for key, p in live.items() if p.grad is not None}
        moved, states = self._by_formula(live, gradients, {})
        for name, after in moved.items():
            parameter, optimizer = problem.parameters[name], self.groups[name].optimizer
            parameter.copy_(after)
            optimizer.state[parameter].update(_as_kept(states[name], optimizer, parameter))
        for optimizer in problem.optimizers.values():
            # Its own `step` was not called, for which a scheduler looks here.
            optimizer._opt_called = True  # type: ignore[attr-defined]

    def _apply(
        self, parameters: Tensors, gradients: Tensors, state: Mapping[StateKey, Tensor]
    ) -> tuple[Tensors, dict[str, dict[str, Any]]]:
        """The parameters after the step, and the optimizers' state of each."""
        gradients = self.clipped(gradients)
        if self.by_formula:
            return self._by_formula(parameters, gradients, state)
        # A step changes its parameters in place. Autograd allows that for a tensor that is no leaf.
        moved = {key: parameters[key] * 1.0 for key in gradients}
        name_of = {id(tensor): key for key, tensor in moved.items()}
        # One twin per optimizer; frozen parameters, and those without a gradient, take no part.
        by_optimizer: dict[int, list[str]] = defaultdict(list)
        states: dict[str, dict[str, Any]] = {}
        for key in gradients:
            if key in self.unused:
                states[key] = self._state(key, state)
            else:
                by_optimizer[id(self.groups[key].optimizer)].append(key)
        for keys in by_optimizer.values():
            # A twin's state is keyed by the tensor that it has moved.
            twin = self._step(keys, moved, gradients, state)
            states |= {key: dict(twin.state[moved[key]]) for key in keys}
            owner_of = {(id(g.optimizer), g.index): n for n, g in self._foreign_groups().items()}
            for made in twin.param_groups:
                first = self.groups[name_of[id(made["params"][0])]]
                owner = owner_of.get((id(first.optimizer), first.index))
                if owner is not None:
                    states[owner][GROUP] = made
        return moved, states

    def _by_formula(
        self, parameters: Tensors, gradients: Tensors, given: Mapping[StateKey, Tensor]
    ) -> tuple[Tensors, dict[str, dict[str, Any]]]:
        moved: Tensors = {}
        states: dict[str, dict[str, Any]] = {}
        for name, g in gradients.items():
            group, state = self.groups[name], self._state(name, given)
            if name in self.unused:
                moved[name], states[name] = parameters[name] * 1.0, state
                continue
            moved[name], states[name] = formula_step(
                type(group.optimizer), parameters[name], g, group.options, state
            )
        return moved, states

    def _step(
        self,
        keys: list[str],
        moved: Tensors,
        gradients: Tensors,
        given: Mapping[StateKey, Tensor],
    ) -> Optimizer:
        """Moves parameters of one optimizer by a twin of it, which is returned."""
        original = self.groups[keys[0]].optimizer
        if not has_differentiable_step(original):
            raise EngineError(
                f"Problem {self.problem!r}: the optimizer {type(original).__name__} has no "
                "differentiable step (no option `differentiable`). Use one that "
                "has it, such as torch.optim.SGD or AdamW, or an engine that does not "
                "differentiate the step."
            )
        # The same class has the same step; what the original holds is replaced by copies.
        twin = _bare_copy(original)
        if twin is None:
            raise EngineError(
                f"Problem {self.problem!r}: its {type(original).__name__} has attributes that "
                "cannot be copied (copy.deepcopy), so its step cannot be repeated beside the run. "
                "Keep what a step needs in its `state` or `param_groups`, or use an engine that "
                "does not differentiate the step."
            )
        twin.defaults = {**original.defaults, **DIFFERENTIABLE}
        twin.param_groups = []

        fresh = False
        members: dict[Any, dict[str, Any]] = {}
        for key in keys:
            options, state = self._options_and_state(key, moved[key], given)
            moved[key].grad = gradients[key]
            twin.state[moved[key]] = state
            fresh |= not state
            # An optimizer that is not torch.optim's may treat a group as a whole (clip its norm).
            # With torch.optim's, every parameter moves independently, with its own options.
            own = (
                (self.groups[key].index, options.get("dampening")) if is_foreign(original) else key
            )
            members.setdefault(own, {**options, "params": []})["params"].append(moved[key])
        twin.param_groups = list(members.values())
        # Only an optimizer that has no state yet makes its counters in the step.
        counters = _DoubleCounters() if fresh else nullcontext()
        draws = preserved() if is_foreign(original) else nullcontext()
        with torch.enable_grad(), counters, draws:
            # The class's own step, without the hooks that the user's optimizer or scheduler put
            # around it.
            type(original).step(twin)
        for key in keys:
            moved[key].grad = None
        return twin

    def _options_and_state(
        self, key: str, like: Tensor, given: Mapping[StateKey, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the twin gets for the parameter `like`, the differentiable state from `given`."""
        group, state = self.groups[key], self._state(key, given)
        options = {**group.options, **DIFFERENTIABLE, "capturable": False}
        if is_foreign(group.optimizer):
            options = map_tensors(options, _copied)
            for (owner, path), tensor in given.items():
                same = owner in self.groups and self.groups[owner].index == group.index
                if path[0] == GROUP and same and self.groups[owner].optimizer is group.optimizer:
                    options = _with(options, path[1:], tensor * 1.0)
        is_sgd = isinstance(group.optimizer, torch.optim.SGD)
        if is_sgd and options.get("momentum") and "momentum_buffer" not in state:
            # SGD's first buffer is the bare gradient, and torch detaches it. An explicit zero
            # buffer without dampening gives the same number, with its derivative.
            state["momentum_buffer"] = torch.zeros_like(like)
            options["dampening"] = 0.0
        return options, state

    def _state(self, key: str, given: Mapping[StateKey, Tensor]) -> dict[str, Any]:
        """A parameter's state before the step, the differentiable one from `given`."""
        group = self.groups[key]
        if group.state is None:
            raise EngineError(
                f"Problem {self.problem!r}: the state of its {type(group.optimizer).__name__} was "
                "not kept, so its step cannot be repeated. An engine that repeats steps captures "
                "them with their state: `OptimizerStep.capture(problem)`."
            )
        # Copies, since the step changes them in place; the counter as `_DoubleCounters` makes it.
        state: dict[str, Any] = map_tensors(group.state, _copied)
        counter = state.get("step")
        if isinstance(counter, Tensor) and counter.dim() == 0:
            state["step"] = counter.double()
        for (name, path), tensor in given.items():
            if name == key and path[0] != GROUP:
                state = _with(state, path, tensor * 1.0)
        return state


def _as_kept(state: Mapping[str, Any], optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """A parameter's state after a step by formula, as torch.optim keeps it."""
    kept = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if "step" in state:
        # A tensor; the optimizer's fused and capturable steps need it on the device.
        before = optimizer.state[parameter].get("step", torch.tensor(0.0))
        kept["step"] = torch.full_like(before, float(state["step"]))
    return kept


def acts_around_step(problem: Problem) -> bool:
    """Whether a step is more than the optimizers', and depends on its reads even at fixed g."""
    return (
        problem.settings is not None
        or problem.after_step is not None
        or problem.restart_from is not None
    )


def clip(gradients: Tensors, largest: float) -> Tensors:
    """The gradients, clipped by the norm of all together, differentiable in it too."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.values()]
    return clip_by_norm(gradients, largest, torch.linalg.vector_norm(torch.stack(norms)))


def clip_by_norm(gradients: Tensors, largest: float, norm: Tensor) -> Tensors:
    """The gradients, scaled by one factor if their common norm exceeds the largest.

    Args:
        gradients: name → gradient.
        largest: largest Euclidean norm.
        norm: the norm of all of them.
    """
    # torch.nn.utils.clip_grad_norm_ scales by this, 1e-6 included.
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
    return dict(zip(gradients, scaled(list(gradients.values()), scale), strict=True))


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
            if still is not None and usual and still < 1e-3 * usual:
                return True
    return False


def _moved(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, gradient: Tensor
) -> float | None:
    """How far a twin's step with a gradient moves a parameter; None if it cannot be made."""
    before = parameter.detach().clone()
    parameter.grad = gradient
    twin = _bare_copy(optimizer)
    if twin is None:
        return None
    twin.param_groups = [{**copied_options(group), "params": [parameter]}]
    try:
        with torch.no_grad(), preserved():
            type(optimizer).step(twin)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return None
    return float((parameter.detach() - before).norm())


def _bare_copy(optimizer: Optimizer) -> Optimizer | None:
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


@contextmanager
def plain_steps(optimizer: Optimizer) -> Iterator[None]:
    """Lets an optimizer that was made with `differentiable=True` move live parameters.

    PyTorch refuses its in-place step on leaves. A twin takes the derivative in any case.
    """
    optimizer = innermost(optimizer)
    groups = [group for group in optimizer.param_groups if group.get("differentiable")]
    optimizer.defaults["differentiable"] = False
    for group in groups:
        group["differentiable"] = False
    try:
        yield
    finally:
        optimizer.defaults["differentiable"] = True
        for group in groups:
            group["differentiable"] = True


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


def _is_linear(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step is linear in the gradient."""
    return type(optimizer) is torch.optim.SGD  # a subclass may make another step


def _gradient_coefficient(
    optimizer: Optimizer, options: Mapping[str, Any], buffered: bool
) -> float | None:
    """See `OptimizerStep.gradient_coefficient`."""
    if not _is_linear(optimizer):
        return None
    momentum, rate = options["momentum"], float(options["lr"])
    # buffer' = momentum · buffer + (1 − dampening) g, and θ' = θ − rate · buffer'; with nesterov
    # θ' = θ − rate · (g + momentum · buffer'). SGD's first buffer is the bare gradient.
    dampened = momentum and buffered
    in_buffer = 1.0 - options["dampening"] if dampened else 1.0
    direction = 1.0 + momentum * in_buffer if options["nesterov"] else in_buffer
    return rate * direction if options["maximize"] else -rate * direction


class _DoubleCounters(TorchFunctionMode):
    """Makes optimizers create their step counters in double precision, in this thread only.

    A plain step computes bias corrections in Python floats. A differentiable one computes them from
    the counter tensor, in its dtype: with the usual float32 counter the two differ by 1e-7.
    """

    FACTORIES = (torch.tensor, torch.as_tensor, torch.zeros, torch.ones)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.FACTORIES and made.dim() == 0 and made.is_floating_point():
            return made.double()
        return made


def _made_of_gradients(
    name: str, optimizer: Optimizer, state: Mapping[Any, Any]
) -> dict[StateKey, Tensor]:
    """The tensors of a parameter's state that are no counters."""
    counters: tuple[Any, ...] = (GROUP,)
    for kind, keys in COUNTERS.items():
        if isinstance(optimizer, kind):
            counters += keys
    found: dict[StateKey, Tensor] = {}
    for path, tensor in _tensors_in(state):
        counts = path[0] in counters or (path[0] == "step" and tensor.dim() == 0)
        if not counts:
            found[name, path] = tensor
    return found


def _kept_in_group(name: str, options: Mapping[str, Any]) -> dict[StateKey, Tensor]:
    """The tensors that an optimizer keeps in a group; the learning rate is set from outside."""
    kept = {key: value for key, value in options.items() if key not in ("params", "lr")}
    return {(name, (GROUP, *path)): tensor for path, tensor in _tensors_in(kept)}


def _tensors_in(nested: Any) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The keys that lead to each tensor of real or complex numbers in dicts, lists and tuples."""
    if isinstance(nested, Tensor):
        if nested.is_floating_point() or nested.is_complex():
            yield (), nested
        return
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(nested, Mapping):
        entries = nested.items()
    elif isinstance(nested, (list, tuple)):
        entries = enumerate(nested)
    for key, entry in entries:
        for path, tensor in _tensors_in(entry):
            yield (key, *path), tensor


def _with(nested: Any, path: Sequence[Any], tensor: Tensor) -> Any:
    """Dicts, lists and tuples with another tensor in one place; dicts and lists are changed."""
    if not path:
        return tensor
    entry = _with(nested[path[0]], path[1:], tensor)
    if not isinstance(nested, tuple):
        nested[path[0]] = entry
        return nested
    entries = [*nested[: path[0]], entry, *nested[path[0] + 1 :]]
    return nested._make(entries) if hasattr(nested, "_make") else tuple(entries)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _in_double(tensor: Tensor) -> Tensor:
    exact = not (tensor.is_floating_point() or tensor.is_complex())
    return _copied(tensor if exact else in_precision(tensor, torch.float64))


def _nudged(gradient: Tensor) -> Tensor:
    """Moves exact zeros off zero, where autograd finds no derivative of Adam's square root.

    For m = (1-b1) g and v = (1-b2) g^2 Adam's step is proportional to g / (|g| + eps). At g = 0
    that has the slope 1/eps, but autograd computes it as 0 · inf. At |g| = tiny << eps the same
    formula gives the slope up to a relative error of tiny/eps. The parts of a complex number are
    two entries of such a step.
    """
    if gradient.is_complex():  # whose parts have each its own square
        return torch.view_as_complex(_nudged(torch.view_as_real(gradient.resolve_conj())))
    tiny = 1e-40 if gradient.dtype == torch.float64 else 1e-15
    # (A number times booleans would have the default dtype, to which the sum would be promoted.)
    return gradient + tiny * (gradient.detach() == 0).to(gradient.dtype)
