"""Looks at every operator that PyTorch runs, in backward passes too, as a GPU would.

It raises where CUDA would: operands on two devices, the generator of another device, an index out
of range. It notes the waits of the CPU for the device, and counts launches.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from pretended_gpu.marks import mark, place_of, shares_storage
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Gpu", "Mismatch", "Observer", "Seen", "Waited"]

ROOT = Path(__file__).parents[2]

OWN = [str(Path(__file__).with_name(f"{name}.py")) for name in ("marks", "observer", "pretence")]

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}

BETWEEN_DEVICES = {"copy_", "_to_copy", "set_", "_pin_memory"}
"""Operators whose operands may be on two devices."""

TAKE_NUMBERS = {"fill_", "lerp", "lerp_", "masked_fill", "masked_fill_", "where"}
"""Operators that take a tensor without dimensions from the CPU, beside the pointwise ones."""

CHECKED = {"_linalg_check_errors"}
"""Operators that wait, without a tag that says so."""


class Mismatch(RuntimeError):
    """Operands on two devices."""


class Waited(RuntimeError):
    """A wait for the device where none is allowed."""


@dataclass
class Seen:
    """What was seen of the pretended GPU while a body ran.

    Attributes:
        launches: operator → how often it ran on the GPU; views, which start no kernel, left out.
        waits: what waited, and from which lines of the project, the innermost first.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[str, str]] = field(default_factory=list)


class Gpu:
    """The state of the one pretended GPU."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        # C++ hands a generator back in another object of Python, at the same address.
        self.generators = WeakValueDictionary({self.generator._cdata: self.generator})
        self.forbids_waits = False
        self._watched: list[Seen] = []

    def wait(self, kind: str) -> None:
        """Notes that the CPU waits for the device."""
        if self.forbids_waits or self._watched:
            lines = callers()
            for seen in self._watched:
                seen.waits.append((kind, lines))
            if self.forbids_waits:
                raise Waited(f"called a synchronizing CUDA operation: {kind} at {lines}")

    def launch(self, operator: str) -> None:
        """Counts a kernel."""
        for seen in self._watched:
            seen.launches[operator] += 1

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Collects what happens while the body runs."""
        seen = Seen()
        self._watched.append(seen)
        try:
            yield seen
        finally:
            self._watched.remove(seen)

    @contextmanager
    def own_numbers(self) -> Iterator[None]:
        """Draws of the CPU's global generator come from the GPU's while the body runs."""
        of_cpu = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(of_cpu)


def callers(count: int = 3) -> str:
    """The lines of the project that are being run, the innermost first."""
    own = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in reversed(traceback.extract_stack())
        if Path(frame.filename).is_relative_to(ROOT) and frame.filename not in OWN
    ]
    return " < ".join(own[:count])


class Observer(TorchDispatchMode):
    """Checks, counts and marks.

    Args:
        gpu: what is observed.
    """

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu
        self.making: list[bool | None] = []
        """For each function of Python that is making a tensor: whether on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [place_of(operand) for operand in operands]
        on_gpu = "cuda" in places
        if on_gpu:
            if "cpu" in places or "pinned" in places:
                self._check_devices(func, name, args, list(zip(operands, places, strict=True)))
            if name.startswith("_fused_"):
                check_layouts(name, args)
            self._note_waits(func, name, args, kwargs)
            if not func.is_view:
                self._gpu.launch(name)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        with self._numbers(func, kwargs, on_gpu) if draws else nullcontext():
            try:
                found = func(*args, **kwargs)
            except IndexError as error:
                if not on_gpu:
                    raise
                raise RuntimeError(f"CUDA error: device-side assert triggered ({error})") from error
        self._mark(found, operands, places)
        return found

    def _numbers(self, func: Any, kwargs: dict[str, Any], on_gpu: bool) -> Any:
        """Where random numbers come from: the generator that is given, or the device's own."""
        on_gpu = on_gpu or bool(self.making and self.making[-1])
        generator = kwargs.get("generator")
        if generator is None:
            return self._gpu.own_numbers() if on_gpu else nullcontext()
        if (generator._cdata in self._gpu.generators) is not on_gpu:
            wanted, found = ("cuda", "cpu") if on_gpu else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found {found}")
        return nullcontext()

    def _mark(self, found: Any, operands: list[Tensor], places: list[Any]) -> None:
        """Marks the new tensors among what an operator returned."""
        if "cuda" in places:
            place = "cuda"
        elif any(places) or (self.making and not operands):
            place = "cpu"  # the function of Python that makes it says later if it is on the GPU
        else:
            return  # made by C++, as zeros in the place of a gradient that is not there
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and not shares_storage(leaf, operands):
                mark(leaf, place)

    def _note_waits(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in INDEXING:
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            if any(map(is_mask, indices)) and not is_fill(args):
                self._gpu.wait(f"{name} by a mask")
            # Those that C++ makes of a list have no mark.
            if place_of(args[0]) == "cuda" and any(place_of(i) != "cuda" for i in indices):
                self._gpu.wait(f"{name} with indices on the CPU")
            return
        if name == "repeat_interleave" and kwargs.get("output_size") is not None:
            return
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags & set(func.tags) or name in CHECKED:
            self._gpu.wait(name)

    def _check_devices(
        self, func: Any, name: str, args: Any, operands: list[tuple[Tensor, Any]]
    ) -> None:
        """Whether CUDA takes operands on both devices, and whether it waits for that."""
        host = [operand for operand, place in operands if place in ("cpu", "pinned")]
        if name in BETWEEN_DEVICES:
            if name == "copy_":
                target, source = operands[0][1], operands[-1][1]
                asynchronous = len(args) > 2 and args[2] and "pinned" in (target, source)
                if not asynchronous:
                    self._gpu.wait("copy_ between devices")
            return
        if name in INDEXING and operands[0][1] == "cuda":
            host = [operand for operand in host if operand.is_floating_point()]
        takes_numbers = (
            torch.Tag.pointwise in func.tags
            or name.startswith("_foreach")
            or name in TAKE_NUMBERS | INDEXING
        )
        if host and not (takes_numbers and all(operand.dim() == 0 for operand in host)):
            shapes = [(tuple(operand.shape), place) for operand, place in operands]
            raise Mismatch(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu, in {func}: {shapes} at {callers()}"
            )


def check_layouts(name: str, args: Any) -> None:
    """Raises where a fused step of an optimizer would: its kernels take memory as it lies."""
    lists = [argument for argument in args if isinstance(argument, (list, tuple)) and argument]
    shaped = [tensors for tensors in lists if tensors[0].shape == lists[0][0].shape]
    for members in zip(*shaped, strict=True):
        if len(set(map(layout, members))) > 1:
            raise RuntimeError(
                "params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout "
                f"({name}: {[(tuple(member.shape), member.stride()) for member in members]})"
            )


def layout(tensor: Tensor) -> tuple[int, ...]:
    """How its entries lie in memory; the strides of dimensions of size 1 do not matter."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride for size, stride in sides if size > 1)


def is_mask(index: Tensor) -> bool:
    """Whether an index chooses by truth."""
    return index.dtype in (torch.bool, torch.uint8)


def is_fill(args: Any) -> bool:
    """Whether index_put_ with a mask only fills in one number, for which nothing is counted."""
    return len(args) > 2 and args[2].numel() == 1 and not (len(args) > 3 and args[3])
