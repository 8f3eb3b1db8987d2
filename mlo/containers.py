"""Batches and other values as users build them: dicts, lists and tuples, with tensors in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["map_tensors", "tensors_of", "versions_of"]


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Rebuilds dicts, lists and tuples with every tensor in them mapped."""
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


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in it."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def versions_of(value: Any) -> tuple[int, ...]:
    """The in-place version of every tensor in it."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors_of(value))
