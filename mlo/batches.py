"""An endless stream of batches whose position can be saved, restored and looked ahead from."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch

from mlo.errors import CheckpointError, CheckpointWarning, ProblemError, warn_user
from mlo.randomness import RandomState, preserved, replayed
from mlo.tensors import in_new_containers, tensors_of, versions_of

__all__ = ["BatchStream", "Taken"]


class Taken(NamedTuple):
    """Batches that were taken from a stream, which can put them back.

    Attributes:
        batches: in the order in which they were taken.
        positions: where the stream was before each of them.
    """

    batches: tuple[Any, ...]
    positions: tuple[Any, ...]


class _Position(NamedTuple):
    """Where a batch is in data that do not keep their own position.

    Attributes:
        pass_start: the random state in which its pass began; None before the first one.
        taken: how many batches of the pass are before it.
        continues: whether the workers of a loader were there already when the pass began.
        last: the batch before it; None for the first one of a pass.
    """

    pass_start: RandomState | None
    taken: int
    continues: bool
    last: Any

    def state_dict(self) -> dict[str, Any]:
        start = self.pass_start
        return {
            "taken": self.taken,
            "pass_start": None if start is None else start.state_dict(),
            "continues": self.continues,
            "last": _checksum(self.last),
        }


class BatchStream:
    """Draws batches from `data` forever.

    `data` with the methods `state_dict` and `load_state_dict` keeps its own position. It is asked
    for a copy of it before each batch. For any other iterable the stream remembers the random state
    in which the current pass began, and how many batches were taken since. A shuffling `DataLoader`
    draws its order from that state (or its generator's), so the position can be found again. An
    iterable whose passes differ in another way should keep its own position. Where it does not, the
    last batch that is drawn again is not the one that it was, and a warning says so.

    Args:
        data: an iterable of batches; None yields None forever.
        problem: name of the problem, for messages.
    """

    def __init__(self, data: Iterable[Any] | None, problem: str) -> None:
        self._data = data
        self._problem = problem
        self._iterator: Iterator[Any] | None = None
        # The position: the random state in which the pass began, and the batches taken since.
        # `_pending` holds batches that were taken from the data and are still to be given out, each
        # behind the position from which it can be taken again.
        self._taken = 0
        self._pass_start: RandomState | None = None
        self._continues = False
        self._last: Any = None
        self._pending: list[tuple[Any, Any]] = []
        self._generators = _generators(data)

    @cached_property
    def _keeps_position(self) -> bool:
        """Whether the data keep their own position; asked late, since asking may start workers."""
        return _keeps_position(self._data)

    def next(self) -> Any:
        """Takes the next batch; begins a new pass after the last one ended.

        Raises:
            ProblemError: if the data yields nothing.
        """
        return None if self._data is None else self._next()[1]

    def take(self, count: int) -> Taken:
        """Takes the next batches so that they can be put back; all of them or, if it fails, none.

        Raises:
            ProblemError: if the data yields nothing, or taking a batch changed an earlier one.
        """
        if self._data is None:
            return Taken(batches=(None,) * count, positions=(None,) * count)
        found: list[tuple[Any, Any]] = []
        # Data that refill one buffer change the previous batch, which shows in its versions.
        versions: list[tuple[int, ...]] = []
        try:
            for _ in range(count):
                found.append(self._next())
                versions.append(versions_of(found[-1][1]) if count > 1 else ())
        except BaseException:
            self._pending[:0] = found
            raise
        positions, batches = zip(*found, strict=True)
        if count > 1 and list(map(versions_of, batches)) != versions:
            raise ProblemError(
                f"Problem {self._problem!r}: a batch was changed in place after it was drawn; "
                "perhaps its data fill one buffer again and again. Yield new tensors "
                "(batch.clone()) or arrays (batch.copy())."
            )
        return Taken(batches=batches, positions=positions)

    def put_back(self, taken: Taken) -> None:
        """Puts the last batches back: they are the next ones again."""
        if self._data is not None:
            self._pending[:0] = zip(taken.positions, taken.batches, strict=True)

    def peek(self, count: int) -> tuple[Any, ...]:
        """Returns what the next `count` calls of `next` would give.

        Neither the position nor the random state changes.
        """
        if self._data is None:
            return (None,) * count
        pending, missing = self._pending, count - len(self._pending)
        if missing > 0 and isinstance(self._data, Iterator) and not self._keeps_position:
            # It cannot be iterated twice: what was taken is kept.
            pending += [self._from_data() for _ in range(missing)]
        ahead = [batch for _, batch in pending[:count]]
        if len(ahead) < count:
            # Batches are taken, and then the data's position is restored; nothing else finds the
            # same ones again.
            with preserved(self._generators):
                position = self._position_of_data()
                ahead += [self._from_data()[1] for _ in range(missing)]
                self._load_position(position)
        return tuple(ahead)

    def _next(self) -> tuple[Any, Any]:
        """The next batch, behind the position before it."""
        return self._pending.pop(0) if self._pending else self._from_data()

    def _from_data(self) -> tuple[Any, Any]:
        before = self._data.state_dict() if self._keeps_position else None  # type: ignore[union-attr]
        # Twice: at the end of a pass, once more from the start. A pass without a batch is an error.
        for _ in range(2):
            # (Compared with None: the truth value of a user's iterator may be its length, which may
            # be zero before the last batch, or an error.)
            iterator = self._begin_pass() if self._iterator is None else self._iterator
            try:
                batch = next(iterator)
            except StopIteration:
                self._iterator = None
                continue
            self._taken += 1
            # In containers of its own, since data may refill theirs.
            batch = in_new_containers(batch)
            if self._keeps_position:
                return before, batch
            position = _Position(self._pass_start, self._taken - 1, self._continues, self._last)
            self._last = batch
            return position, batch
        raise ProblemError(
            f"Problem {self._problem!r}: its data yielded no batch. It is an empty data set or an "
            "exhausted generator. Pass something that can be iterated again, such as a "
            "DataLoader or a list of batches."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, as tensors and plain Python values.

        It holds no batches: those that are pending are taken again from the position of the first
        one. (If a pass ended among them, the next pass of a shuffled order is another one.)
        """
        if not self._pending:
            return self._position_of_data()
        first = self._pending[0][0]
        return {"data": first} if self._keeps_position else self._saved(first)

    def _position_of_data(self) -> dict[str, Any]:
        """The position behind all batches that were taken from the data."""
        if self._keeps_position:
            return {"data": self._data.state_dict()}  # type: ignore[union-attr]
        return self._saved(_Position(self._pass_start, self._taken, self._continues, self._last))

    def _saved(self, position: _Position) -> dict[str, Any]:
        generators = [generator.get_state() for generator in self._generators]
        return {**position.state_dict(), "generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a position that `state_dict` returned; leaves the random state as it is.

        Raises:
            CheckpointError: if the data is shorter than the position.
        """
        self._pending = []
        self._load_position(state)

    def _load_position(self, state: dict[str, Any]) -> None:
        self._iterator = None
        if self._keeps_position:
            self._data.load_state_dict(state["data"])  # type: ignore[union-attr]
            return
        self._taken, self._last = 0, None
        if state["pass_start"] is None or self._data is None:
            self._pass_start = None
        else:
            self._replay(state)
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved)

    def _replay(self, state: dict[str, Any]) -> None:
        """Begins the pass of a saved position again, and takes as many batches as were taken."""
        self._match_workers(continues=state.get("continues", False))
        batch: Any = None
        with replayed(RandomState.from_state_dict(state["pass_start"]), self._generators):
            iterator = self._begin_pass()
            for _ in range(state["taken"]):
                batch = next(iterator, self)
                if batch is self:  # which is no batch: the data have ended
                    raise CheckpointError(
                        f"Problem {self._problem!r}: the checkpoint was taken after "
                        f"{state['taken']} batches of a pass, but its data yields only "
                        f"{self._taken}. Resume with the data that the run began with."
                    )
                self._taken += 1
        self._last = batch
        if state["taken"] and state.get("last") not in (None, _checksum(batch)):
            warn_user(
                f"Problem {self._problem!r}: its data gave another batch when they were read again "
                "from the same random state, so this run does not continue exactly as before. They "
                "draw their order, or what they do to the examples, from a random source of their "
                "own (a shuffle of a stream without a seed, workers that persist). Seed it the "
                "same in each pass, or give the data state_dict() and load_state_dict().",
                CheckpointWarning,
            )

    def _match_workers(self, *, continues: bool) -> None:
        """Starts the workers of a loader, or ends them, as they were when a pass began.

        With `persistent_workers=True` a loader keeps its iterator. What its first pass draws from
        the random state (a seed for the workers, then the order) is not what later ones draw.
        """
        if _persists(self._data) and continues != _is_open(self._data):
            if continues:
                with preserved(self._generators):
                    iter(self._data)  # type: ignore[arg-type]
            else:
                self._data._iterator = None  # type: ignore[union-attr]

    def _begin_pass(self) -> Iterator[Any]:
        # Before `iter`, which may draw the order of the whole pass.
        self._pass_start = RandomState.capture(self._generators)
        self._continues = _is_open(self._data)
        self._iterator = iter(self._data)  # type: ignore[arg-type]
        self._taken, self._last = 0, None
        return self._iterator


def _keeps_position(data: Any) -> bool:
    """Whether data can tell, and take, their position."""
    # (A Hugging Face IterableDataset begins every pass after a load at the position that was
    # loaded. Its passes are replayed.)
    if type(data).__module__.partition(".")[0] == "datasets":
        return False
    if not hasattr(data, "state_dict") or not hasattr(data, "load_state_dict"):
        return False
    try:  # Accelerate's loaders have both, and can do neither unless they are told to.
        data.state_dict()
    except (AttributeError, NotImplementedError):
        return False
    return True


def _persists(data: Any) -> bool:
    """Whether data are a loader whose workers live longer than a pass."""
    return bool(getattr(data, "persistent_workers", False) and getattr(data, "num_workers", 0))


def _is_open(data: Any) -> bool:
    """Whether such a loader has its workers already."""
    return _persists(data) and getattr(data, "_iterator", None) is not None


def _checksum(batch: Any) -> int:
    """A number that tells batches apart by what their tensors hold."""
    found = 0
    for tensor in tensors_of(batch):
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
        if plain and tensor.device.type != "meta" and not tensor.is_quantized:
            # A copy, since `numpy` shares the memory of a tensor, which `versions_of` notices.
            flat = tensor.detach().resolve_conj().resolve_neg().cpu()
            flat = flat.clone(memory_format=torch.contiguous_format).view(-1)
            found = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), found)
    return found


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
