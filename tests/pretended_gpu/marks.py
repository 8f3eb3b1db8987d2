"""Where a tensor says it is: a mark on its storage, which every view shares.

The numbers are in the memory of the CPU. PyTorch keeps the Python object of a storage as long as
the storage itself, so an attribute of that object is the mark.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["CUDA", "Place", "is_on_gpu", "mark", "place_of", "shares_storage", "wants_gpu"]

Place = Literal["cpu", "pinned", "cuda"]

CUDA = torch.device("cuda", 0)

UNTYPED_STORAGE = torch.Tensor.untyped_storage


def place_of(tensor: Tensor) -> Place | None:
    """Where it is; None where it was made by C++ code that had no operand and no device."""
    storage = _storage(tensor)
    return None if storage is None else getattr(storage, "place", None)


def mark(tensor: Tensor, place: Place | None) -> Tensor:
    """Says where it is, with all that shares its storage; returns it."""
    storage = _storage(tensor)
    if storage is not None and place is not None:
        storage.place = place  # type: ignore[attr-defined]
    return tensor


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether it says that it is on the pretended GPU."""
    return place_of(tensor) == "cuda"


def wants_gpu(device: torch.device | str | int | None) -> bool | None:
    """Whether an argument `device` names a GPU; None where it names nothing."""
    if device is None:
        return None
    return isinstance(device, int) or torch.device(device).type == "cuda"


def shares_storage(tensor: Tensor, others: list[Tensor]) -> bool:
    """Whether it is a view of one of them, or one of them."""
    storage = _storage(tensor)
    return storage is None or any(storage is _storage(other) for other in others)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Its storage; None where it has none, as a sparse one or one of a function transform."""
    try:
        return UNTYPED_STORAGE(tensor)
    except (NotImplementedError, RuntimeError):
        return None
