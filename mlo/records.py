"""What a round reports: losses, metrics, gradient norms, and how its solves went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlo.errors import NonFiniteError
from mlo.gradient_norm import GradientNorm
from mlo.notebook_table import table_html
from mlo.tensors import map_tensors, tensors_of

__all__ = ["CONVERGED", "GradientReport", "Record", "SolveReport"]

CONVERGED = 1e-6
"""The relative residual up to which a solve has converged, unless its engine's `tol` says another.

It is the default `tol` of the engines that stop at a residual.
"""


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """The report on one differentiation of a response, by a hypergradient engine.

    `outcome` names how it ended:

    - "converged": its residual is at most the tolerance. That is 1e-6 (`CONVERGED`), or the `tol`
      at which `cg`, `minres`, `gmres`, `normal_cg` and `nystrom` stop, or 1e-4 for `direct`. (The
      report "stationarity" of `implicit_solution` has 1e-3.)
    - "truncated": the residual is larger, as expected of an engine that makes a fixed number of
      steps (`neumann`, `penalty`, `sid`, `soba`).
    - "failed": the result is worse than the engine is good for, and `advice` says what to change.
    - "no solve": the engine solves no system (`one_step`, `unroll`, `identity`), so nothing could
      fail to converge. It says nothing about how exact the gradient is.

    Attributes:
        problem: name of the lower problem whose response was differentiated.
        engine: name of the engine.
        iterations: what the solve took: products with the Jacobian, or the number of steps that
            were differentiated or made (`one_step`, `unroll`, `zeroth_order`, `penalty`); 0 where
            none is needed.
        residual: relative residual ‖Aᵀq − v‖ / ‖v‖, with the engine's damping in A. It says nothing
            of whether the lower problem is solved (`GradientReport.stationarity` does). `neumann`,
            `penalty` and `soba` give that before their last step, which bounds it while they
            converge. `soba` averages it over updates, and `sid` over steps. None where no system
            is solved, or its residual is not known.
        converged: whether the residual is at most the tolerance above; true where no system is
            solved.
        advice: what to change; empty unless the solve failed.
        curvature: the smallest curvature uᵀAu / uᵀu that the solve met, if it measures any (CG).
    """

    problem: str
    engine: str
    iterations: int = 0
    residual: float | None = None
    converged: bool = True
    advice: str = ""
    curvature: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the result is worse than the engine is good for, as `advice` explains."""
        return not self.converged and bool(self.advice)

    @property
    def outcome(self) -> str:
        """How the solve ended: "converged", "truncated", "failed" or "no solve"."""
        if not self.converged:
            return "failed" if self.failed else "truncated"
        return "no solve" if self.residual is None else "converged"


BADNESS = {"no solve": 0, "converged": 0, "truncated": 1, "failed": 2}
"""Outcome of a solve → its rank; a round's record keeps the report with the highest."""


@dataclass(frozen=True, kw_only=True)
class GradientReport:
    """A total gradient and the solves that it took, as `gradient(name, report=True)` returns it.

    Attributes:
        gradient: parameter name → gradient, of the parameter's shape.
        reports: of the solves, in the order in which they were made. A lower problem has one for
            each time that its response was differentiated: usually one, and more in a graph of
            three levels, where differentiating the middle response repeats the solves below it,
            or where several players of a game read it. Empty if the gradient flows through no
            solution, or through none with an engine other than `first_order`.
        stationarity: lower problem with an implicit engine → ‖F‖ relative to the terms that cancel
            in it, on the batches of its solve. It is 0 at a solution, and about 1 where nothing
            cancels. A solve's residual does not show it. The relative error of the gradient is of
            that order or larger.
    """

    gradient: dict[str, Tensor]
    reports: tuple[SolveReport, ...]
    stationarity: dict[str, float] = field(default_factory=dict)


def _as_number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value


def _as_numbers(value: Any) -> Any:
    """A value, or the values of a mapping, as Python numbers."""
    if isinstance(value, Mapping):
        return {key: _as_number(entry) for key, entry in value.items()}
    return _as_number(value)


def _shown(loss: Any) -> str:
    if isinstance(loss, Mapping):
        return f"({', '.join(f'{player}={_shown(value)}' for player, value in loss.items())})"
    return f"{loss:.4g}"


def _solved(report: SolveReport) -> str:
    """A solve's result, in words."""
    parts = [report.engine]
    if report.iterations:
        # (A solve that is cut off without a residual has made products all the same.)
        unit = "step" if report.outcome == "no solve" else "product"
        parts.append(f"{report.iterations} {unit}{'' if report.iterations == 1 else 's'}")
    if report.residual is not None:
        parts.append(f"residual {report.residual:.1e}")
    if report.failed:
        parts.append(f"failed. {report.advice}")
    elif not report.converged:
        parts.append("truncated")
    return ", ".join(parts)


