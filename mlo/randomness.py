"""Captures and replays random state, so that a re-evaluated loss draws the same numbers again.

A finite difference of two passes with different dropout masks measures the masks, not the
curvature. So every re-evaluation of a loss inside a hypergradient runs under the random state of
the evaluation that it repeats.
"""

from __future__ import annotations

import _random
import ctypes
import hashlib
import random
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlo.errors import CheckpointError

__all__ = ["RandomState", "forked", "preserved", "replayed"]

MERSENNE_WORDS = 624
"""Number of 32-bit words in a Mersenne Twister's state."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomState:
    """The states of all global random sources, and of the generators that the user named.

    Attributes:
        cpu: of torch's global generator on the CPU.
        cuda: index of a GPU → state of its global generator.
        python: of `random`.
        numpy: of numpy's global generator.
        generators: of the generators that the user named.
    """

    cpu: Tensor
    cuda: dict[int, Tensor]
    python: tuple[Any, ...]
    numpy: dict[str, Any]
    generators: tuple[Tensor, ...] = ()

    @classmethod
    def capture(cls, generators: Sequence[torch.Generator] = ()) -> RandomState:
        """Copies the current state of torch (CPU, CUDA), numpy, `random` and `generators`."""
        # Asking for CUDA's states would start CUDA.
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            cpu=torch.default_generator.get_state(),
            cuda=dict(enumerate(torch.cuda.get_rng_state_all())) if started else {},
            python=_PYTHON.read(),
            numpy=_NUMPY.read(),
            generators=tuple([g.get_state() for g in generators]) if generators else (),
        )

    def restore(self, generators: Sequence[torch.Generator] = ()) -> None:
        """Puts the captured state back.

        Raises:
            ValueError: if `generators` are not as many as were captured.
        """
        torch.default_generator.set_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)
        _PYTHON.write(self.python)
        _NUMPY.write(self.numpy)
        for generator, state in zip(generators, self.generators, strict=True):
            generator.set_state(state)

    def state_dict(self, gpus: Sequence[int] | None = None) -> dict[str, Any]:
        """Returns the state as tensors and plain values, loadable with `weights_only=True`.

        Only the given GPUs are in it, without their indices. Processes that share noise have equal
        states, each on its own GPU, and each resumes on the GPU that it then has.

        Args:
            gpus: indices of the run's own GPUs; None: the current one.

        Raises:
            CheckpointError: if numpy's global generator is not its own kind.
        """
        if self.numpy["bit_generator"] != "MT19937":
            raise CheckpointError(
                f"numpy's global generator is a {self.numpy['bit_generator']}, whose state cannot "
                "be saved. Use numpy's default, MT19937."
            )
        # In tensors, lists and numbers, which can be loaded without unpickling code.
        version, words, gauss = self.python
        inner = self.numpy["state"]
        return {
            "cpu": self.cpu.clone(),
            "cuda": [self.cuda[index].clone() for index in _own(gpus) if index in self.cuda],
            "python": {"version": version, "words": list(words), "gauss": gauss},
            "numpy": {
                "bit_generator": self.numpy["bit_generator"],
                "key": torch.from_numpy(inner["key"].astype(np.int64)),
                "pos": int(inner["pos"]),
                "has_gauss": int(self.numpy["has_gauss"]),
                "gauss": float(self.numpy["gauss"]),
            },
            "generators": [state.clone() for state in self.generators],
        }

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], gpus: Sequence[int] | None = None
    ) -> RandomState:
        """Rebuilds a state from what `state_dict` returned.

        Args:
            state: the state.
            gpus: indices of the run's own GPUs now, in the order in which they were saved.

        Raises:
            ValueError: if it is not one, naming the entry, or numpy could not take it.
        """
        _check_saved(state)
        python, numpy = state["python"], state["numpy"]
        # numpy takes any position, and would read there.
        if not 0 <= numpy["pos"] <= MERSENNE_WORDS:
            raise ValueError(f"numpy's position is {numpy['pos']}, of {MERSENNE_WORDS} words")
        return cls(
            cpu=state["cpu"],
            cuda=dict(zip(_own(gpus), state["cuda"], strict=False)),
            python=(python["version"], tuple(python["words"]), python["gauss"]),
            numpy={
                "bit_generator": numpy["bit_generator"],
                "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            },
            generators=tuple(state["generators"]),
        )


def _check_saved(state: Any) -> None:
    """Checks what `state_dict` returned, which a file may have held, before any of it is used.

    Raises:
        ValueError: naming the first entry that is missing or of another kind.
    """
    for where, entries in ((), OF_STATE), (("python",), OF_PYTHON), (("numpy",), OF_NUMPY):
        found = state
        for key in where:
            found = found[key]
        _check_entries(".".join(where), found, entries)
    for name in ("cuda", "generators"):
        if not all(isinstance(entry, Tensor) for entry in state[name]):
            raise ValueError(f"its {name} are no list of tensors")
    # (Python keeps its position behind the words.)
    words = state["python"]["words"]
    if len(words) != MERSENNE_WORDS + 1 or not all(_is_whole(word) for word in words):
        raise ValueError(f"its python.words are not {MERSENNE_WORDS + 1} whole numbers")
    key = state["numpy"]["key"]
    if key.shape != (MERSENNE_WORDS,) or key.is_floating_point() or key.is_complex():
        raise ValueError(f"its numpy.key is no tensor of {MERSENNE_WORDS} whole numbers")


def _check_entries(where: str, found: Any, entries: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{f'its {where}' if where else 'it'} is a {type(found).__name__}")  # noqa: TRY004
    for key, kinds in entries.items():
        if key not in found:
            raise ValueError(f"it lacks {where and f'{where}.'}{key}")
        if not isinstance(found[key], kinds) or isinstance(found[key], bool):
            got = type(found[key]).__name__
            raise ValueError(f"its {where and f'{where}.'}{key} is a {got}")  # noqa: TRY004


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


OF_STATE = {
    "cpu": (Tensor,),
    "cuda": (list, tuple),
    "python": (Mapping,),
    "numpy": (Mapping,),
    "generators": (list, tuple),
}
OF_PYTHON = {"version": (int,), "words": (list, tuple), "gauss": (float, type(None))}
OF_NUMPY = {
    "bit_generator": (str,),
    "key": (Tensor,),
    "pos": (int,),
    "has_gauss": (int,),
    "gauss": (float, int),
}
"""Entries of a saved random state, of Python's in it and of numpy's → what they may be."""


def _own(gpus: Sequence[int] | None) -> Sequence[int]:
    """The indices of the run's own GPUs; by default the current one, if CUDA was started."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ()
    return (torch.cuda.current_device(),) if gpus is None else gpus


