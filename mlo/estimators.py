"""Estimators: gradients of lower variance, from a batch and from earlier batches.

A problem's loss is a mean over samples, and so are its gradient, the cotangents of what it reads,
and the products of `soba` with its derivatives. A batch gives each of them with noise. An estimator
removes the part of the noise that it can know: that of the same block at an earlier visit (`Saga`),
or of the same batch at the previous update's point (`Storm`, `Spider`).

An estimator is a rule without state. `Estimates` holds its state for one problem.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.errors import ConfigurationError, ProblemError, nearest
from mlo.indexed_batches import IndexedBatch

__all__ = [
    "Estimates",
    "Estimator",
    "EstimatorMemory",
    "Point",
    "Quantities",
    "Saga",
    "Spider",
    "Storm",
    "estimator_from",
]

Quantities = dict[str, Tensor]
"""Name → a mean over samples: a gradient, a cotangent, a product."""

Point = dict[str, Tensor]
"""Name → everything but the batch that quantities depend on."""


class EstimatorMemory:
    """Tensors by name, which change when an update is made and not before.

    Attributes:
        tensors: what is kept.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}

    def recall(self, key: str) -> Tensor | None:
        """What the last update left under a name, or None."""
        return self.tensors.get(key)

    def keep(self, key: str, tensor: Tensor) -> None:
        """Keeps a copy of a tensor, once the update is made."""
        self._waiting[key] = tensor.detach().clone()

    def commit(self) -> None:
        """Keeps what waits, because the update was made."""
        self.tensors.update(self._waiting)
        self._waiting.clear()

    def discard(self) -> None:
        """Forgets what waits: the update failed, or it was only a question."""
        self._waiting.clear()


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """A rule that corrects means over a batch. Subclass it to write your own.

    Attributes:
        uses_earlier_point: whether it evaluates at the previous update's point.
        uses_blocks: whether it must know which block a batch is, and so needs single batches.
    """

    name: ClassVar[str]
    uses_earlier_point: ClassVar[bool] = False
    uses_blocks: ClassVar[bool] = False

    @abstractmethod
    def estimate(
        self,
        memory: EstimatorMemory,
        group: str,
        batches: Sequence[Any],
        found: Quantities,
        earlier: Callable[[], Quantities] | None,
    ) -> Quantities:
        """Returns the corrected quantities.

        Args:
            memory: what the estimator has kept of this problem.
            group: the quantities that are estimated together; the beginning of all keys of memory.
            batches: those of this evaluation.
            found: their means over these batches.
            earlier: computes the same quantities on the same batches at the previous update's
                point. None: there was no update, or `uses_earlier_point` is false.
        """


def _number_of(batch: Any) -> int | None:
    if isinstance(batch, IndexedBatch):
        return batch.number
    raise ProblemError(
        "The estimator 'saga' must know which block a batch is, but got a "
        f"{type(batch).__name__}. Pass data=mlo.IndexedBatches(x, y, batch_size=...), or "
        "estimator=mlo.Saga(index=function of the batch)."
    )


def _is_whole(batch: Any) -> bool:
    return isinstance(batch, IndexedBatch) and batch.number is None


@dataclass(frozen=True, kw_only=True)
class Saga(Estimator):
    """A table of what each block last gave: g − row + mean of all rows.

    A block's first visit is not corrected, so the estimate is unbiased from the first update on.
    The table holds one row per block and quantity. For a lower problem under `soba` the quantities
    are its gradient and two products.

    Attributes:
        index: batch → the number of its block, or None for one that stands for all of the data and
            needs no correction. The default takes that of an `IndexedBatch`.

    Reference: Defazio et al., SAGA (2014), Eq. 1; for bilevel problems (SABA) Dagréou et al., A
    framework for bilevel optimization that enables stochastic and global variance reduction
    algorithms (2022), Section 3.2.
    """

    index: Callable[[Any], int | None] = _number_of

    name: ClassVar[str] = "saga"
    uses_blocks: ClassVar[bool] = True

    def estimate(
        self,
        memory: EstimatorMemory,
        group: str,
        batches: Sequence[Any],
        found: Quantities,
        earlier: Callable[[], Quantities] | None,
    ) -> Quantities:
        """Returns g − row + mean, and lets the row be g."""
        (batch,) = batches
        block = self.index(batch)
        if block is None:
            return found
        corrected: Quantities = {}
        for name, g in found.items():
            key = f"{group}/{name}"
            row, mean = memory.recall(f"{key}/row {int(block)}"), memory.recall(f"{key}/mean")
            rows = memory.recall(f"{key}/rows")
            number = 0 if rows is None else int(rows)
            if mean is None:
                mean = torch.zeros_like(g)
            # `mean` is over the rows seen so far.
            if row is None:
                corrected[name] = g
                memory.keep(f"{key}/mean", mean + (g - mean) / (number + 1))
                memory.keep(f"{key}/rows", torch.tensor(number + 1))
            else:
                corrected[name] = g - row + mean
                memory.keep(f"{key}/mean", mean + (g - row) / number)
            memory.keep(f"{key}/row {int(block)}", g)
        return corrected


