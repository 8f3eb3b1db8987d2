"""Tensors in the containers of users (dicts, lists, tuples); many tensors as one operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "add",
    "add_all",
    "are_alike",
    "are_plain",
    "copies",
    "in_layout_of",
    "in_new_containers",
    "map_tensors",
    "scaled",
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
    if type(value) is tuple and all(isinstance(entry, Tensor) for entry in value):
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


# ------------------------------ many tensors as one operation

PLAIN, DENSE = (Tensor, Parameter), torch.strided

# A GPU takes the tensors of a foreach operator in few kernels. On a CPU each tensor gets what the
# plain operator gives it, bit for bit.


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether foreach operators take these tensors.

    They are dense ones of no subclass (DTensor), through which no derivative is taken: that of some
    foreach operators fails (`_foreach_mul` by a tensor, torch 2.14.1).
    """
    differentiable = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.layout is not DENSE:
            return False
        if differentiable and tensor.requires_grad:
            return False
    return True


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are plain, of one dtype, and together on the CPU or on one GPU."""
    if not tensors or tensors[0].device.type not in ("cpu", "cuda"):
        return False
    kinds = {
        (tensor.dtype, tensor.get_device(), type(tensor) in PLAIN and tensor.layout is DENSE)
        for tensor in tensors
    }
    return len(kinds) == 1 and kinds.pop()[2]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the tensors, as constants."""
    found = list(tensors)
    with torch.no_grad():
        if hasattr(torch, "_foreach_clone") and are_alike(found):
            return list(torch._foreach_clone(found))
        return [tensor.clone() for tensor in found]


def in_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with its entries in memory in the order of another one of its shape."""
    layouts = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(one == other for size, one, other in layouts if size > 1):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """The tensors times a scalar tensor."""
    if not tensors or not are_plain([*tensors, factor]):
        return [tensor * factor for tensor in tensors]
    return list(torch._foreach_mul(list(tensors), factor))


def add_all(totals: Sequence[Tensor | None], terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of two lists of gradients, in which None stands for zero."""
    if len(terms) == 1:
        return [add(totals[0], terms[0])]
    both = [
        (place, total, term)
        for place, (total, term) in enumerate(zip(totals, terms, strict=True))
        if total is not None and term is not None
    ]
    if not both or not are_plain([tensor for _, *pair in both for tensor in pair]):
        return list(map(add, totals, terms))
    sums = torch._foreach_add([total for _, total, _ in both], [term for *_, term in both])
    found = [term if total is None else total for total, term in zip(totals, terms, strict=True)]
    for (place, *_), value in zip(both, sums, strict=True):
        found[place] = value
    return found
