"""The derived network: the cells of a genotype stacked, trained from scratch in the evaluation phase."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.genotype import EDGES_PER_NODE, Edge, Genotype
from lfmcw_app.search_space.operations import FactorizedReduce, OperationStyle, ReLUConvNorm, make_operation
from lfmcw_app.search_space.supernet import reduction_layers

__all__ = ["DerivedNetwork", "drop_path"]

STYLE = OperationStyle(affine=True)


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zeroes whole examples of `x` [B, C, H, W] with `probability`, and scales the others by 1 / (1 − probability).

    Reference: Larsson et al., FractalNet (2017), as used by DARTS.
    """
    keep = 1.0 - probability
    mask = torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x * mask / keep


class DerivedCell(nn.Module):
    """One cell of the derived network: two edges a node, and the concatenation of the nodes."""

    def __init__(
        self,
        edges: tuple[Edge, ...],
        channels_before: tuple[int, int],
        channels: int,
        *,
        reduces: bool,
        reduced_before: bool,
    ) -> None:
        super().__init__()
        first, second = channels_before
        make_first = FactorizedReduce if reduced_before else ReLUConvNorm
        self.preprocess0 = make_first(first, channels, STYLE)
        self.preprocess1 = ReLUConvNorm(second, channels, STYLE)
        self.sources = tuple(edge.source for edge in edges)
        self.operations = nn.ModuleList(
            make_operation(edge.primitive, channels, 2 if reduces and edge.source < 2 else 1, STYLE) for edge in edges
        )

    def forward(self, before_last: Tensor, last: Tensor, drop_probability: float) -> Tensor:
        """Returns [B, nodes · channels, H', W']."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        outputs = []
        for source, operation in zip(self.sources, self.operations, strict=True):
            out = operation(states[source])
            if self.training and drop_probability > 0.0 and not isinstance(operation, nn.Identity):
                out = drop_path(out, drop_probability)
            outputs.append(out)
            if len(outputs) == EDGES_PER_NODE:
                states.append(outputs[0] + outputs[1])
                outputs = []
        return torch.cat(states[2:], dim=1)


class _PoolToTwo(nn.Module):
    """Average pooling to 2×2: DARTS's 5×5 windows at stride 3 on the 8×8 maps of CIFAR, even bins on other sizes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (8, 8):
            return F.avg_pool2d(x, 5, stride=3)
        return F.adaptive_avg_pool2d(x, 2)


class AuxiliaryHead(nn.Sequential):
    """A second classifier on the feature map after two thirds of the cells, for training only."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            nn.ReLU(),
            _PoolToTwo(),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )


class DerivedNetwork(nn.Module):
    """The network of a genotype.

    Args:
        genotype: the two cells.
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: channels of a node in the first cell.
        layers: number of cells.
        auxiliary: whether there is an auxiliary head.
        stem_multiplier: the stem has stem_multiplier · channels channels.

    Attributes:
        drop_probability: current probability of drop-path; set by the training loop.
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        in_channels: int,
        num_classes: int,
        channels: int = 36,
        layers: int = 20,
        auxiliary: bool = False,
        stem_multiplier: int = 3,
    ) -> None:
        super().__init__()
        self.drop_probability = 0.0
        width = stem_multiplier * channels
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        before, reduced_before = (width, width), False
        self.auxiliary_after = 2 * layers // 3
        self.auxiliary: AuxiliaryHead | None = None
        for layer in range(layers):
            reduces = layer in reduction_layers(layers)
            channels *= 2 if reduces else 1
            edges = genotype.reduction if reduces else genotype.normal
            self.cells.append(DerivedCell(edges, before, channels, reduces=reduces, reduced_before=reduced_before))
            before, reduced_before = (before[1], genotype.nodes * channels), reduces
            if auxiliary and layer == self.auxiliary_after:
                self.auxiliary = AuxiliaryHead(before[1], num_classes)
        self.classifier = nn.Linear(before[1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the logits [B, num_classes] and, while training with an auxiliary head, its logits."""
        before_last = last = self.stem(images)
        auxiliary = None
        for layer, cell in enumerate(self.cells):
            before_last, last = last, cell(before_last, last, self.drop_probability)
            if self.auxiliary is not None and self.training and layer == self.auxiliary_after:
                auxiliary = self.auxiliary(last)
        return self.classifier(last.mean(dim=(2, 3))), auxiliary

    def parameter_count(self) -> int:
        """Trainable parameters without the auxiliary head, as papers count them."""
        auxiliary = self.auxiliary.parameters() if self.auxiliary is not None else ()
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in auxiliary)
