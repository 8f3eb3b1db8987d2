"""What a network costs: parameters and multiply-adds, as the papers' tables count them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Cost", "network_cost", "parameter_count"]

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
ACTIVATIONS = (nn.ReLU, nn.SiLU)
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The size of a network, for one image.

    Attributes:
        parameters: trainable parameters without an auxiliary head, in millions.
        multiply_adds: of the convolutions and matrix products, in millions, whatever module or
            function they are made by.
        elementwise: operations of the other layers, in millions: two per output of a norm, one per
            output of an activation, one per input of a pool. P-DARTS and PC-DARTS publish the sum
            of this and `multiply_adds`.
    """

    parameters: float
    multiply_adds: float
    elementwise: float


def network_cost(network: nn.Module, image_size: int, in_channels: int = 3) -> Cost:
    """Counts parameters and multiply-adds, without arithmetic and without changing the network.

    An output of a convolution takes (input channels / groups) · kernel area multiply-adds, one of a
    linear layer its number of inputs, and attention those of its two products. Biases and sums are
    not counted, nor is a module named `auxiliary`, which runs in training only.

    Args:
        network: called with images [1, in_channels, image_size, image_size], in evaluation mode.
        image_size: height and width.
        in_channels: channels of an image.
    """
    # Its import takes a fifth of a second, which loading a network need not wait for.
    from torch.utils.flop_counter import FlopCounterMode

    # On the meta device a layer computes the shape of its output only.
    shapes = copy.deepcopy(network).to("meta").eval()
    elementwise = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal elementwise
        if isinstance(module, NORMS):
            elementwise += 2 * output.numel()
        elif isinstance(module, ACTIVATIONS):
            elementwise += output.numel()
        elif isinstance(module, POOLS):
            elementwise += args[0].numel()

    for module in shapes.modules():
        module.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, in_channels, image_size, image_size, device="meta"))

    return Cost(
        parameters=parameter_count(network) / 1e6,
        multiply_adds=counter.get_total_flops() / 2e6,  # a multiply-add is two operations
        elementwise=elementwise / 1e6,
    )


def parameter_count(network: nn.Module) -> int:
    """Trainable parameters without a module named `auxiliary`, as papers count them."""
    auxiliary = getattr(network, "auxiliary", None)
    excluded: set[int] = set()
    if isinstance(auxiliary, nn.Module):
        excluded = {id(parameter) for parameter in auxiliary.parameters()}
    return sum(p.numel() for p in network.parameters() if p.requires_grad and id(p) not in excluded)
