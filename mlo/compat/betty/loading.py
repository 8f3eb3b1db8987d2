"""Endless batches of a loader, with a position that can be saved, as Betty draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlo.errors import CheckpointError, ProblemError
from mlo.randomness import RandomState, replayed

__all__ = ["Passes", "moved"]


class Passes:
    """Draws the batches of a loader, pass after pass.

    A pass begins when the previous one has ended, and the first one at once, as in Betty. So a
    shuffling loader draws the same random numbers at the same time.

    Args:
        loader: an iterable of batches.
        problem: whose, for messages.
        ended: called at the end of each pass.
        share: (rank, number of processes): of each such number of batches, one is given out.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        problem: str,
        ended: Callable[[], None],
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.loader, self._problem, self._ended, self._share = loader, problem, ended, share
        self._generators = _generators(loader)
        self._begin()

    def next(self) -> Any:
        """The next batch.

        Raises:
            ProblemError: if the loader is empty.
        """
        rank, processes = self._share
        drawn = [self._draw() for _ in range(processes)]
        return drawn[rank]

    def _begin(self) -> None:
        # A loader draws a seed when its iterator is made, and its order at the first batch.
        self._at_begin = RandomState.capture(self._generators)
        self._at_first: RandomState | None = None
        self._iterator: Iterator[Any] = iter(self.loader)
        self._taken = 0

    def _draw(self) -> Any:
        if self._at_first is None:
            self._at_first = RandomState.capture(self._generators)
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._taken == 0:
                raise ProblemError(
                    f"Problem {self._problem!r}: its train_data_loader yielded no batch. Pass one "
                    "that can be iterated again, such as a DataLoader or a list of batches."
                ) from None
            self._ended()
            self._begin()
            return self._draw()
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as tensors and plain values."""
        first = self._at_first
        return {
            "at_begin": self._at_begin.state_dict(),
            "at_first": None if first is None else first.state_dict(),
            "taken": self._taken,
            "generators": [generator.get_state() for generator in self._generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position; leaves the global random state as it is.

        Raises:
            CheckpointError: if the loader is shorter than it was.
        """
        begin = RandomState.from_state_dict(state["at_begin"])
        with replayed(begin, self._generators):
            self._begin()
            if state["at_first"] is not None:
                first = RandomState.from_state_dict(state["at_first"])
                first.restore(self._generators)
                self._at_first = first
            for _ in range(state["taken"]):
                if next(self._iterator, self) is self:  # `self` is no batch: it has ended
                    raise CheckpointError(
                        f"Problem {self._problem!r}: the state was saved {state['taken']} batches "
                        f"into a pass of its loader, which has only {self._taken} now. Resume with "
                        "the data that the run began with."
                    )
                self._taken += 1
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved)


def moved(batch: Any, device: Any) -> Any:
    """A batch on a device, as Betty gives it: the same dict, or else a tuple of the entries."""
    if isinstance(batch, dict):
        for key, value in batch.items():
            batch[key] = value.to(device) if isinstance(value, Tensor) else value
        return batch
    return tuple([value.to(device) if isinstance(value, Tensor) else value for value in batch])


def _generators(loader: Any) -> tuple[torch.Generator, ...]:
    """The generators that a DataLoader, or its sampler, draws its order from."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return tuple(unique.values())
