"""The memory of a GPU without a GPU: work on PyTorch's meta device, with every storage counted.

Tensors of the meta device have a shape and a type but no numbers, so a round of a search at the
paper's size takes seconds and no memory. Each result of an operation is counted for as long as it
lives, which is as long as on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["BLOCK", "MemoryCount"]

BLOCK = 512
"""PyTorch's CUDA allocator hands out whole multiples of so many bytes."""

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default)
"""Operations that bring numbers to the CPU: a single one (`item`), or a tensor (`cpu`, `tolist`).
"""


class MemoryCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages on the meta device that are made while it is active.

    A number that is read there counts as 1, true or one of each kind. So a loss is finite, and a
    solver that stops at a tolerance makes as many steps as it may, which takes the most memory.

    Tensors are counted, in blocks as the CUDA allocator rounds them. Memory without a tensor is not
    counted: CUDA's context, the workspaces of cuDNN and cuBLAS, gaps between blocks, and temporary
    buffers inside operations.

    Attributes:
        held: bytes of the storages that are alive.
        peak: the largest `held` since the beginning or the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        # A storage is one object for as long as any tensor has it.
        self._known: Any = WeakIdKeyDictionary()

    def restart(self) -> None:
        """Restarts the peak at what is held."""
        self.peak = self.held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls an operation and counts what it made."""
        if func in READS and (read := _read(args, kwargs or {})) is not None:
            return read
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[storage] = weakref.ref(storage, self._forgets(size))
        self.held += size
        self.peak = max(self.peak, self.held)

    def _forgets(self, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self.held -= size

        return forget


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is read of a tensor on the meta device; None if nothing is."""
    tensor = args[0]
    if tensor.device.type != "meta":
        return None
    if not kwargs:  # a single number
        return torch.ones((), dtype=tensor.dtype).item()
    where = kwargs.get("device")
    if where is None or torch.device(where).type != "cpu":
        return None
    return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