class _Kept(ABC):
    """The state of a generator, read and written in full only after it has moved.

    Python's and numpy's generators are Mersenne Twisters of 624 words. To read them in full takes
    15 and 40 µs, and to write them as long, several times per update. Their memory is compared in
    0.1 µs. Every draw changes it, except one that only uses up a cached second normal deviate.
    """

    def __init__(self) -> None:
        self._last: Any = None
        self._words: bytes | None = None

    @abstractmethod
    def _get(self) -> Any:
        """The state in full."""

    @abstractmethod
    def _set(self, state: Any) -> None:
        """Goes back to a state."""

    @abstractmethod
    def _peek(self) -> bytes | None:
        """The generator's memory; None if it does not show whether the state has moved."""

    def read(self) -> Any:
        """The state; the same object as long as nothing was drawn."""
        words = self._peek()
        if words is None or words != self._words:
            self._last, self._words = self._get(), words
        return self._last

    def write(self, state: Any) -> None:
        """Goes back to a state."""
        words = self._peek()
        if words is None or words != self._words or state is not self._last:
            self._set(state)
            self._last, self._words = state, self._peek()


class _NumpyState(_Kept):
    """The state of numpy's global generator."""

    SIZE = (MERSENNE_WORDS + 1) * 4  # the words and the position

    def __init__(self) -> None:
        super().__init__()
        self._generator: Any = None
        self._memory: Any = None

    def _get(self) -> dict[str, Any]:
        return np.random.get_state(legacy=False)

    def _set(self, state: dict[str, Any]) -> None:
        np.random.set_state(state)

    def read(self) -> Any:
        # (Not by `super()`, since this is done several times per update.)
        words = self._peek()
        if words is None or words != self._words:
            self._last, self._words = self._get(), words
        if self._last["has_gauss"]:  # the next draw may leave the words alone
            self._words = None
        return self._last

    def write(self, state: dict[str, Any]) -> None:
        super().write(state)
        if state["has_gauss"]:
            self._words = None

    def _peek(self) -> bytes | None:
        # Public, but not in the stubs. Another generator may take its place.
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if generator is not self._generator:
            self._generator, self._memory = generator, None
            if isinstance(generator, np.random.MT19937):
                address = generator.ctypes.state_address
                self._memory = (ctypes.c_char * self.SIZE).from_address(address)
        return None if self._memory is None else self._memory.raw


