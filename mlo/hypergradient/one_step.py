"""`one_step`: differentiates the optimizer's last step (DARTS; LFM-CW, Eqs. 6-10).

The solution is θ' = step(θ, g) with g = F(θ, x), where θ, the parameters before the step, are
constants. So dθ'/dx = (∂θ'/∂g) B, and the cotangent of the inputs is Bᵀ (∂θ'/∂g)ᵀ v. In the form
−Bᵀ q of `products.py` this is q = −(∂θ'/∂g)ᵀ v: the step's own derivative replaces A⁻ᵀ. For plain
SGD with learning rate ξ it is q = ξ v. F and B are taken at the parameters, batch, noise and read
values of the step, not at the current ones.

If settings s of the optimizer are learned, or a projection P follows the step, the step is θ' =
P(step(θ, g; s(x)), x). It then depends on x directly too, and (∂θ'/∂x)ᵀ v at fixed g is added. The
same holds if θ is itself the value of an upper problem (`restart_from`). F then depends on x
through θ as well, and −Aᵀ q joins −Bᵀ q.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mlo.backward import grad
from mlo.errors import EngineError
from mlo.hypergradient.finite_difference import FiniteDifference
from mlo.hypergradient.options import flag_or_auto
from mlo.hypergradient.products import Autograd, LinearSystem, Solve
from mlo.hypergradient.sweep import SweepEngine
from mlo.optimizer_step import OptimizerStep
from mlo.optimizer_traits import acts_around_step
from mlo.problem import Problem, Tensors
from mlo.response import Cotangent, Pullback
from mlo.solution import Reading, Stationary, StepEngine, Stepped
from mlo.tensors import are_alike

__all__ = ["OneStep", "darts"]


@dataclass(frozen=True, kw_only=True)
class OneStep(SweepEngine, StepEngine):
    """Differentiates the optimizer's last step, exactly: momentum, decay, Adam, clipping.

    Args:
        plain: treats the step as one of plain gradient descent with the optimizer's learning rate
            ξ, so that q = ξ v whatever the optimizer. These are the papers' equations to the
            letter; their programs, like the default here, unroll what the optimizer does.
        keep_graph: True retains the gradient's graph until the response is differentiated, instead
            of recomputing it: same numbers, less time, more memory meanwhile. (For a response that
            is differentiated twice it is recomputed in any case.) False recomputes it. "auto"
            retains it from the problem's second update on, if it would fit four times into the
            device's memory (`mlo.graph_memory`) and the gradient has one graph: of one batch, in
            one process, without another response.

    Raises:
        EngineError: if `keep_graph` is given with products other than "autograd".

    Reference: Liu et al., DARTS (2019), Eqs. 6-7; Gala and Xie, LFM-CW, Eqs. 6-18.
    """

    plain: bool = False
    keep_graph: bool | Literal["auto"] = flag_or_auto()
    name: ClassVar[str] = "one_step"
    takes_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_graph is True and not isinstance(self.products, Autograd):
            raise EngineError(
                "keep_graph=True is for exact products, which differentiate the gradient; "
                f"{self.products.name!r} does not. Use products='autograd' or leave keep_graph out."
            )

    @property
    def keeps_graph(self) -> bool | Literal["auto"]:
        return self.keep_graph if isinstance(self.products, Autograd) else False

    @cached_property
    def label(self) -> str:
        """`darts` if its products are finite differences."""
        return "darts" if isinstance(self.products, FiniteDifference) else super().label

    def capture(self, problem: Problem, unused: frozenset[str]) -> OptimizerStep:
        # A step that is linear in its gradient (SGD's) is known by its coefficient alone.
        return OptimizerStep.capture(problem, linear_state=acts_around_step(problem), unused=unused)

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        solution = system.call.solution
        assert isinstance(solution, Stepped)
        step = solution.step
        # Parameters that nothing above reads take no part, so a game's other player costs nothing.
        # But clipping scales by the norm of all gradients together.
        problem = solution.evaluation.loss.problem
        whole = acts_around_step(problem)
        clips = (step.couples_parameters or whole) and not self.plain
        v_of: dict[str, Tensor] = {}
        for name, theta, v in zip(system.names, system.parameters, cotangent, strict=True):
            if v is not None or clips:
                v_of[name] = torch.zeros_like(theta) if v is None else v

        if whole:
            return self._through_whole_step(system, solution, v_of)
        # SGD: θ' = c g + …, so q = −(∂θ'/∂g)ᵀ v = −c v, and the step need not be repeated.
        factors: dict[str, float] = {}
        for name in v_of:
            c = step.groups[name].gradient_coefficient
            c = -step.learning_rate(name) if self.plain else c
            if c is not None:
                factors[name] = -c
        scaled = _scaled(v_of, factors)
        # Any other optimizer (or a clipped gradient): through the step itself.
        linear = len(scaled) == len(v_of)
        if not linear or clips:
            g = self._gradient(system, solution, v_of)
            scaled = self._through_step(system, step, g, v_of, scaled if linear else None)
        q = list(map(scaled.get, system.names))
        return Solve(q=q, report=self.report(system.problem, iterations=1))

    def operations(self, solution: Stationary | Stepped, reading: Reading) -> Tensors | None:
        """The step as plain operations.

        Autograd sums everything that flows into the step's gradient before it continues. Behind a
        node each product would be a separate backward pass, with two of each for every level below.
        """
        assert isinstance(solution, Stepped)
        around = acts_around_step(solution.evaluation.loss.problem) or solution.start is not None
        if not self.sweeps or around:
            return None
        inputs = reading.inputs_of(solution)
        wanted = [tensor.requires_grad for tensor in inputs]
        made = solution.constants()
        if not any(wanted):
            return made
        with ExitStack() as stack, torch.enable_grad():
            call = Pullback(
                solution=solution,
                outputs=tuple(made.values()),
                inputs=inputs,
                wanted=wanted,
                differentiate=True,
                reading=reading,
                stack=stack,
            )
            system = self.linearize(call)
            g = dict(zip(system.names, system.gradient(), strict=True))
            moved = self._moved(solution, g)
        reading.note(self.report(solution.name, iterations=1))
        # The step's actual result, with the derivative of the repeated step.
        return {name: made[name] + (moved[name] - moved[name].detach()) for name in made}

    def _moved(self, solution: Stepped, g: Tensors) -> Tensors:
        """The step as a function of its gradient g, up to a constant."""
        step, parameters = solution.step, solution.evaluation.parameters
        coefficients = self._coefficients(step, g)
        if coefficients is None:
            return step.apply({name: parameters[name].detach() for name in g}, g)
        clipped = g if self.plain else step.clipped(g)
        return {name: c * clipped[name] for name, c in coefficients.items()}

    def _coefficients(self, step: OptimizerStep, names: Iterable[str]) -> dict[str, float] | None:
        """The c of θ' = c g + …, one per parameter; None where the step is not linear in g."""
        found: dict[str, float] = {}
        for name in names:
            c = -step.learning_rate(name) if self.plain else step.gradient_coefficient(name)
            if c is None:
                return None
            found[name] = c
        return found

    def applied(self, system: LinearSystem, direction: Sequence[Tensor]) -> list[Tensor]:
        """(∂θ'/∂g) u: how the step moves with its gradient."""
        solution = system.call.solution
        assert isinstance(solution, Stepped)
        # w ↦ (∂θ'/∂g)ᵀ w is linear, and its transpose is wanted.
        u = dict(zip(system.names, direction, strict=True))
        coefficients = self._coefficients(solution.step, u)
        if coefficients is not None and (self.plain or solution.step.grad_clip is None):
            return [c * u[name] for name, c in coefficients.items()]
        with torch.enable_grad():
            g = {name: solution.gradient[name].detach().requires_grad_() for name in u}
            moved = self._moved(solution, g)
            names = [name for name, tensor in moved.items() if tensor.requires_grad]
            w = [torch.zeros_like(moved[name], requires_grad=True) for name in names]
            pulled = torch.autograd.grad(
                [moved[name] for name in names],
                [g[name] for name in names],
                w,
                create_graph=True,
                materialize_grads=True,
            )
        pairs = [(t, u[n]) for n, t in zip(names, pulled, strict=True) if t.requires_grad]
        found = torch.autograd.grad(
            [t for t, _ in pairs], w, [entry for _, entry in pairs], materialize_grads=True
        )
        moves = dict(zip(names, found, strict=True))
        return [moves.get(name, torch.zeros_like(entry)) for name, entry in u.items()]

    def _through_whole_step(
        self, system: LinearSystem, solution: Stepped, v_of: dict[str, Tensor]
    ) -> Solve:
        """The solve −(∂θ'/∂g)ᵀ v and the direct part (∂θ'/∂x)ᵀ v, through the whole step."""
        call, evaluation = system.call, solution.evaluation
        g = self._gradient(system, solution, v_of)
        inputs = call.input_aliases()
        theta = {name: evaluation.parameters[name].detach() for name in g}
        if call.start is not None:
            begun = call.parameter_aliases(inputs)
            theta = {name: begun[name] for name in g}
        with torch.enable_grad(), call.reads_at(evaluation.parameters, inputs) as reads:
            after = evaluation.stepped(solution.step, theta, g, reads)
        call.check_step(after)
        names = [name for name in g if after[name].requires_grad]
        sources = [*g.values(), *call.select(inputs)]
        found: Sequence[Tensor | None] = [None] * len(sources)
        if names:
            found = torch.autograd.grad(
                [after[name] for name in names],
                sources,
                grad_outputs=[v_of[name] for name in names],
                create_graph=call.differentiate,
                allow_unused=True,
            )
        of_g, of_inputs = found[: len(g)], found[len(g) :]
        q = {name: -part for name, part in zip(g, of_g, strict=True) if part is not None}
        return Solve(
            q=[q.get(name) for name in system.names],
            report=self.report(system.problem, iterations=1),
            direct=call.scatter(of_inputs),
        )

    def _gradient(
        self, system: LinearSystem, solution: Stepped, names: Iterable[str]
    ) -> dict[str, Tensor]:
        """The gradient g that the step was made with, as the variable of differentiation.

        If the derivative is differentiated again, it is F with its graph.
        """
        if not system.call.differentiate:
            return {name: solution.gradient[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            found = dict(zip(system.names, system.gradient(), strict=True))
        return {name: found[name] for name in names}

    def _through_step(
        self,
        system: LinearSystem,
        step: OptimizerStep,
        g: dict[str, Tensor],
        v_of: dict[str, Tensor],
        scaled: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Returns q = −(∂θ'/∂g)ᵀ v.

        For a linear step that clips it is −(∂clipped/∂g)ᵀ c v, with −c v given as `scaled`.
        """
        with torch.enable_grad():
            if scaled is not None:
                after, minus_v = step.clipped(g), scaled
            else:
                parameters = system.call.solution.evaluation.parameters
                after = step.apply({name: parameters[name].detach() for name in g}, g)
                minus_v = {name: -v for name, v in v_of.items()}
        # A step that does not depend on the size of the gradient (its sign) has no derivative.
        names = [name for name in g if after[name].requires_grad]
        if not names:
            return {}
        found = grad(
            [after[name] for name in names],
            list(g.values()),
            [minus_v[name] for name in names],
            create_graph=system.call.differentiate,
        )
        return {name: q for name, q in zip(g, found, strict=True) if q is not None}


def _scaled(tensors: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors that have a factor, times it."""
    chosen = list(map(tensors.__getitem__, factors))
    if len(set(factors.values())) == 1 and are_alike(chosen):
        made: Sequence[Tensor] = torch._foreach_mul(chosen, next(iter(factors.values())))
    else:
        made = [c * tensor for c, tensor in zip(factors.values(), chosen, strict=True)]
    return dict(zip(factors, made, strict=True))


def darts(*, step: float | str = "adaptive", plain: bool = False) -> OneStep:
    """The preset `darts`: one step × finite differences.

    Args:
        step: step size rule of the difference; "darts" is the original's 0.01 / ‖v‖ (see
            `FiniteDifference`).
        plain: see `OneStep`.
    """
    return OneStep(products=FiniteDifference(step=step), plain=plain)
