"""A moving average of a module's weights, kept in buffers.

They are buffers because `mlo` works on copies of buffers in every evaluation except the module's
own update. So the average moves only in that update, and is saved with the module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage(nn.Module):
    """Exponential moving average of named tensors; a copy of them up to the step `start`.

    Args:
        tensors: name → tensor, at their initial values.
        decay: weight of the old average, in [0, 1).
        start: number of updates before averaging begins.

    Attributes:
        updates: number of calls of `update` so far, an integer scalar.

    Reference: Brock et al., BigGAN (2019), appendix C: 0.9999; their CIFAR programs begin at 1000.
    """

    updates: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], *, decay: float = 0.9999, start: int = 1000
    ) -> None:
        super().__init__()
        self.decay = decay
        self.start = start
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        # A buffer's name must not contain a dot.
        self._keys = {name: name.replace(".", "/") for name in tensors}
        for name, tensor in tensors.items():
            self.register_buffer(self._keys[name], tensor.detach().clone())

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], parts: int = 1) -> None:
        """Moves the average towards `tensors`, in place.

        Args:
            tensors: name → tensor.
            parts: calls with the same tensors that together make one update: k moves by
                1 - decay^(1/k) are one by 1 - decay.
        """
        # The share is a scalar on the device, because a comparison in Python would wait for the GPU
        # in every step. It has the precision of each average, because torch.where of two Python
        # numbers would round it to the default precision.
        early = self.updates < self.start * parts
        moved = 1.0 - self.decay ** (1.0 / parts)
        shares: dict[torch.dtype, Tensor] = {}
        for name, tensor in tensors.items():
            average = getattr(self, self._keys[name])
            if average.dtype not in shares:
                copied = early.to(average.dtype)
                shares[average.dtype] = copied + (1 - copied) * moved
            average.lerp_(tensor.detach(), shares[average.dtype])
        self.updates.add_(1)

    @torch.no_grad()
    def restart(self, tensors: Mapping[str, Tensor]) -> None:
        """Restarts from `tensors`, name → tensor, as if they were the initial values."""
        for name, tensor in tensors.items():
            getattr(self, self._keys[name]).copy_(tensor)
        self.updates.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Returns name → averaged tensor; the buffers themselves."""
        return {name: getattr(self, key) for name, key in self._keys.items()}
