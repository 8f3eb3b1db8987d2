"""Checkpoints on disk: written atomically, read without unpickling code."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from mlo.errors import CheckpointError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `state` so that `path` holds either all of it or what was there before.

    The state goes to a temporary file in the same folder, is flushed to the disk, and takes the name `path` in one
    rename.

    Args:
        state: tensors and plain Python values, as from `MultilevelOptimizer.state_dict()`.
        path: the file; its folder must exist.
    """
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, on the CPU, with `weights_only=True`.

    Raises:
        CheckpointError: if the file is missing, truncated or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {os.fspath(path)}.") from None
    except Exception as error:  # torch raises many kinds for damaged archives; each means the same to the user
        raise CheckpointError(
            f"The checkpoint {os.fspath(path)} cannot be read: it is truncated, damaged or not a checkpoint "
            f"({type(error).__name__}). Use an earlier checkpoint, or start again in a new folder."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"The file {os.fspath(path)} holds a {type(state).__name__}, not a checkpoint.")
    return state