@dataclass(frozen=True, kw_only=True)
class Storm(Estimator):
    """The last estimate, moved by the change on one batch: d = g + (1 − a)(d₋ − g₋).

    g₋ is the same batch's value at the previous update's point, so each update evaluates twice. A
    batch that represents all of the data sets d = g.

    Attributes:
        rate: a, the weight of the new batch: a number from 0 to 1, or a function of how many
            estimates were made before (0 for the first, whose d is g).
        whole: batch → whether it stands for all of the data. The default takes that of an
            `IndexedBatch`.

    Reference: Cutkosky and Orabona, Momentum-based variance reduction in non-convex SGD (2019); for
    bilevel problems (MRBO) Yang et al., Provably faster algorithms for bilevel optimization (2021),
    Algorithm 1.
    """

    rate: float | Callable[[int], float] = 0.1
    whole: Callable[[Any], bool] = _is_whole

    name: ClassVar[str] = "storm"
    uses_earlier_point: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.rate) and not 0.0 <= self.rate <= 1.0:
            raise ConfigurationError(
                f"The estimator {self.name!r} takes a rate from 0 to 1, got {self.rate!r}."
            )

    def estimate(
        self,
        memory: EstimatorMemory,
        group: str,
        batches: Sequence[Any],
        found: Quantities,
        earlier: Callable[[], Quantities] | None,
    ) -> Quantities:
        """Returns g + (1 − a)(d₋ − g₋), and keeps it."""
        count = memory.recall(f"{group}/estimates")
        made = 0 if count is None else int(count)
        corrected = dict(found)
        if earlier is not None and not all(map(self.whole, batches)):
            rate = self.rate(made) if callable(self.rate) else self.rate
            before = earlier()
            for name, g in found.items():
                kept, then = memory.recall(f"{group}/{name}/estimate"), before.get(name)
                if kept is not None and then is not None:
                    corrected[name] = g + (1.0 - rate) * (kept - then)
        for name, estimate in corrected.items():
            memory.keep(f"{group}/{name}/estimate", estimate)
        memory.keep(f"{group}/estimates", torch.tensor(made + 1))
        return corrected


@dataclass(frozen=True, kw_only=True)
class Spider(Storm):
    """The last estimate, moved by the change on one batch: d = d₋ + g − g₋.

    This is `Storm` with the rate 0. Errors accumulate until a batch represents all of the data, or
    so much of it that its noise does not matter: `IndexedBatches(..., whole_every=q)`.

    Reference: Fang et al., SPIDER (2018), and Nguyen et al., SARAH (2017); for bilevel problems
    Dagréou et al., A lower bound and a near-optimal algorithm for bilevel empirical risk
    minimization (2023), Algorithm 1 (SRBA); Chu et al., SPABA (2024); Yang et al. (2021),
    Algorithm 2 (VRBO).
    """

    rate: float | Callable[[int], float] = field(default=0.0, init=False)

    name: ClassVar[str] = "spider"


class Estimates:
    """An estimator at work on one problem.

    Args:
        problem: its name, for messages.
        estimator: the rule.
        of_total: whether it corrects the problem's total gradient. Otherwise it corrects the direct
            gradient and each cotangent of what the problem reads.

    Attributes:
        memory: what it keeps; part of the run's state.
    """

    def __init__(self, problem: str, estimator: Estimator, *, of_total: bool) -> None:
        self.problem, self.estimator, self.of_total = problem, estimator, of_total
        self.memory = EstimatorMemory()

    def estimate(
        self,
        group: str,
        batches: Sequence[Any],
        found: Mapping[str, Tensor | None],
        *,
        point: Callable[[], Point],
        again: Callable[[Point], Mapping[str, Tensor | None]],
    ) -> dict[str, Tensor | None]:
        """Returns corrected quantities, under their names; None stays None.

        Args:
            group: the quantities that are estimated together, because they share one point.
            batches: those of this evaluation.
            found: their means over these batches.
            point: where they were taken.
            again: the same quantities on the same batches at another point.
        """
        given = _present(found)
        earlier: Callable[[], Quantities] | None = None
        if self.estimator.uses_earlier_point:
            start = f"{group}/at/"
            kept = {
                key.removeprefix(start): tensor
                for key, tensor in self.memory.tensors.items()
                if key.startswith(start)
            }
            if kept:
                earlier = _Earlier(again, kept)
            for key, tensor in point().items():
                self.memory.keep(start + key, tensor)
        corrected = self.estimator.estimate(self.memory, group, batches, given, earlier)
        if corrected.keys() != given.keys():
            raise ConfigurationError(
                f"The estimator {self.estimator.name!r} of problem {self.problem!r} returned the "
                f"quantities {sorted(corrected)} for {sorted(given)}. Return every quantity given."
            )
        return {name: corrected.get(name) for name in found}


@dataclass(frozen=True)
class _Earlier:
    """Takes quantities again at a point that was kept."""

    again: Callable[[Point], Mapping[str, Tensor | None]]
    point: Point

    def __call__(self) -> Quantities:
        return _present(self.again(self.point))


def _present(found: Mapping[str, Tensor | None]) -> Quantities:
    return {name: value.detach() for name, value in found.items() if value is not None}


_ESTIMATORS: dict[str, type[Estimator]] = {"saga": Saga, "spider": Spider, "storm": Storm}


def estimator_from(problem: str, choice: Estimator | str | None) -> Estimator | None:
    """Makes an estimator from its name; an estimator stays.

    Raises:
        ProblemError: for anything else.
    """
    if choice is None or isinstance(choice, Estimator):
        return choice
    if choice in _ESTIMATORS:
        return _ESTIMATORS[choice]()
    raise ProblemError(
        f"Problem {problem!r}: estimator must be an mlo.Estimator or one of their names, got "
        f"{choice!r}. {nearest(str(choice), _ESTIMATORS)}"
    )
