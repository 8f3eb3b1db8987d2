"""Computes differences of losses and gradients in full float32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["without_tf32"]


@contextmanager
def without_tf32(device: torch.device, *, allowed: bool) -> Iterator[None]:
    """Computes convolutions and matrix products on a GPU in full float32 while the body runs.

    TF32, PyTorch's default for convolutions on Ampere and later, keeps ten bits of the mantissa,
    which a difference of two gradients magnifies. The setting is one of the whole process.

    Args:
        device: where the loss is computed.
        allowed: leaves the setting alone.
    """
    if allowed or device.type != "cuda":
        yield
        return
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
