"""Predicts from one evaluation whether the graph of a gradient fits its device's memory.

The rule gives the same answer at every start on the same kind of device: it uses the device's total
memory, not the memory that happens to be free.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["NotCountable", "SavedBytes", "fits", "memory_of", "refuses_counting"]

P = ParamSpec("P")
R = TypeVar("R")

PER_FORWARD = 3
"""Estimated size of a gradient's graph, in multiples of what the forward pass saves.

One for the forward pass itself, and two for the backward pass.
"""

SHARE = 4
"""How often the graph must fit: twice, plus as much again for everything else."""


class NotCountable(Exception):
    """A loss that cannot be evaluated while its saved bytes are counted; it can be without."""


def refuses_counting(error: BaseException) -> bool:
    """Whether an error says that hooks on saved tensors are not allowed.

    `torch.func.grad`, `vjp`, `jacrev` and `hessian` forbid them.
    """
    return isinstance(error, RuntimeError) and "saved tensor hooks" in str(error)


class SavedBytes:
    """A context that counts the bytes that autograd saves in it, each storage once.

    Args:
        known: tensors that are there anyway, such as parameters.

    Attributes:
        total: bytes so far; infinite if a tensor could not be counted.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.total: float = 0

    def apart(self, function: Callable[P, R]) -> Callable[P, R]:
        """A function that does the same, and is not counted."""

        def uncounted(*args: P.args, **kwargs: P.kwargs) -> R:
            self._hooks.__exit__(None, None, None)
            try:
                return function(*args, **kwargs)
            finally:
                self._hooks.__enter__()

        return uncounted

    def counted(self, function: Callable[P, R]) -> Callable[P, R]:
        """A function that does the same, and is counted."""

        def inside(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return inside

    def _pack(self, tensor: Tensor) -> Tensor:
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            try:
                place = storage.data_ptr()
            except RuntimeError:  # a tensor within `torch.func.jvp` has no storage to look at
                self.total = math.inf
                return tensor
            if place not in self._seen:
                self._seen.add(place)
                self.total += storage.nbytes()
        return tensor

    @staticmethod
    def _unpack(tensor: Tensor) -> Tensor:
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)


def memory_of(device: torch.device) -> int:
    """The bytes of memory that a device has; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    return 0


def fits(saved: float, device: torch.device) -> bool:
    """Whether to keep the graph of a gradient whose forward pass saves that number of bytes.

    It is not kept if the device's memory is unknown, as for the meta device.
    """
    memory = memory_of(device)
    return memory > 0 and SHARE * PER_FORWARD * saved <= memory