class _PythonState(_Kept):
    """The state of the module `random`."""

    def __init__(self) -> None:
        super().__init__()
        self._owner = random.getstate.__self__  # type: ignore[attr-defined]
        self._memory = _memory_of(self._owner)

    def _get(self) -> tuple[Any, ...]:
        return random.getstate()

    def _set(self, state: tuple[Any, ...]) -> None:
        random.setstate(state)

    def read(self) -> Any:
        # (As `_Kept.read`, without a call for each of its parts.)
        if self._memory is None or self._owner.gauss_next is not None:
            return super().read()
        words = self._memory.raw
        if words != self._words:
            self._last, self._words = self._get(), words
        return self._last

    def _peek(self) -> bytes | None:
        if self._memory is None or self._owner.gauss_next is not None:
            return None
        return self._memory.raw  # type: ignore[no-any-return]


def _memory_of(owner: random.Random) -> Any:
    """The memory behind the head of Python's generator; None where its words are not in there."""
    if sys.implementation.name != "cpython":
        return None
    head = object.__basicsize__
    size = _random.Random.__basicsize__ - head
    memory = (ctypes.c_char * size).from_address(id(owner) + head)
    words = owner.getstate()[1][:-1]
    return memory if struct.pack(f"={len(words)}I", *words) in memory.raw else None


_NUMPY, _PYTHON = _NumpyState(), _PythonState()


class _Preserved:
    """A context that leaves every random source as it was, and may start from a given state.

    (A class takes a third of the time of a generator with `contextmanager`.)
    """

    __slots__ = ("_before", "_generators", "_state")

    def __init__(self, state: RandomState | None, generators: Sequence[torch.Generator]) -> None:
        self._state, self._generators = state, generators

    def __enter__(self) -> None:
        self._before = RandomState.capture(self._generators)
        if self._state is not None:
            try:
                self._state.restore(self._generators)
            except BaseException:
                self._before.restore(self._generators)
                raise

    def __exit__(self, *_: object) -> None:
        self._before.restore(self._generators)


def preserved(generators: Sequence[torch.Generator] = ()) -> AbstractContextManager[None]:
    """Runs the body and leaves every random source as it was before."""
    return _Preserved(None, generators)


def replayed(
    state: RandomState, generators: Sequence[torch.Generator] = ()
) -> AbstractContextManager[None]:
    """Runs the body under `state` and leaves every random source as it was before."""
    return _Preserved(state, generators)


@contextmanager
def forked(branch: int, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Runs the body under a random state that is different for each `branch`.

    It takes one number from torch's global generator. Processes that were in the same state before
    are in the same state afterwards, whatever the body draws.
    """
    seed = int(torch.randint(2**62, ()))
    with preserved(generators):
        digests = [
            hashlib.sha256(repr((seed, branch, k)).encode()).digest()
            for k in range(1 + len(generators))
        ]
        # Hashed, so that neither neighbouring seeds nor neighbouring branches are alike.
        own, *others = [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]
        torch.manual_seed(own)  # CUDA's generators as well
        random.seed(own)
        np.random.seed(own % 2**32)
        for generator, value in zip(generators, others, strict=True):
            generator.manual_seed(value)
        yield
