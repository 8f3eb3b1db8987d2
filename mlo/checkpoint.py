"""Checkpoints on disk: written atomically, read without unpickling code."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlo.errors import CheckpointError

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `state` so that `path` holds either all of it or what was there before.

    The state goes to a temporary file in the same folder, is flushed to the disk, and takes the name `path` in one
    rename.

    Args:
        state: tensors and plain Python values, as from `MultilevelOptimizer.state_dict()`.
        path: the file; its folder must exist.

    Raises:
        CheckpointError: if the state holds something that `load_checkpoint` could not read back.
    """
    state = _plain(state, "")
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


def _plain(value: Any, where: str) -> Any:
    """The value with NumPy numbers and arrays as Python numbers and tensors; refuses what is not plain data."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    if value is None or isinstance(value, (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    raise CheckpointError(
        f"The state{where} is a {type(value).__name__}, which cannot be read back without unpickling code. Keep tensors, "
        "numbers, strings, lists and dicts in states of modules, optimizers, schedulers and data."
    )


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
