"""Tensors in users' containers and objects; one operation on many tensors."""

from __future__ import annotations

import copy
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from operator import is_
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "add",
    "add_all",
    "are_alike",
    "are_few",
    "are_plain",
    "copied_options",
    "copies",
    "have_same_values",
    "in_new_containers",
    "in_precision",
    "laid_out",
    "map_tensors",
    "norm_of",
    "numbers",
    "real_inner",
    "scaled",
    "sharing_memory",
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


def have_same_values(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether as many tensors have the same shapes and values, pair by pair; NaN equals nothing.

    The CPU waits once for a GPU, whatever their number.
    """
    differ: dict[torch.device, list[Tensor]] = {}
    for one, other in zip(ones, others, strict=True):
        if one.shape != other.shape:
            return False
        if one.device.type == "cpu" or type(one) not in PLAIN:
            if not torch.equal(one, other):
                return False
        else:
            differ.setdefault(one.device, []).append((one != other).any())
    return not any(bool(torch.stack(found).any()) for found in differ.values())


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Rebuilds dicts, lists and tuples with every tensor in them mapped.

    Subclasses stay what they are, with their attributes.
    """
    return _rebuilt(value, function, objects=False)


def copied_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group of parameters, tensors among them as copies."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    return {key: map_tensors(value, copied) for key, value in group.items() if key != "params"}


def in_new_containers(value: Any) -> Any:
    """The same tensors in new containers and objects, which the receiver may change."""
    if isinstance(value, Tensor):
        return value
    kind = type(value)
    if kind in BUILTIN:
        for entry in value.values() if kind is dict else value:
            if not isinstance(entry, Tensor):
                break
        else:
            return value if kind is tuple else kind(value)  # (a tuple cannot be changed)
    return _rebuilt(value, _itself, objects=True)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _rebuilt(
    value: Any,
    function: Callable[[Tensor], Any],
    *,
    objects: bool,
    made: dict[int, Any] | None = None,
) -> Any:
    """Containers with every tensor in them mapped.

    No constructor and no method of a container's own class is called: it might convert entries
    again, or take other arguments.

    Args:
        value: the container.
        function: maps a tensor.
        objects: whether objects are copied too, where a copy is an object of the same attributes.
        made: identity → what was rebuilt of it, since objects may hold each other in a circle.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return function(value)
    if kind in ATOMS:
        return value
    known = {} if made is None else made
    if id(value) in known:
        return known[id(value)]

    def of(entry: Any) -> Any:
        return _rebuilt(entry, function, objects=objects, made=known)

    rebuilt: Any
    if isinstance(value, dict):
        rebuilt = known[id(value)] = copy.copy(value)
        for key, entry in dict.items(value):
            dict.__setitem__(rebuilt, key, of(entry))
    elif isinstance(value, list):
        rebuilt = known[id(value)] = [] if kind is list else copy.copy(value)
        list.__setitem__(rebuilt, slice(None), list(map(of, list.__iter__(value))))
    elif isinstance(value, tuple):
        entries = list(map(of, tuple.__iter__(value)))
        if all(map(is_, entries, tuple.__iter__(value))):
            return value
        # (The results of operators, like `torch.max`, are made by their classes only.)
        made_by_class = hasattr(kind, "n_sequence_fields")
        rebuilt = kind(entries) if made_by_class else tuple.__new__(kind, entries)
    elif objects and isinstance(value, deque):
        rebuilt = known[id(value)] = copy.copy(value)
        deque.clear(rebuilt)
        deque.extend(rebuilt, map(of, value))
    elif objects and _is_record(value):
        rebuilt = known[id(value)] = copy.copy(value)
    else:
        return value
    if kind not in BUILTIN:
        for name, entry in _attributes(value):
            object.__setattr__(rebuilt, name, of(entry))
    return rebuilt


BUILTIN = (dict, list, tuple)
ATOMS = (int, float, complex, str, bytes, bool, type(None))
NO_DATA = (type, ModuleType, FunctionType, Module, Dataset, DataLoader)
"""Containers; values that hold no others; objects with attributes that are no batch."""


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Name → value of what an object holds, in its `__dict__` or in slots."""
    if isinstance(value, NO_DATA):
        return []
    found = list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        filled = [name for name in names if not name.startswith("__") and hasattr(value, name)]
        found += [(name, getattr(value, name)) for name in filled]
    return found


def _is_record(value: Any) -> bool:
    """Whether a shallow copy of an object is another one with the same attributes.

    Classes that say how they are pickled may be anything (a handle, a picture in memory).
    """
    kind = type(value)
    if kind in ATOMS or not _attributes(value):
        return False
    if is_dataclass(kind) or hasattr(kind, "__attrs_attrs__") or hasattr(kind, "__copy__"):
        return True
    return all(getattr(kind, way) is getattr(object, way) for way in PICKLING)


PICKLING = ("__reduce_ex__", "__reduce__", "__getstate__")


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
    """Numbers that change where a batch is changed in place.

    Of every tensor in it, PyTorch's count of its changes. It lacks those of tensors made in
    inference mode, and through `.data` or `.numpy()`. Arrays, and tensors in memory that is not
    PyTorch's (`torch.from_numpy`), have no count: of these a checksum. Of objects also which
    values their attributes are.
    """
    found: list[int] = []
    if type(value) is tuple:
        for entry in value:
            if isinstance(entry, Tensor):
                _add_version(entry, found)
            else:
                _add_versions(entry, found, ())
    else:
        _add_versions(value, found, ())
    return tuple(found)


def _add_versions(value: Any, found: list[int], within: tuple[int, ...]) -> None:
    """Adds the versions in a value; `within` are the objects that hold it, perhaps in a circle."""
    kind = type(value)
    if isinstance(value, Tensor):
        _add_version(value, found)
        return
    if kind in ATOMS:
        return
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            _add_versions(value.tolist(), found, within)
        else:
            found.append(_checksum(value))
        return
    if isinstance(value, dict):
        for entry in dict.values(value):
            _add_versions(entry, found, within)
    elif isinstance(value, (list, tuple, deque)):
        for entry in value:
            _add_versions(entry, found, within)
    elif isinstance(value, (bytearray, memoryview, array)):
        found.append(_checksum(np.frombuffer(value, np.uint8)))
        return
    if kind not in BUILTIN and id(value) not in within:
        for _, entry in _attributes(value):
            found.append(id(entry))
            _add_versions(entry, found, (*within, id(value)))


def _add_version(tensor: Tensor, found: list[int]) -> None:
    found.append(0 if tensor.is_inference() else tensor._version)
    if tensor.is_cpu and tensor.layout is DENSE and not tensor.untyped_storage().resizable():
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        found.append(_checksum(plain.reshape(-1).view(torch.uint8).numpy()))


CHECKED = 4096  # bytes


def _checksum(values: np.ndarray[Any, Any]) -> int:
    """A number that changes with an array's values.

    The sum of all of it shows a change anywhere; a code of its beginning that examples have changed
    places. (A code of all of it takes ten times as long: as long as a small network.)
    """
    octets = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    start = zlib.crc32(octets[:CHECKED].data)
    if octets.size <= CHECKED:
        return start
    whole = octets.size // 8 * 8
    total = int(octets[:whole].view(np.uint64).sum()) + int(octets[whole:].sum())
    return hash((start, total))


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


def sharing_memory(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two tensors that surely have memory in common; None if no two have.

    Parts of one flat tensor, side by side, have none. Interleaved views (columns) may overlap in
    their ranges only, so ranges are compared of contiguous tensors alone.
    """
    spans: list[tuple[str, int, int, bool, str]] = []
    for name, tensor in tensors.items():
        plain = tensor.data
        # (Sharded, fake and meta tensors have no memory to compare.)
        if type(plain) is not Tensor or plain.layout != torch.strided or plain.is_meta:
            continue
        start, dense = plain.data_ptr(), plain.is_contiguous()
        if start and plain.numel():
            end = start + plain.numel() * plain.element_size()
            spans.append((str(plain.device), start, end, dense, name))
    spans.sort()
    reach = last = None  # the contiguous one that reaches furthest, and the one before
    for span in spans:
        device, start, end, dense, name = span
        if last is not None and last[:2] == (device, start):
            return last[4], name
        if dense:
            if reach is not None and reach[0] == device and start < reach[2]:
                return reach[4], name
            reach = span
        last = span
    return None
