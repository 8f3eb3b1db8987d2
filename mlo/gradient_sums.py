"""Averages a loss and its first derivatives: over the batches of an evaluation, over processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlo.backward import grad
from mlo.distributed import DataParallel
from mlo.errors import ProblemError
from mlo.loss_errors import explain_undifferentiated
from mlo.loss_results import is_number
from mlo.problem import Problem
from mlo.randomness import RandomState
from mlo.sharding import is_sharded
from mlo.tensors import add_all

__all__ = ["GradientSums", "MetricKinds", "check_dense", "share_of"]

MetricKinds = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → shape and dtype of a metric that is averaged."""


class GradientSums:
    """A loss and its first derivatives, averaged over the batches of one evaluation.

    Args:
        problem: whose loss.
        batches: how many are averaged.
        leaves: the other tensors with respect to which it is differentiated.
        kinds: the metrics on which the processes have agreed; `average` changes it.

    Attributes:
        losses: player → loss.
        metrics: what the loss returned beside it.
        direct: player → gradient in each of its parameters; None where the loss does not depend on
            the parameter.
        cotangents: player → gradient in each leaf, likewise.
        has_derivative: whether every loss had a derivative at all.
        random_states: the random state before each batch.
    """

    def __init__(
        self,
        problem: Problem,
        batches: int,
        leaves: Sequence[Tensor],
        kinds: MetricKinds | None = None,
    ) -> None:
        self._problem, self._batches, self._leaves = problem, batches, leaves
        self._kinds: MetricKinds = {} if kinds is None else kinds
        self._counts: dict[str, int] = {}
        self.losses: dict[str, Tensor] = {}
        self.metrics: dict[str, Any] = {}
        self.direct: dict[str, list[Tensor | None]] = {}
        self.cotangents: dict[str, list[Tensor | None]] = {}
        self.has_derivative = True
        self.random_states: list[RandomState] = []

    def add(
        self,
        player: str,
        loss: Tensor,
        own: Sequence[Tensor],
        *,
        retain_graph: bool,
        create_graph: bool,
    ) -> None:
        """Adds one batch's loss of a player, and its gradients.

        Raises:
            ProblemError: if a gradient is sparse.
        """
        share = loss if self._batches == 1 else share_of(loss, self._batches)
        inputs = [*own, *self._leaves]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if share.requires_grad:
            # One backward pass for both: own parameters, and the other tensors to differentiate by.
            try:
                found = grad([share], inputs, retain_graph=retain_graph, create_graph=create_graph)
            except RuntimeError as error:
                explain_undifferentiated(error, self._problem.name)
                raise
            check_dense(self._problem.name, found)

        self.has_derivative &= any(entry is not None for entry in found)

        # The sum over the batches; each has contributed its share of the mean.
        direct, cotangents, detached = found[: len(own)], found[len(own) :], share.detach()
        if share.is_leaf or share._is_view():  # a parameter, perhaps, which is about to move
            detached = detached.clone()
        if player not in self.losses:
            self.direct[player], self.cotangents[player] = list(direct), list(cotangents)
            self.losses[player] = detached
            return
        self.direct[player] = add_all(self.direct[player], direct)
        self.cotangents[player] = add_all(self.cotangents[player], cotangents)
        self.losses[player] = self.losses[player] + detached

    def replaced(
        self,
        direct: dict[str, list[Tensor | None]],
        cotangents: dict[str, list[Tensor | None]],
    ) -> GradientSums:
        """The same sums with other derivatives."""
        found = copy.copy(self)
        found.direct, found.cotangents = direct, cotangents
        return found

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds a batch's metrics.

        Numbers are averaged over the batches that returned them. Of anything else (a count, a
        string) the last value stays.
        """
        for key, value in metrics.items():
            count = self._counts.get(key, 0) if is_number(value) else 0
            if count:
                value = (self.metrics[key] * count + value) / (count + 1)
            self.metrics[key] = value
            self._counts[key] = count + 1 if is_number(value) else 0

    def average(
        self,
        parallel: DataParallel,
        statistics: Sequence[Tensor],
        *,
        gradient: dict[str, Tensor | None] | None = None,
    ) -> None:
        """Averages everything over the processes, in one reduction.

        Args:
            parallel: the processes.
            statistics: running statistics of BatchNorm layers, averaged in place.
            gradient: parameter → total gradient, averaged instead of its terms.
        """
        # Every tensor is listed with its place, to which its mean is written back.
        entries = self._gradient_entries() if gradient is None else self._total_entries(gradient)
        entries += [_Entry(self.losses, player, loss) for player, loss in self.losses.items()]
        # Not all processes need return the same metrics, but all must reduce the same buffers. So
        # they reduce those on which they have agreed, and whether a process has another one.
        numbers = self._numbers()
        known = _MetricSums(numbers, self._kinds, self._problem.device)
        entries += known.entries
        others = any(self._kinds.get(key) != _kind(value) for key, value in numbers.items())
        flag = {"others": torch.full_like(next(iter(self.losses.values())), float(others))}
        entries.append(_Entry(flag, "others", flag["others"]))
        moving = list(statistics)
        entries += [_Entry(moving, index, value) for index, value in enumerate(statistics)]
        # Not sharded tensors, which the reduce-scatter of their backward pass has averaged already.
        entries = [entry for entry in entries if not is_sharded(entry.like)]
        _reduce(parallel, entries)
        with torch.no_grad():
            for statistic, mean in zip(statistics, moving, strict=True):
                statistic.copy_(mean)
        self.metrics |= known.means()
        if float(flag["others"]) > 0.0:
            fresh = self._agree(parallel, numbers)
            added = _MetricSums(numbers, fresh, self._problem.device)
            _reduce(parallel, added.entries)
            self.metrics |= added.means()

    def _numbers(self) -> dict[str, Tensor]:
        """The metrics that are averaged, as tensors where the problem is."""
        return {
            key: torch.as_tensor(value, device=self._problem.device)
            for key, value in self.metrics.items()
            if is_number(value)
        }

    def _agree(self, parallel: DataParallel, numbers: Mapping[str, Tensor]) -> MetricKinds:
        """Agrees with the other processes on all metrics; returns those that are new or changed.

        Raises:
            ProblemError: on all processes, if a metric has different shapes or dtypes.
        """
        own = {key: _kind(value) for key, value in numbers.items()}
        agreed: MetricKinds = {}
        for rank, theirs in enumerate(parallel.gather_objects(own)):
            for key, kind in theirs.items():
                if agreed.setdefault(key, kind) != kind:
                    raise ProblemError(
                        f"The loss of problem {self._problem.name!r} returned the metric {key!r} "
                        f"as {_of_kind(kind)} on process {rank} and as {_of_kind(agreed[key])} on "
                        "another. It is averaged over the processes: return the same shape and "
                        "dtype on all."
                    )
        fresh = {key: kind for key, kind in agreed.items() if self._kinds.get(key) != kind}
        self._kinds.update(fresh)
        return fresh

    def _gradient_entries(self) -> list[_Entry]:
        entries: list[_Entry] = []
        for player, terms in self.direct.items():
            names = self._problem.player_parameters[player]
            like = [self._problem.parameters[name] for name in names]
            entries += [_Entry(terms, index, parameter) for index, parameter in enumerate(like)]
        for terms in self.cotangents.values():
            entries += [_Entry(terms, index, leaf) for index, leaf in enumerate(self._leaves)]
        return entries

    def _total_entries(self, gradient: dict[str, Tensor | None]) -> list[_Entry]:
        for key in self._problem.parameters:
            gradient.setdefault(key, None)
        return [_Entry(gradient, key, p) for key, p in self._problem.parameters.items()]


class _Entry(NamedTuple):
    """One averaged tensor: where it is kept, and a tensor of its shape."""

    within: Any
    key: Any
    like: Tensor


class _MetricSums:
    """Metrics in a reduction, each with the share of the processes that returned it.

    Args:
        numbers: those of this process.
        kinds: those of all processes.
        device: where the problem is.

    Attributes:
        entries: what is reduced.
    """

    def __init__(
        self, numbers: Mapping[str, Tensor], kinds: MetricKinds, device: torch.device
    ) -> None:
        self._sums: dict[str, Tensor | None] = {}
        self._shares: dict[str, Tensor | None] = {}
        self.entries: list[_Entry] = []
        for key in sorted(kinds):
            shape, dtype = kinds[key]
            one = torch.ones((), dtype=dtype, device=device)
            has = key in numbers and _kind(numbers[key]) == kinds[key]
            self._sums[key] = numbers[key] if has else None
            self._shares[key] = one if has else None
            self.entries.append(_Entry(self._sums, key, one.expand(shape)))
            self.entries.append(_Entry(self._shares, key, one))

    def means(self) -> dict[str, Tensor]:
        """After the reduction: name → mean over the processes that returned it."""
        found: dict[str, Tensor] = {}
        for key, total in self._sums.items():
            share = self._shares[key]
            if total is not None and share is not None:
                found[key] = total / share
        return found


def _reduce(parallel: DataParallel, entries: Sequence[_Entry]) -> None:
    """Writes the means over the processes to the entries' places."""
    means = parallel.average(
        [entry.within[entry.key] for entry in entries], [entry.like for entry in entries]
    )
    for entry, mean in zip(entries, means, strict=True):
        entry.within[entry.key] = mean


def _kind(value: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(value.shape), value.dtype


def _of_kind(kind: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{kind[1]} of shape {kind[0]}"


def check_dense(problem: str, found: Iterable[Tensor | None]) -> None:
    """Refuses derivatives of a problem's loss that are sparse.

    Raises:
        ProblemError: with what to do.
    """
    for gradient in found:
        if gradient is not None and gradient.layout != torch.strided:
            raise ProblemError(
                f"Problem {problem!r}: its loss has sparse gradients, which no engine supports. "
                "Build embeddings with sparse=False."
            )


def share_of(value: Any, count: int) -> Any:
    """What one of that many batches adds to a mean; a single batch adds its value unchanged."""
    return value if count == 1 else value / count
