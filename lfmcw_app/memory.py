"""How much memory there is, and what to do when it runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe

__all__ = ["enough_memory", "memory_of", "out_of_memory"]

SIGNS = (
    "can't allocate memory",  # PyTorch on a CPU, below Linux
    "not enough memory: you tried to allocate",  # below Windows
    "out of memory",  # CUDA, in other errors than OutOfMemoryError
    "std::bad_alloc",
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "Cannot allocate memory",
)
"""What libraries say when memory runs out, in errors without a special type."""


DOING = {
    "data": "reading the data",
    "search": "the search",
    "training": "the training of the derived network",
}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or a GPU has run out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def enough_memory(
    phase: str, recipe: Recipe, device: torch.device, *, resumes: Path | None = None
) -> Iterator[None]:
    """Turns running out of memory in the body into an error that says what takes less.

    Args:
        phase: what the body does: "search", "training", or "data".
        recipe: its settings.
        device: where it runs.
        resumes: the run folder whose last checkpoint is kept.

    Raises:
        InputError: naming the phase and the keys that decide its size, with their values.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        where = "The GPU" if device.type == "cuda" and phase != "data" else "This machine"
        said = " ".join(str(error).split())[:200] or type(error).__name__
        stands = "" if resumes is None else f" The last checkpoint in {resumes} stands."
        raise InputError(
            f"{where} has run out of memory in {DOING[phase]} ({said}). {_advice(phase, recipe)}"
            f"{stands}"
        ) from None


def _advice(phase: str, recipe: Recipe) -> str:
    if phase == "data":
        size = recipe.data.image_size
        return f"Lower data.image_size (now {size or 'that of the files'}), or use fewer images."
    if phase == "training":
        how = recipe.evaluation
        return (
            f"Lower evaluation.batch_size (now {how.batch_size}), evaluation.channels "
            f"({how.channels}) or evaluation.layers ({how.layers})."
        )
    searched = recipe.search
    less = "" if searched.checkpointing else (
        "Set search.checkpointing=true, which keeps fewer activations and changes no number (a "
        "run can be resumed with it). Or lower "
    )  # fmt: skip
    sizes = (
        f"search.batch_size (now {searched.batch_size}), search.channels ({searched.channels}) or "
        f"search.generator.channels ({searched.generator.channels})."
    )
    order = " search.order=first takes less memory too." if searched.order == "second" else ""
    return f"{less or 'Lower '}{sizes}{order}"


# ------------------------------ how much there is


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that this process can have at most; None if that is not known.

    Of a GPU its memory. Of a CPU the least of the machine's memory with swap, what its control
    group may use, and what its limits (ulimit -v) allow. The meta device takes none.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "meta":
        return None
    known = [size for size in (_machine(), _control_group(), _limit()) if size is not None]
    return min(known, default=None)


def _machine() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; a system that does not say
        return None
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return total
    swap = [line.split()[1] for line in lines if line.startswith("SwapTotal:")]
    return total + sum(1024 * int(kilobytes) for kilobytes in swap)


def _control_group() -> int | None:
    """The limit of this process's control group or of one above it (version 2), or of version 1."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return None
    files = [root / "memory" / "memory.limit_in_bytes"]
    for line in lines:
        group = line.split(":", 2)[2].strip("/")
        own = root / group
        above = [folder for folder in own.parents if root in (folder, *folder.parents)]
        files += [folder / "memory.max" for folder in (own, *above)]
    limits = []
    for file in files:
        try:
            text = file.read_text("ascii").strip()
        except OSError:
            continue
        if text.isdecimal():  # it may be "max"
            limits.append(int(text))
    return min(limits, default=None)


def _limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft
