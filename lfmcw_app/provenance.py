"""What made a result: the version of the program and the kind of machine, but not its name."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mlo

__all__ = ["commit", "device_kind", "made_by"]

CPU_INFO = Path("/proc/cpuinfo")


def made_by(device: torch.device) -> dict[str, Any]:
    """The time, the versions and the device, as plain data."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "mlo": mlo.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "device": device_kind(device),
    }


@cache
def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the repository that the program runs from, "-dirty" where files differ from it.

    None where it was installed, or git is not there.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != folder.resolve():
        return None  # the repository around an installation belongs to another program
    return _git(folder, "describe", "--always", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def device_kind(device: torch.device) -> str:
    """The model of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = CPU_INFO.read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, models), platform.processor() or platform.machine() or "CPU")
