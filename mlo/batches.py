"""An endless stream of batches whose position can be saved, restored and looked ahead from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from mlo.errors import CheckpointError, ProblemError
from mlo.randomness import RandomState, preserved, replayed

__all__ = ["BatchStream"]


class BatchStream:
    """Draws batches from `data` forever.

    `data` with the methods `state_dict` and `load_state_dict` keeps its own position. For any other
    iterable the stream remembers the random state in which the current pass began, and how many
    batches were taken since. A shuffling `DataLoader` draws its order from that state (or its
    generator's), so the position can be found again. An iterable whose passes differ in another way
    should keep its own position.

    Args:
        data: an iterable of batches; None yields None forever.
        problem: name of the problem, for messages.
    """

    def __init__(self, data: Iterable[Any] | None, problem: str) -> None:
        self._data = data
        self._problem = problem
        self._iterator: Iterator[Any] | None = None
        # The position: the random state in which the pass began, and the batches taken since.
        # `_pending` holds batches that were taken from the data and not yet given out.
        self._taken = 0
        self._pass_start: RandomState | None = None
        self._pending: list[Any] = []
        self._generators = _generators(data)
        self._keeps_position = hasattr(data, "state_dict") and hasattr(data, "load_state_dict")

    def next(self) -> Any:
        """Takes the next batch; begins a new pass after the last one ended.

        Raises:
            ProblemError: if the data yields nothing.
        """
        if self._data is None:
            return None
        if self._pending:
            return self._pending.pop(0)
        # Twice: at the end of a pass, once more from the start. A pass without a batch is an error.
        for _ in range(2):
            try:
                batch = next(self._iterator or self._begin_pass())
            except StopIteration:
                self._iterator = None
                continue
            self._taken += 1
            return batch
        raise ProblemError(
            f"Problem {self._problem!r}: its data yielded no batch. It is an empty data set or an "
            "exhausted generator. Pass something that can be iterated again, such as a "
            "DataLoader or a list of batches."
        )

    def put_back(self, batches: Sequence[Any]) -> None:
        """Puts the last batches back: they are the next ones again."""
        if self._data is not None:
            self._pending[:0] = batches

    def peek(self, count: int) -> tuple[Any, ...]:
        """Returns what the next `count` calls of `next` would give.

        Neither the position nor the random state changes.
        """
        if self._data is None:
            return (None,) * count
        if len(self._pending) >= count:
            return tuple(self._pending[:count])
        if isinstance(self._data, Iterator):  # cannot be iterated twice: keep what was taken
            self._pending += [self.next() for _ in range(count - len(self._pending))]
            return tuple(self._pending[:count])
        # Batches are taken, and then the position is restored; nothing else finds the same ones
        # again.
        with preserved(self._generators):
            position = self.state_dict()
            batches = tuple(self.next() for _ in range(count))
            self.load_state_dict(position)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, as tensors and plain Python values."""
        if self._keeps_position:
            return {"data": self._data.state_dict()}  # type: ignore[union-attr]
        start = self._pass_start
        return {
            # Batches of the previous pass that were put back then come with this pass.
            "taken": max(self._taken - len(self._pending), 0),
            "pass_start": None if start is None else start.state_dict(),
            "generators": [generator.get_state() for generator in self._generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position that `state_dict` returned; leaves the random state as it is.

        Raises:
            CheckpointError: if the data is shorter than the position.
        """
        self._pending = []
        self._iterator = None
        if self._keeps_position:
            self._data.load_state_dict(state["data"])  # type: ignore[union-attr]
            return
        self._taken = 0
        if state["pass_start"] is None or self._data is None:
            self._pass_start = None
        else:
            self._replay(state)
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved)

    def _replay(self, state: dict[str, Any]) -> None:
        """Begins the pass of a saved position again, and takes as many batches as were taken."""
        with replayed(RandomState.from_state_dict(state["pass_start"]), self._generators):
            iterator = self._begin_pass()
            for _ in range(state["taken"]):
                if next(iterator, self) is self:  # `self` is no batch: the data have ended
                    raise CheckpointError(
                        f"Problem {self._problem!r}: the checkpoint was taken after "
                        f"{state['taken']} batches of a pass, but its data yields only "
                        f"{self._taken}. Resume with the data that the run began with."
                    )
                self._taken += 1

    def _begin_pass(self) -> Iterator[Any]:
        # Before `iter`, which may draw the order of the whole pass.
        self._pass_start = RandomState.capture(self._generators)
        self._iterator = iter(self._data)  # type: ignore[arg-type]
        self._taken = 0
        return self._iterator


def _generators(data: Any) -> tuple[torch.Generator, ...]:
    """The generators that a DataLoader, or its sampler, draws its order from."""
    owners = (
        data,
        getattr(data, "sampler", None),
        getattr(getattr(data, "batch_sampler", None), "sampler", None),
    )
    found = [getattr(owner, "generator", None) for owner in owners]
    unique = {
        id(generator): generator for generator in found if isinstance(generator, torch.Generator)
    }
    return tuple(unique.values())
