"""`soba`: one step of the linear solve per upper update, resumed from where the last one ended.

q_{t+1} = q_t + α (v − Aᵀ q_t). While the lower and upper problems move slowly, q follows A⁻ᵀ v. An
upper update costs one product with Aᵀ and one mixed product, whatever the conditioning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.iterative import FlatOperator
from mlo.hypergradient.options import number, number_or_auto
from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.hypergradient.step_size import persistent_step_size
from mlo.response import Cotangent

__all__ = ["Soba"]

PATIENCE = 100
"""Number of updates that q is given to find A⁻ᵀ v from zero."""

WINDOW = 20.0
"""Updates over which residuals are averaged."""

LOST = 100.0
"""A residual this many times the cotangent's norm means that q is lost: it restarts from zero."""

ADVICE_LOST = (
    "The persistent solve diverged and starts again: use step_size='auto', or a smaller one; on a "
    "Jacobian with negative eigenvalues, damping."
)
ADVICE_BEHIND = (
    "The persistent solve does not follow: the problems move too fast for one step per update, or "
    "the Jacobian is too ill-conditioned. Lower the learning rates, use a larger batch "
    "(accumulate=), or 'cg' with solve_data= that holds all of the data."
)


@dataclass(frozen=True, kw_only=True)
class Soba(Engine):
    """Keeps q from one upper update to the next, and moves it one step down the residual.

    The first updates therefore see a small q, and `gradient`, which changes nothing, does not
    advance it. The response cannot be differentiated again: q holds what earlier updates left.

    Attributes:
        step_size: α, below 2 / λmax. "auto" takes 1 / λmax, where λmax is estimated by ten products
            and estimated again every hundred updates. It is raised whenever the product of an
            update shows a larger curvature, which happens before q can diverge.
        damping: added to the diagonal of A.
        tol: relative residual above which it counts as not converged, once it has made `PATIENCE`
            updates.

    Reference: Dagréou et al., A framework for bilevel optimization that enables stochastic and
    global variance reduction algorithms (2022), Algorithm 1 with the directions of Eqs. 4-6.
    """

    step_size: float | str = number_or_auto()
    damping: float = number(0.0)
    tol: float = number(0.5)

    name: ClassVar[str] = "soba"

    @property
    def differentiable(self) -> bool:
        return False

    @torch.no_grad()
    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        operator = FlatOperator(system, self.damping)
        v = operator.flatten(cotangent)
        scale = float(v.norm())

        # The one product with Aᵀ. It gives the residual, and a lower bound of λmax.
        q = system.recall("q")
        product = torch.zeros_like(v) if q is None else operator(q)
        q = torch.zeros_like(v) if q is None else q
        observed = float(product.norm()) / float(q.norm()) if bool(q.any()) else 0.0
        alpha = persistent_step_size(self.step_size, operator, system, observed=observed)

        # q_{t+1} = q_t + α (v − Aᵀ q_t); from q_t = 0 that is α v, to which a lost q returns.
        residual = float((v - product).norm()) / (scale or 1.0)
        lost = scale > 0.0 and not residual <= LOST
        q = alpha * v if lost else q + alpha * (v - product)
        system.keep("q", q)

        # A young q cannot have arrived, and gets no advice.
        made = system.recall("updates")
        updates = 1 if made is None or lost else int(made) + 1
        system.keep("updates", torch.tensor(updates))

        # On minibatches one residual is mostly noise. Means of residuals and cotangents are not.
        mean_residual = self._mean(system, "mean residual", v - product, restart=lost)
        mean_v = self._mean(system, "mean cotangent", v, restart=lost)
        followed = float(mean_residual.norm()) / (float(mean_v.norm()) or 1.0)
        converged = not lost and followed <= self.tol
        advice = ADVICE_LOST if lost else ADVICE_BEHIND if updates > PATIENCE else ""
        report = self.report(
            system.problem,
            iterations=operator.products,
            residual=residual if lost else followed,
            converged=converged,
            advice=advice,
        )
        return Solve(q=operator.split(q), report=report)

    @staticmethod
    def _mean(system: LinearSystem, what: str, value: Tensor, *, restart: bool) -> Tensor:
        """The running mean of a vector over the last `WINDOW` or so updates."""
        # An exponential mean, which forgets by 1 / WINDOW per update.
        kept = None if restart else system.recall(what)
        mean = value if kept is None else kept + (value - kept) / WINDOW
        system.keep(what, mean)
        return mean
