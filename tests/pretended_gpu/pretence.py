"""A GPU that is not there: tensors keep their numbers in the memory of the CPU, and say, and are
checked as if, they were on cuda:0.

So code takes its branches for CUDA with real numbers, which can be compared with those of a CPU.
What PyTorch's C++ code runs is seen by `pretended_gpu.observer`. Here is what Python sees: where
tensors are, how they get from one device to the other, and `torch.cuda`.

It changes PyTorch for the whole process, which is why it has one of its own
(tests/integration/test_pretended_gpu.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_gpu.marks import CUDA, Place, is_on_gpu, mark, place_of, wants_gpu
from pretended_gpu.observer import Gpu, Observer
from torch import Tensor

__all__ = ["pretended_gpu"]

MEMORY = 80 * 2**30

FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "from_numpy",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
]
"""Functions of torch that make tensors."""

COPYING = {"tensor", "as_tensor", "new_tensor"}
"""Those that copy numbers of Python to a GPU, which waits."""

NEW = ["new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"]
"""Methods that make tensors."""

NO_NUMPY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
    "memory first."
)


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """Pretends that there is a GPU, cuda:0, while the body runs."""
    gpu = Gpu()
    observer = Observer(gpu)
    with pytest.MonkeyPatch.context() as patch, observer:
        _change_tensors(patch, gpu)
        _change_factories(patch, gpu, observer)
        _change_cuda(patch, gpu)
        yield gpu


# ------------------------------ tensors


def _change_tensors(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """Where tensors say they are, and how they get from one device to the other."""
    moved = functools.partial(_moved, gpu, torch.Tensor.to)
    numpy, tolist, deepcopy = Tensor.numpy, Tensor.tolist, torch.UntypedStorage.__deepcopy__

    def as_numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_on_gpu(self):
            raise TypeError(NO_NUMPY)
        return numpy(self, *args, **kwargs)

    def as_list(self: Tensor) -> Any:
        if is_on_gpu(self):
            gpu.wait("tolist")
        return tolist(self)

    def copied(self: torch.UntypedStorage, memo: dict[int, Any]) -> torch.UntypedStorage:
        other = deepcopy(self, memo)
        other.place = getattr(self, "place", None)
        return other

    def to_gpu(self: Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        return moved(self, CUDA, non_blocking=non_blocking, **kwargs)

    changes = {
        "device": property(lambda self: CUDA if is_on_gpu(self) else torch.device("cpu")),
        "is_cuda": property(is_on_gpu),
        "is_cpu": property(lambda self: not is_on_gpu(self)),
        "get_device": lambda self: 0 if is_on_gpu(self) else -1,
        "to": lambda self, *args, **kwargs: moved(self, **_arguments_of_to(args, kwargs)),
        "cuda": to_gpu,
        "cpu": lambda self, **kwargs: moved(self, torch.device("cpu"), **kwargs),
        "pin_memory": _pinned,
        "is_pinned": lambda self, device=None: place_of(self) == "pinned",
        "numpy": as_numpy,
        "tolist": as_list,
    }
    for name, changed in changes.items():
        patch.setattr(Tensor, name, changed)
    patch.setattr(torch.UntypedStorage, "__deepcopy__", copied)


def _arguments_of_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Tensor.to by name: (other), (dtype, …) or (device, dtype, …)."""
    given, rest = dict(kwargs), list(args)
    if "other" in given:
        rest.insert(0, given.pop("other"))
    if rest and isinstance(rest[0], Tensor):
        other = rest.pop(0)
        given |= {"device": other.device, "dtype": other.dtype}
    elif rest and not isinstance(rest[0], torch.dtype):
        given["device"] = rest.pop(0)
    if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
        given["dtype"] = rest.pop(0)
    return given | dict(zip(("non_blocking", "copy"), rest, strict=False))


