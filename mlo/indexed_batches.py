"""Batches that know their samples: fixed blocks of a data set, and all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mlo.errors import ProblemError

__all__ = ["IndexedBatch", "IndexedBatches"]


class IndexedBatch(NamedTuple):
    """A batch of a data set that is divided into blocks; a loss unpacks it.

    Attributes:
        number: which block it is, from 0; None: the batch is the whole data set.
        tensors: its rows of each tensor of the data set.
    """

    number: int | None
    tensors: tuple[Tensor, ...]


class IndexedBatches:
    """Yields the blocks of a data set in random order, pass after pass.

    The rows `k * batch_size` to `(k + 1) * batch_size` are block k, in every pass. So an estimator
    can compare a block's gradient with its last one (`Problem(estimator="saga")`).

    Args:
        tensors: the data set, with one row per sample in each of them.
        batch_size: rows per block. It divides the number of rows, so that the mean over blocks is
            the mean over samples.
        generator: what the order is drawn from; None: the global generator.
        whole_every: with q, a pass is the whole data set as one batch, then q − 1 blocks.
        whole_probability: with p, each batch is the whole data set with probability p. The first
            one always is.

    Raises:
        ProblemError: if the tensors cannot be divided so, or both kinds of whole batches are
            requested.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
        whole_every: int | None = None,
        whole_probability: float | None = None,
    ) -> None:
        rows = {len(tensor) for tensor in tensors}
        if len(rows) != 1:
            raise ProblemError(
                f"IndexedBatches needs tensors of equal length, got lengths {sorted(rows)}."
            )
        (self._rows,) = rows
        if batch_size < 1 or not self._rows or self._rows % batch_size:
            raise ProblemError(
                f"IndexedBatches: batch_size={batch_size} does not divide {self._rows} rows. Drop "
                "some rows, or choose another size: all blocks have the same weight."
            )
        if whole_every is not None and whole_probability is not None:
            raise ProblemError("IndexedBatches takes whole_every or whole_probability, not both.")
        if whole_every is not None and whole_every < 1:
            raise ProblemError(f"IndexedBatches: whole_every must be 1 or more, got {whole_every}.")
        if whole_probability is not None and not 0.0 < whole_probability <= 1.0:
            raise ProblemError(
                f"IndexedBatches: whole_probability must be above 0 and at most 1, got "
                f"{whole_probability}."
            )
        self.tensors, self.batch_size, self.generator = tensors, batch_size, generator
        self._every, self._probability = whole_every, whole_probability

    def __len__(self) -> int:
        """The number of blocks."""
        return self._rows // self.batch_size

    def block(self, number: int) -> IndexedBatch:
        """Returns one block."""
        start = number * self.batch_size
        rows = slice(start, start + self.batch_size)
        return IndexedBatch(number, tuple(tensor[rows] for tensor in self.tensors))

    def whole(self) -> IndexedBatch:
        """Returns the whole data set as one batch."""
        return IndexedBatch(None, self.tensors)

    def __iter__(self) -> Iterator[IndexedBatch]:
        """Makes one pass."""
        if self._every is None and self._probability is None:
            yield from map(self.block, self._order())
            return
        # A pass begins with the whole, and ends before the next whole one.
        yield self.whole()
        order: list[int] = []
        made = 1
        while not self._ends(made):
            order = order or self._order()
            yield self.block(order.pop())
            made += 1

    def _ends(self, made: int) -> bool:
        if self._probability is None:
            return made == self._every
        return float(torch.rand((), generator=self.generator)) < self._probability

    def _order(self) -> list[int]:
        return torch.randperm(len(self), generator=self.generator).tolist()
