"""Norms of several operations at once, whose gains are the mixing weights.

So weight · norm(x) costs no more than norm(x).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mlo.distributed import SyncBatchNorm

__all__ = ["GainBatchNorm", "GainGroupNorm", "GainOnly"]


class _SyncGainBatchNorm(SyncBatchNorm):
    """`GainBatchNorm` with the statistics of the whole batch."""

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Normalises `x` [B, C, H, W] and multiplies by `gain` [C]."""
        normalised = super().forward(x)
        return normalised if gain is None else normalised * gain.view(-1, 1, 1)


class GainBatchNorm(nn.BatchNorm2d):
    """BatchNorm without its own parameters and with an optional gain.

    Args:
        channels: C.
        running_statistics: whether it keeps them; without, it always normalises by its batch.
    """

    synchronized = _SyncGainBatchNorm

    def __init__(self, channels: int, *, running_statistics: bool = True) -> None:
        super().__init__(channels, affine=False, track_running_stats=running_statistics)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Normalises `x` [B, C, H, W] and multiplies by `gain` [C]."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # batch_norm's backward on a CPU reads a gain's memory without its strides (torch 2.14.1).
        gain = None if gain is None else gain.contiguous()
        mean, variance = self.running_mean, self.running_var
        by_batch = self.training or mean is None
        return F.batch_norm(x, mean, variance, gain, None, by_batch, self.momentum or 0.0, self.eps)


class GainGroupNorm(nn.GroupNorm):
    """GroupNorm without its own parameters and with an optional gain."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, affine=False)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Normalises `x` [B, C, H, W] and multiplies by `gain` [C]."""
        return F.group_norm(x, self.num_groups, gain, None, self.eps)


class GainOnly(nn.Module):
    """No norm: the gain alone."""

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """Multiplies `x` [B, C, H, W] by `gain` [C]."""
        return x if gain is None else x * gain.view(-1, 1, 1)
