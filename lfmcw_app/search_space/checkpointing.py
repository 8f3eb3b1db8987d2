"""Activation checkpointing of modules with buffers.

The second run, in the backward pass, sees the buffers of the first.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed"]


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """Calls a module without keeping its activations: its backward pass runs it again.

    It runs as often as it is differentiated. Buffers that a forward pass moves (BatchNorm's
    statistics, spectral norm's vectors) move once, and the same random numbers are drawn again.
    """
    return checkpoint(
        module,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _BuffersAsTheyWere(module)),
    )


class _BuffersAsTheyWere:
    """While it is entered, a module's buffers are copies of what they were when this was made."""

    def __init__(self, module: nn.Module) -> None:
        self._places = []
        for part in module.modules():
            present = [key for key, buffer in part._buffers.items() if buffer is not None]
            self._places += [(part._buffers, key) for key in present]
        self._values = [_buffer(registry, key).clone() for registry, key in self._places]
        self._live: list[Tensor] = []

    def __enter__(self) -> None:
        # Copies of the copies: this pass writes to them, and there may be another one.
        self._live = [_buffer(registry, key) for registry, key in self._places]
        self._put([value.clone() for value in self._values])

    def __exit__(self, *exception: object) -> None:
        self._put(self._live)
        self._live = []

    def _put(self, tensors: list[Tensor]) -> None:
        for (registry, key), tensor in zip(self._places, tensors, strict=True):
            registry[key] = tensor


def _buffer(registry: dict[str, Tensor | None], key: str) -> Tensor:
    tensor = registry[key]
    assert tensor is not None
    return tensor
