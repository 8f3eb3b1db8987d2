"""`soba`: one step of the linear solve per upper update, resumed from the last one's result.

q_{t+1} = q_t + α (v − Aᵀ q_t). While the lower and upper problems move slowly, q follows A⁻ᵀ v. An
upper update costs one product with Aᵀ and one mixed product, whatever the conditioning.

Both products are linear in means over a batch. So an estimator of the lower problem corrects them
too, and one of the upper problem corrects v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.estimators import Point
from mlo.hypergradient.iterative import FlatOperator
from mlo.hypergradient.options import count, number, scheduled_number
from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.hypergradient.step_size import persistent_step_size
from mlo.records import CONVERGED, SolveReport
from mlo.response import Cotangent
from mlo.solution import Stationary
from mlo.tensors import norm_of

__all__ = ["Soba"]

PATIENCE = 100
"""Number of updates that q is given to find A⁻ᵀ v from zero."""

WINDOW = 20.0
"""Updates over which residuals are averaged."""

LOST = 100.0
"""A residual this many times the cotangent's norm means that q is lost and restarts from zero."""

ADVICE_LOST = (
    "The persistent solve diverged and starts over: use step_size='auto', or a smaller one; on a "
    "Jacobian with negative eigenvalues, damping."
)
ADVICE_BEHIND = (
    "The persistent solve lags behind: the problems move too fast for one step per update, or the "
    "Jacobian is too ill-conditioned. Lower the learning rates, or use a larger batch (accumulate=)"
)


