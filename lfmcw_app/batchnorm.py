"""Running statistics of BatchNorm, computed anew for weights that no longer change.

During a training they are an exponential average over the last batches (with momentum 0.1), during
which the weights moved. After few steps this average still contains its initial values, mean 0 and
variance 1. A network that answers well with the statistics of a batch is then at chance with the
running ones.

Reference: Izmailov et al., Averaging Weights Leads to Wider Optima (2018), section 3.2; Wu and
Johnson, Rethinking "Batch" in BatchNorm (2021), section 3, where it is called precise BatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["give_statistics", "recompute_statistics", "without_statistics"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Sums:
    """The statistics of one layer's input, and of all batches so far."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        assert layer.running_mean is not None
        self.layer = layer
        self.count = 0
        self.mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.square = torch.zeros_like(self.mean)

    def add(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Adds a batch, and makes the layer normalise it by the batch's statistics, as in training.

        So the next layers see what they saw in training.
        """
        x = inputs[0].detach().transpose(0, 1).flatten(1)  # [channels, values]
        variance, mean = torch.var_mean(x.float(), dim=1, correction=0)
        self._set(mean, variance)
        mean = mean.double()
        self.count += x.shape[1]
        share = x.shape[1] / self.count
        self.mean += share * (mean - self.mean)
        self.square += share * (variance.double() + mean**2 - self.square)

    def finish(self) -> None:
        """Gives the layer the statistics of all batches together: E[x] and E[x²] − E[x]²."""
        if self.count:  # a layer that no image reaches keeps what it has
            self._set(self.mean, (self.square - self.mean**2).clamp(min=0.0))

    def _set(self, mean: Tensor, variance: Tensor) -> None:
        assert self.layer.running_mean is not None
        assert self.layer.running_var is not None
        self.layer.running_mean.copy_(mean)
        self.layer.running_var.copy_(variance)


@torch.no_grad()
def recompute_statistics(network: nn.Module, passes: Iterable[Callable[[], object]]) -> None:
    """Sets the running mean and variance of all BatchNorm layers to those over some forward passes.

    Meanwhile every layer normalises each batch by that batch's statistics, as in training. Dropout
    and drop-path are off. Layers that only run in training keep their statistics. Nothing is sent
    between processes and no random number is drawn here. The network keeps its mode.

    Args:
        network: with the weights that are to be used.
        passes: each runs the network on a batch, as large and as mixed as the training's or more.
    """
    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    ]
    sums = [_Sums(layer) for layer in layers]
    hooks = [one.layer.register_forward_pre_hook(one.add) for one in sums]
    trained = network.training
    network.eval()
    try:
        for run in passes:
            run()
    finally:
        for hook in hooks:
            hook.remove()
        network.train(trained)
    for one in sums:
        one.finish()


def give_statistics(network: nn.Module) -> None:
    """Has all BatchNorm layers keep running statistics from now on, as those of a supernet do not.

    In evaluation they then normalise every image by what `recompute_statistics` found, and not by
    the images beside it.
    """
    one = next(network.parameters())
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            fresh = nn.BatchNorm1d(layer.num_features, affine=False).to(one.device, one.dtype)
            layer.track_running_stats = True
            for name, buffer in fresh.named_buffers():
                layer.register_buffer(name, buffer)


def without_statistics(
    state: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """A module's saved state, without running statistics that the module does not keep.

    The supernets of earlier versions kept them, and no search read them.

    Args:
        state: name → tensor, as it was saved.
        own: the module's own state.

    Returns:
        The state, and how many tensors were left out.
    """
    kept = {
        name: tensor
        for name, tensor in state.items()
        if name in own or name.rpartition(".")[2] not in STATISTICS
    }
    return kept, len(state) - len(kept)