@dataclass(kw_only=True)
class Record:
    """One round: every problem's last update in it.

    Values are kept as tensors and become Python numbers when they are read, so that a round on a
    GPU forces no synchronisation.

    Attributes:
        round: number of the round, counted from 1.
        losses: problem → its loss, a number; of a game player → number.
        metrics: problem → what its loss returned beside it.
        gradient_norms: problem → Euclidean norm of its total gradient, before clipping.
        player_gradient_norms: game → player → the norm of the gradient of its own parameters.
        solves: lower problem → the report on the worst solve of its response in this round: one
            that failed before one that was truncated, that before one that converged; of several
            alike, the last. Solves of updates that were left out are among them.
        skipped: problem → why its update was left out (`on_nonfinite="skip"`); it then has no loss
            in this record. With `accumulate_solves` the mean is over the solves whose gradients
            were finite. If there is none, the update is left out.
        rolled_back: why the run returned to an earlier state before this round
            (`on_nonfinite="rollback"`); None: it did not.
        seconds: problem → wall-clock seconds of its updates in this round, all together: drawing
            batches, the gradient with its solves, the step. The measurement does not wait for a
            GPU. Work still running there counts for the update that waits for it. The check of the
            gradient waits, so this is the same update unless `on_nonfinite` is None.
    """

    round: int
    solves: dict[str, SolveReport] = field(default_factory=dict)
    skipped: dict[str, NonFiniteError] = field(default_factory=dict)
    rolled_back: NonFiniteError | None = None
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    _losses: dict[str, Tensor | dict[str, Tensor]] = field(default_factory=dict, repr=False)
    _metrics: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _gradient_norms: dict[str, Tensor | GradientNorm] = field(default_factory=dict, repr=False)
    _player_gradient_norms: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def add(
        self,
        problem: str,
        *,
        loss: Tensor | dict[str, Tensor],
        metrics: dict[str, Any],
        gradient_norm: Tensor | GradientNorm,
        player_norms: dict[str, Tensor] | None = None,
    ) -> None:
        """Notes one update of a problem; a later one in the same round replaces it."""
        if player_norms is not None:
            self._player_gradient_norms[problem] = player_norms
        self._losses[problem] = loss
        self._metrics[problem] = metrics
        self._gradient_norms[problem] = gradient_norm

    def add_solve(self, report: SolveReport) -> None:
        """Notes one solve; the worst of the round stays, and of several alike the last."""
        noted = self.solves.get(report.problem)
        if noted is None or BADNESS[report.outcome] >= BADNESS[noted.outcome]:
            self.solves[report.problem] = report

    def _fetch(self) -> None:
        """Copies all numbers from a GPU at once, since each copy waits for the device."""
        for name, norm in self._gradient_norms.items():
            if isinstance(norm, GradientNorm):
                self._gradient_norms[name] = norm.total
        held = (
            self._losses,
            self._metrics,
            self._gradient_norms,
            self._player_gradient_norms,
        )
        alike: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
        for tensor in tensors_of(held):
            if tensor.device.type not in ("cpu", "meta"):
                alike.setdefault((tensor.device, tensor.dtype), {})[id(tensor)] = tensor.detach()
        if not alike:
            return
        fetched: dict[int, Tensor] = {}
        for members in alike.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in members.values()]).cpu()
            parts = torch.split(flat, [tensor.numel() for tensor in members.values()])
            for (key, tensor), part in zip(members.items(), parts, strict=True):
                fetched[key] = part.view(tensor.shape)
        for values in held:
            values.update(map_tensors(values, lambda tensor: fetched.get(id(tensor), tensor)))

    def __repr__(self) -> str:
        # For a notebook or a log: the losses first, then what deserves a look.
        losses = ", ".join(f"{name}={_shown(loss)}" for name, loss in self.losses.items())
        ended: dict[str, list[str]] = {"converged": [], "truncated": [], "failed": []}
        for name, report in self.solves.items():
            if report.outcome in ended:
                ended[report.outcome].append(name)
        solves = "".join(f"; {how}: {', '.join(names)}" for how, names in ended.items() if names)
        return f"Record(round={self.round}: {losses}{solves})"

    def _repr_html_(self) -> str:
        """The notebook's view: one row per problem."""
        rows = []
        losses, norms = self.losses, self.gradient_norms
        for name in dict.fromkeys([*losses, *self.skipped, *self.solves]):
            loss = _shown(losses[name]) if name in losses else None
            norm = f"{norms[name]:.3g}" if name in norms else None
            time = f"{1000 * self.seconds[name]:.3g}" if name in self.seconds else None
            skipped = f"skipped: {self.skipped[name]}" if name in self.skipped else ""
            solve = _solved(self.solves[name]) if name in self.solves else ""
            rows.append((name, loss, norm, time, "; ".join(filter(None, (skipped, solve)))))
        title = f"Round {self.round}"
        if self.rolled_back is not None:
            title += f", after going back: {self.rolled_back}"
        headings = ("problem", "loss", "gradient norm", "milliseconds", "response")
        return table_html(title, headings, rows)

    @property
    def losses(self) -> dict[str, Any]:
        """Problem → its loss; for a game, player → loss."""
        self._fetch()
        return {name: _as_numbers(loss) for name, loss in self._losses.items()}

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Problem → the metrics that its loss returned, as Python numbers and lists."""
        self._fetch()
        return {name: _as_numbers(metrics) for name, metrics in self._metrics.items()}

    @property
    def gradient_norms(self) -> dict[str, float]:
        """Problem → Euclidean norm of its total gradient, before clipping."""
        self._fetch()
        return {name: float(norm) for name, norm in self._gradient_norms.items()}

    @property
    def player_gradient_norms(self) -> dict[str, dict[str, float]]:
        """Game → player → Euclidean norm of the gradient of the player's own parameters."""
        self._fetch()
        return {name: _as_numbers(norms) for name, norms in self._player_gradient_norms.items()}
