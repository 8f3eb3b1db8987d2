"""Tensors in the containers that users build (dicts, lists, tuples), and sums with None as zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "add",
    "in_new_containers",
    "map_tensors",
    "tensors_of",
    "versions_of",
    "zeros_for_none",
]


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Rebuilds dicts, lists and tuples with every tensor in them mapped."""
    # A dict is copied first, which keeps its class; a named tuple takes its entries one by one.
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        rebuilt = copy.copy(value)
        for key, entry in value.items():
            rebuilt[key] = map_tensors(entry, function)
        return rebuilt
    if isinstance(value, list):
        return [map_tensors(entry, function) for entry in value]
    if isinstance(value, tuple):
        entries = [map_tensors(entry, function) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def in_new_containers(value: Any) -> Any:
    """The same tensors in new containers, which their receiver may change."""
    # (A tuple of tensors cannot be changed.)
    if type(value) is tuple and all([isinstance(entry, Tensor) for entry in value]):
        return value
    return map_tensors(value, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in it."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, dict):
        for entry in value.values():
            _collect(entry, found)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            if isinstance(entry, Tensor):
                found.append(entry)
            else:
                _collect(entry, found)


def versions_of(value: Any) -> tuple[int, ...]:
    """The in-place version of every tensor in it."""
    # PyTorch counts the changes of a tensor, except of one made in inference mode.
    return tuple([0 if tensor.is_inference() else tensor._version for tensor in tensors_of(value)])


def zeros_for_none(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """`found`, with zeros of the shape of the tensor in `like` where an entry is None."""
    return [
        torch.zeros_like(t) if entry is None else entry
        for entry, t in zip(found, like, strict=True)
    ]


def add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None stands for zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other
