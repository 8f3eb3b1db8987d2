"""The derived network: the cells of a genotype stacked, trained from scratch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.cost import parameter_count
from lfmcw_app.search_space.genotype import EDGES_PER_NODE, Edge, Genotype
from lfmcw_app.search_space.layers import FactorizedReduce, OperationStyle, ReLUConvNorm
from lfmcw_app.search_space.operations import make_operation
from lfmcw_app.search_space.stem import image_divisor, make_stem
from lfmcw_app.search_space.supernet import reduction_layers

__all__ = ["STYLE", "DerivedCell", "DerivedNetwork", "ImageNetwork", "drop_path"]

STYLE = OperationStyle(affine=True)


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zeroes whole examples of `x` [B, C, H, W] with `probability`, and scales the others up.

    The factor is 1 / (1 − probability).

    Reference: Larsson et al., FractalNet (2017), as used by DARTS.
    """
    keep = 1.0 - probability
    mask = torch.empty(len(x), 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x * mask / keep


class DerivedCell(nn.Module):
    """One cell of the derived network: two edges per node, and the concatenation of the nodes.

    Args:
        edges: of a genotype's normal or reduction cell.
        channels_before: channels of the outputs of the cell before the last and of the last cell.
        channels: channels of each node; the cell returns nodes · channels.
        reduces: whether this cell halves the resolution.
        reduced_before: whether the last cell did, so that the two outputs differ in size.
    """

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
            make_operation(edge.primitive, channels, 2 if reduces and edge.source < 2 else 1, STYLE)
            for edge in edges
        )

    def forward(self, before_last: Tensor, last: Tensor, drop_probability: float = 0.0) -> Tensor:
        """Returns [B, nodes · channels, H', W']; while training, edges drop out by drop-path."""
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
    """Average pooling to 2×2: DARTS's 5×5 windows on maps that they fit, otherwise even bins.

    Args:
        size: height and width of the maps that the windows fit: 8 with stride 3 (CIFAR), 7 with
            stride 2 (ImageNet).
        stride: of the windows.
    """

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return F.avg_pool2d(x, 5, stride=self.stride)
        return F.adaptive_avg_pool2d(x, 2)


class AuxiliaryHead(nn.Sequential):
    """A second classifier on the feature map after two thirds of the cells, for training only.

    Args:
        channels: of the feature map.
        num_classes: size of the logits.
        stem: the kind of network that it belongs to.
    """

    def __init__(
        self, channels: int, num_classes: int, stem: Literal["cifar", "imagenet"] = "cifar"
    ) -> None:
        super().__init__(
            nn.ReLU(),
            _PoolToTwo(8, 3) if stem == "cifar" else _PoolToTwo(7, 2),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            # The published ImageNet results were obtained without this norm. DARTS's authors call
            # that a slip, and keep it.
            nn.BatchNorm2d(768) if stem == "cifar" else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )


class ImageNetwork(nn.Module):
    """A network of derived cells, of any search space.

    Called with images [B, C, H, W] it returns the logits [B, num_classes], and the auxiliary
    logits or None.

    Attributes:
        auxiliary: the auxiliary head, for training only; None without one.
        drop_probability: current probability of drop-path; set by the training loop.
        divisor: height and width of images must be divisible by it.
    """

    auxiliary: nn.Module | None
    drop_probability: float = 0.0
    divisor: int = 1

    def check_size(self, images: Tensor) -> None:
        """Refuses images [B, C, H, W] that cannot be halved as often as the network halves them.

        Raises:
            InputError: if height or width is not divisible by `divisor`.
        """
        if images.shape[-2] % self.divisor or images.shape[-1] % self.divisor:
            raise InputError(
                f"Images of {images.shape[-2]}×{images.shape[-1]} do not fit this network, which "
                f"needs a height and width divisible by {self.divisor}. Set data.image_size to "
                "such a size."
            )

    def parameter_count(self) -> int:
        """Trainable parameters without the auxiliary head, as papers count them."""
        return parameter_count(self)


class DerivedNetwork(ImageNetwork):
    """The network of a genotype.

    Args:
        genotype: the two cells.
        in_channels: channels of an image.
        num_classes: size of the logits.
        channels: channels of a node in the first cell.
        layers: number of cells.
        auxiliary: whether there is an auxiliary head.
        stem_multiplier: the stem for CIFAR has stem_multiplier · channels channels; that for
            ImageNet has `channels`.
        stem: "cifar" begins at full resolution, "imagenet" at an eighth of it.

    Reference: Liu et al., DARTS (2019), appendix A.2.
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
        stem: Literal["cifar", "imagenet"] = "cifar",
    ) -> None:
        super().__init__()
        width = stem_multiplier * channels if stem == "cifar" else channels
        self.stem, self.second_stem = make_stem(stem, in_channels, width, STYLE)
        self.divisor = image_divisor(stem)
        self.cells = nn.ModuleList()

        # ImageNet's first cell reads maps of two sizes. The larger one is halved, as after a
        # reduction.
        before, reduced_before = (width, width), stem == "imagenet"
        self.auxiliary_after = 2 * layers // 3
        self.auxiliary: AuxiliaryHead | None = None
        for layer in range(layers):
            reduces = layer in reduction_layers(layers)
            channels *= 2 if reduces else 1
            edges = genotype.reduction if reduces else genotype.normal
            self.cells.append(
                DerivedCell(edges, before, channels, reduces=reduces, reduced_before=reduced_before)
            )
            before, reduced_before = (before[1], genotype.nodes * channels), reduces
            if auxiliary and layer == self.auxiliary_after:
                self.auxiliary = AuxiliaryHead(before[1], num_classes, stem)
        self.classifier = nn.Linear(before[1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the logits [B, num_classes] of `images` [B, C, H, W], and the auxiliary logits.

        The latter are None without an auxiliary head, and outside training.

        Raises:
            InputError: if height or width is not divisible by `divisor`.
        """
        self.check_size(images)
        before_last = self.stem(images)
        last = self.second_stem(before_last)
        auxiliary = None
        for layer, cell in enumerate(self.cells):
            before_last, last = last, cell(before_last, last, self.drop_probability)
            if self.auxiliary is not None and self.training and layer == self.auxiliary_after:
                auxiliary = self.auxiliary(last)
        return self.classifier(last.mean(dim=(2, 3))), auxiliary
