"""Measures the memory that a piece of work takes in a process, by its resident size."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

__all__ = ["peak", "reset_peak", "return_free_memory"]


def return_free_memory() -> None:
    """Collects garbage and has glibc return free memory, so that later use shows as growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int | None:
    """A size in /proc/self/status, in bytes; None if there is no such file or line."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(sizes[0]) * 1024 if sizes else None


def reset_peak() -> int:
    """Sets the peak to the present resident size, if it can; returns the size to subtract."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and _status("VmHWM") is not None:
        clear.write_text("5")
        return _status("VmRSS") or 0
    return peak()


def peak() -> int:
    """Largest resident size, in bytes: since the reset, or else of the whole process."""
    high = _status("VmHWM")
    if high is not None:
        return high
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