def _moved(
    gpu: Gpu,
    to: Callable[..., Tensor],
    tensor: Tensor,
    device: Any = None,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Tensor.to; a copy from one device to the other waits, but from pinned memory."""
    target, here = wants_gpu(device), is_on_gpu(tensor)
    leaves = target is not None and target is not here
    if leaves and (here or not non_blocking or place_of(tensor) != "pinned"):
        gpu.wait("copy to the CPU" if here else "copy to the GPU")
    others = {} if memory_format is None else {"memory_format": memory_format}
    found = to(tensor, dtype=dtype or tensor.dtype, copy=copy or leaves, **others)
    place: Place = "cuda" if target else "cpu"
    return mark(found, place) if leaves else found


def _pinned(self: Tensor, device: Any = None) -> Tensor:
    """Tensor.pin_memory, as aten/src/ATen/native/Memory.cpp: the same extent and strides."""
    if is_on_gpu(self):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")
    spans = [(n - 1) * stride for n, stride in zip(self.shape, self.stride(), strict=True)]
    extent = 1 + sum(spans) if self.numel() else 0
    storage = torch.UntypedStorage(extent * self.element_size())
    found = torch.empty(0, dtype=self.dtype).set_(storage, 0, self.shape, self.stride())
    return mark(found.copy_(self), "pinned")  # raises where two entries share their memory


# ------------------------------ functions that make tensors


def _change_factories(patch: pytest.MonkeyPatch, gpu: Gpu, observer: Observer) -> None:
    for name in FACTORIES:
        patch.setattr(torch, name, _factory(getattr(torch, name), gpu, observer))
    for name in NEW:
        patch.setattr(Tensor, name, _factory(getattr(Tensor, name), gpu, observer))

    class Generator(torch.Generator):
        """A generator that says where it is."""

        def __new__(cls, device: Any = "cpu") -> Generator:
            made = super().__new__(cls, "cpu")
            if wants_gpu(device):
                gpu.generators[made._cdata] = made
            return made

        @property
        def device(self) -> torch.device:
            return CUDA if self._cdata in gpu.generators else torch.device("cpu")

    patch.setattr(torch, "Generator", Generator)


def _factory(function: Callable[..., Any], gpu: Gpu, observer: Observer) -> Callable[..., Any]:
    """A function that makes a tensor, with its argument `device` kept from PyTorch."""

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.pop("device", None)
        if function.__name__ == "as_tensor" and isinstance(args[0], Tensor):
            return args[0].to(*args[1:], device=device, **kwargs)
        target = wants_gpu(device)
        if target is None or torch.device(device).type == "meta":
            kwargs |= {} if device is None else {"device": device}
        elif target and function.__name__ in COPYING:
            gpu.wait(f"{function.__name__} of numbers")
        observer.making.append(target)
        try:
            found = function(*args, **kwargs)
        finally:
            observer.making.pop()
        if target is None and any(isinstance(argument, Tensor) for argument in args):
            return found  # where its operand is
        return mark(found, "cuda" if target else "cpu")

    return made


# ------------------------------ torch.cuda


def _change_cuda(patch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    cuda = torch.cuda
    properties = SimpleNamespace(
        name="pretended", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132
    )

    def debug_waits(mode: str | int) -> None:
        gpu.forbids_waits = mode in ("error", 2)

    changes = {
        "_exchange_device": lambda index: 0,
        "_is_in_bad_fork": lambda: False,
        "_lazy_call": lambda function, **kwargs: function(),
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": lambda index: 0,
        "current_device": lambda: 0,
        "current_stream": lambda *args: _Stream(gpu),
        "default_generators": (gpu.generator,),
        "device": lambda *args: nullcontext(),
        "device_count": lambda: 1,
        "device_of": lambda *args: nullcontext(),
        "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: properties.name,
        "get_device_properties": lambda *args: properties,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "max_memory_allocated": lambda *args: 0,
        "mem_get_info": lambda *args: (MEMORY // 2, MEMORY),
        "memory_allocated": lambda *args: 0,
        "reset_peak_memory_stats": lambda *args: None,
        "set_device": lambda device: None,
        "set_sync_debug_mode": debug_waits,
        "stream": lambda *args: nullcontext(),
        "synchronize": lambda *args: gpu.wait("synchronize"),
        "Event": lambda **kwargs: _Stream(gpu),
        "Stream": lambda *args, **kwargs: _Stream(gpu),
    }
    for name, changed in changes.items():
        patch.setattr(cuda, name, changed)
        if hasattr(cuda.random, name):  # which has imported it
            patch.setattr(cuda.random, name, changed)
    _change_the_rest(patch)


def _change_the_rest(patch: pytest.MonkeyPatch) -> None:
    """What else of PyTorch asks a tensor for its device, or CUDA for its state."""
    grouped, autocast = torch._C._group_tensors_by_device_and_dtype, torch.autocast

    def by_device(tensors: Any, with_indices: bool = False) -> Any:
        # C++ sees the devices below the marks. All tensors of an optimizer are on one.
        first = next(tensor for column in tensors for tensor in column if tensor is not None)
        return {
            (first.device, dtype): group
            for (_, dtype), group in grouped(tensors, with_indices).items()
        }

    class Autocast(autocast):
        """On a GPU what it is on a CPU."""

        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: CUDA)
    patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    patch.setattr(torch.accelerator, "current_stream", lambda *args: _Stream)


class _Stream:
    """A stream or an event: all work is done at once."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def synchronize(self) -> None:
        self._gpu.wait("synchronize")

    def record(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass

    def query(self) -> bool:
        return True

    @staticmethod
    def is_capturing() -> bool:
        return False

    def elapsed_time(self, other: _Stream) -> float:
        return 0.0
