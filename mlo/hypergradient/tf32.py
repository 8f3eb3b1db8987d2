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
    with _products_in_float32(), _convolutions_in_float32():
        yield


# PyTorch has two ways to set either precision, and refuses to read one of them after a program has
# used the other. So each is set in the way in which it can be read.


@contextmanager
def _products_in_float32() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        with _ieee(torch.backends.cuda.matmul):
            yield
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _convolutions_in_float32() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    wider = (getattr(module, "fp32_precision", "none") for module in (torch.backends, cudnn))
    try:
        before = cudnn.allow_tf32
        is_old = all(precision == "none" for precision in wider)
    except RuntimeError:
        is_old = False
    if not is_old:
        with _ieee(cudnn.conv, cudnn.rnn):
            yield
        return
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@contextmanager
def _ieee(*backends: Any) -> Iterator[None]:
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