@dataclass(frozen=True, kw_only=True)
class Soba(Engine):
    """Keeps q from one upper update to the next, and moves it a step down the residual.

    In a round of `order="simultaneous"` the cotangents of the inputs are −Bᵀ q_t: the three
    directions of the lower problem, of q and of the upper problem are taken at one point, and both
    products in one backward pass through the lower gradient's own graph. In any other order they
    are −Bᵀ q_{t+1}.

    In the first updates q is too small, and `gradient`, which changes nothing, does not advance it.
    The response cannot be differentiated again, because q depends on earlier updates.

    Attributes:
        step_size: α, below 2 / λmax. "auto" takes 1 / λmax, where λmax is estimated by ten products
            and estimated again every hundred updates. It is raised whenever the product of an
            update shows a larger curvature, which happens before q can diverge. "lower" takes the
            learning rate of the lower problem's last update. A function takes the number of updates
            that q has had (0 at the first) and returns α.
        steps: steps of q per upper update.
        fresh_batches: whether each step, and the mixed product, uses fresh batches of the lower
            problem's `solve_data`.
        damping: added to the diagonal of A.
        tol: relative residual above which the solve counts as failed, after `PATIENCE` updates. Up
            to it q follows the solution, and is reported as truncated; as converged if the residual
            is at most `mlo.records.CONVERGED`.

    Reference: Dagréou et al., A framework for bilevel optimization that enables stochastic and
    global variance reduction algorithms (2022), Algorithm 1 with the directions of Eqs. 4-6; with
    several steps Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel
    optimization (2022), Algorithm 1.
    """

    step_size: float | str | Callable[[int], float] = scheduled_number()
    steps: int = count(1)
    fresh_batches: bool = False
    damping: float = number(0.0)
    tol: float = number(0.5)

    name: ClassVar[str] = "soba"
    takes_estimates: ClassVar[bool] = True

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def keeps_memory(self) -> bool:
        return True

    @property
    def fresh_products(self) -> int:
        return self.steps if self.fresh_batches else 0

    @torch.no_grad()
    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        solution = system.call.solution
        simultaneous = isinstance(solution, Stationary) and solution.simultaneous
        operator = FlatOperator(system, self.damping)
        v = operator.flatten(cotangent)
        kept = system.recall("q")
        start = q = torch.zeros_like(v) if kept is None else kept
        size = norm_of(q)

        # The first product with Aᵀ gives the residual, and a lower bound of λmax.
        product, pulled = self._first_product(system, operator, q, mixed=simultaneous)
        observed = 0.0
        if self.step_size == "auto" and size != 0.0:
            observed = norm_of(product) / size
        alpha = self._step_size(system, operator, observed)
        first = v - product
        scale = norm_of(v)
        residual = norm_of(first) / (scale or 1.0)
        lost = scale > 0.0 and not residual <= LOST

        # q ← q + α (v − Aᵀ q); from q = 0 that is α v, to which a lost q returns.
        q = alpha * v if lost else q + alpha * first
        for step in range(1, 1 if lost else self.steps):
            q = q + alpha * (v - self._product(system, operator, q, step))
        system.keep("q", q)
        if pulled is None:
            pulled = self._estimated(system, operator.split(q), "mixed")[1]

        iterations = (self.steps if size != 0.0 else self.steps - 1) if not lost else 1
        return Solve(
            q=operator.split(start if simultaneous else q),
            report=self._judged(system, v, first, iterations, lost=residual if lost else None),
            pulled=pulled,
        )

    # ------------------------------ products, corrected by the lower problem's estimator

    def _first_product(
        self, system: LinearSystem, operator: FlatOperator, q: Tensor, *, mixed: bool
    ) -> tuple[Tensor, list[Tensor | None] | None]:
        """Aᵀ q, and with `mixed` Bᵀ q of the same batch."""
        if mixed:
            parts, pulled = self._estimated(system, operator.split(q), "both")
            product = operator.flatten(parts)
            return product + self.damping * q if self.damping else product, pulled
        return self._product(system, operator, q, 0), None

    def _product(
        self, system: LinearSystem, operator: FlatOperator, q: Tensor, step: int
    ) -> Tensor:
        """Aᵀ q of one step, on a fresh batch if there is one."""
        solution = system.call.solution
        with ExitStack() as stack:
            on = system
            if isinstance(solution, Stationary) and solution.fresh:
                batches = solution.fresh[step]
                other = replace(solution, evaluation=batches, fresh=(), graph=None)
                on = self.products.linearize(replace(system.call, solution=other, stack=stack))
            parts, _ = self._estimated(on, operator.split(q), f"product {step}")
        product = operator.flatten(parts)
        return product + self.damping * q if self.damping else product

    def _estimated(
        self, system: LinearSystem, q: Sequence[Tensor], group: str
    ) -> tuple[Cotangent, list[Tensor | None]]:
        """Aᵀ q and Bᵀ q, or one of them, as the lower problem's estimator has them.

        Args:
            system: at the point and on the batch where they are taken.
            q: one entry per parameter.
            group: "both", "mixed" or "product …", which says what is taken.
        """
        call = system.call
        solution = call.solution
        estimates = solution.estimates if isinstance(solution, Stationary) else None
        if estimates is None:
            # A q that has not begun needs no products.
            if not any(bool(entry.any()) for entry in q):
                zeros = [torch.zeros_like(t) for t in call.select(call.inputs)]
                return q, call.scatter(zeros)
            return _taken(system, q, group)
        inputs = call.input_aliases()

        def point() -> Point:
            here = {f"own/{k}": t for k, t in solution.evaluation.parameters.items()}
            here |= {f"input/{k}": tensor for k, tensor in enumerate(inputs)}
            return here | {f"q/{k}": entry for k, entry in enumerate(q)}

        def again(there: Point) -> dict[str, Tensor | None]:
            own = {key: there[f"own/{key}"] for key in solution.evaluation.parameters}
            read = [there[f"input/{k}"] for k in range(len(inputs))]
            with ExitStack() as stack:
                earlier = self.products.linearize(call.moved(own, read, stack))
                return _named(*_taken(earlier, [there[f"q/{k}"] for k in range(len(q))], group))

        named = estimates.estimate(
            f"{call.reading.reader} {group}",
            solution.evaluation.batches,
            _named(*_taken(system, q, group)),
            point=point,
            again=again,
        )
        hessian = [entry for key, entry in named.items() if key.startswith("A")]
        return hessian, [entry for key, entry in named.items() if key.startswith("B")]

    # ------------------------------ the step size, and how it goes

    def _step_size(self, system: LinearSystem, operator: FlatOperator, observed: float) -> float:
        if self.step_size == "lower":
            return self._learning_rate(system)
        if callable(self.step_size):
            made = system.recall("steps made")
            updates = 0 if made is None else int(made)
            system.keep("steps made", torch.tensor(updates + 1))
            return float(self.step_size(updates))
        return persistent_step_size(self.step_size, operator, system, observed=observed)

    def _learning_rate(self, system: LinearSystem) -> float:
        """The one learning rate of the lower problem.

        Raises:
            EngineError: if it has several.
        """
        solution = system.call.solution
        rates = set(solution.learning_rates) if isinstance(solution, Stationary) else set()
        if len(rates) != 1:
            raise EngineError(
                f"Problem {system.problem!r}: 'soba' with step_size='lower' takes the learning "
                f"rate of its optimizer, which has {sorted(rates)}. Pass a number or 'auto'."
            )
        return rates.pop()

    def _judged(
        self,
        system: LinearSystem,
        v: Tensor,
        residual: Tensor,
        iterations: int,
        *,
        lost: float | None,
    ) -> SolveReport:
        """The report on an update.

        Args:
            system: keeps the means of what is judged.
            v: the cotangent.
            residual: v − Aᵀ q before the update.
            iterations: products with Aᵀ.
            lost: the relative residual of a q that starts again; None: q is kept.
        """
        # A young q cannot follow yet, and gets no advice.
        restart = lost is not None
        made = system.recall("updates")
        count = torch.tensor(1) if made is None or restart else made + 1
        system.keep("updates", count)
        updates = int(count)

        # On minibatches one residual is mostly noise. Means of residuals and cotangents are not.
        mean_residual = self._mean(system, "mean residual", residual, restart=restart)
        mean_v = self._mean(system, "mean cotangent", v, restart=restart)
        followed = norm_of(mean_residual) / (norm_of(mean_v) or 1.0)
        behind = updates > PATIENCE and not followed <= self.tol
        return self.report(
            system.problem,
            iterations=iterations,
            residual=followed if lost is None else lost,
            converged=lost is None and followed <= CONVERGED,
            advice=ADVICE_LOST if restart else _behind(system) if behind else "",
        )

    @staticmethod
    def _mean(system: LinearSystem, what: str, value: Tensor, *, restart: bool) -> Tensor:
        """The running mean of a vector over the last `WINDOW` or so updates."""
        # An exponential mean, which forgets by 1 / WINDOW per update.
        kept = None if restart else system.recall(what)
        mean = value if kept is None else torch.lerp(kept, value, 1.0 / WINDOW)
        system.keep(what, mean)
        return mean


def _taken(
    system: LinearSystem, q: Sequence[Tensor], group: str
) -> tuple[Cotangent, list[Tensor | None]]:
    """Aᵀ q and Bᵀ q of a system; a group may need only one of them."""
    if group == "both":
        return system.both_products(q)
    if group == "mixed":
        return [], system.mixed_vjp(q)
    return system.transpose_product(q), []


def _named(hessian: Cotangent, mixed: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    named = {f"A {k}": entry for k, entry in enumerate(hessian)}
    return named | {f"B {k}": entry for k, entry in enumerate(mixed)}


def _behind(system: LinearSystem) -> str:
    """What to do about a solve that lags behind."""
    solver = system.advice.phrase("; or use {} with solve_data= that holds all data", "cg", "gmres")
    return f"{ADVICE_BEHIND}{solver}."
