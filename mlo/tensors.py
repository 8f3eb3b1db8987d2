"""Tensors in users' containers (dicts, lists, tuples); one operation on many tensors."""

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
    "are_few",
    "are_plain",
    "copies",
    "in_new_containers",
    "in_precision",
    "laid_out",
    "map_tensors",
    "norm_of",
    "numbers",
    "real_inner",
    "scaled",
    "tensors_of",
    "versions_of",
    "zeros_for_none",
]


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as a constant in a precision, given by its real dtype; complex ones stay so."""
    return tensor.detach().to(dtype.to_complex() if tensor.is_complex() else dtype)


def real_inner(one: Tensor, other: Tensor) -> Tensor:
    """⟨one, other⟩ over the real numbers, as autograd's gradients of complex tensors have it."""
    return (one.conj() * other).sum().real


def norm_of(tensor: Tensor) -> float:
    """‖tensor‖₂, without a graph."""
    # (`Tensor.norm` comes to the same function by way of two others, which take twice its time.)
    return float(torch.linalg.vector_norm(tensor.detach()))


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Rebuilds dicts, lists and tuples with every tensor in them mapped."""
    # Copying a dict first keeps its class; a named tuple takes its entries one by one.
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
    """The same tensors in new containers, which the receiver may change."""
    # (A tuple of tensors cannot be changed.)
    if type(value) is tuple:
        for entry in value:
            if not isinstance(entry, Tensor):
                break
        else:
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
    tensors = value
    if type(value) is tuple:
        for entry in value:
            if not isinstance(entry, Tensor):
                tensors = tensors_of(value)
                break
    else:
        tensors = tensors_of(value)
    return tuple([0 if tensor.is_inference() else tensor._version for tensor in tensors])


def zeros_for_none(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """`found`, with zeros of the shape of the tensor in `like` where an entry is None."""
    return [
        torch.zeros_like(t) if entry is None else entry
        for entry, t in zip(found, like, strict=True)
    ]


def add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, in which None stands for zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


# ------------------------------ many tensors as one operation

PLAIN, DENSE, FEW = (Tensor, Parameter), torch.strided, 16

# A GPU runs a foreach operator in few kernels. On a CPU each tensor gets the same result as from
# the plain operator, bit for bit.


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether foreach operators take these tensors.

    They must be dense, of no subclass (DTensor), and not differentiated through: the derivative of
    some foreach operators fails (`_foreach_mul` by a tensor, torch 2.14.1).
    """
    differentiable = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.layout is not DENSE:
            return False
        if differentiable and tensor.requires_grad:
            return False
    return True


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are plain constants of one dtype, together on the CPU or on one GPU."""
    if not tensors or not (tensors[0].is_cpu or tensors[0].is_cuda):
        return False
    dtype, device = tensors[0].dtype, -1 if tensors[0].is_cpu else tensors[0].get_device()
    for tensor in tensors:
        if tensor.requires_grad or type(tensor) not in PLAIN or tensor.layout is not DENSE:
            return False
        if tensor.dtype is not dtype or (-1 if tensor.is_cpu else tensor.get_device()) != device:
            return False
    return True


def are_few(tensors: Sequence[Tensor]) -> bool:
    """Whether single operators take less time than one foreach operator: few, on the CPU."""
    return len(tensors) < FEW and tensors[0].is_cpu


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the tensors, as constants."""
    found = list(map(Tensor.detach, tensors))
    if not found or are_few(found) or not are_alike(found) or not hasattr(torch, "_foreach_clone"):
        return list(map(Tensor.clone, found))
    return list(torch._foreach_clone(found))


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers of scalars of one device, with one synchronisation."""
    if len(scalars) < FEW and scalars[0].is_cpu:
        return list(map(Tensor.item, scalars))
    found: list[float] = torch.stack(tuple(scalars)).tolist()
    return found


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides of another of its shape, as `backward()` lays out `.grad`.

    A fused step assumes one layout for both: on a CPU it pairs wrong entries, on CUDA it refuses
    (torch 2.14.1). Convolutions of maps in channels-last layout give gradients with other strides.
    """
    if tensor.stride() == like.stride() or tensor.layout != torch.strided:
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def scaled(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """The tensors times a scalar tensor."""
    if not tensors or not are_plain([*tensors, factor]):
        return [tensor * factor for tensor in tensors]
    return list(torch._foreach_mul(list(tensors), factor))


def add_all(totals: Sequence[Tensor | None], terms: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of two lists of gradients, in which None stands for zero."""
    if len(terms) < FEW and all(term is None or term.is_cpu for term in terms):
        return list(map(add, totals, terms))
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
