"""The supernet as the original programs write it: one module per operation of an edge.

Each has weights of its own.

This is the reference for `search_step.py` and the tests. lfmcw_app's supernet computes the same
function in another way, and shares no code with it. `split_by_edge` takes the tensors of one apart
into those of the other.

Reference: Liu et al., DARTS (2019), section 3.1; Chen et al., P-DARTS (2019), section 3.3.2
(dropout on identities); Xu et al., PC-DARTS (2020), section 3 (partial channels).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import MixingWeights, Supernet, reduction_layers

__all__ = ["ReferenceSupernet", "split_by_edge"]


def norm(style: OperationStyle, channels: int) -> nn.Module:
    """A norm without learned scale and shift."""
    if style.norm == "batch":
        return nn.BatchNorm2d(channels, affine=False)
    if style.norm == "none":
        return nn.Identity()
    return nn.GroupNorm(1 if style.norm == "group" else channels, channels, affine=False)


def activation(style: OperationStyle) -> nn.Module:
    """ReLU, or SiLU for smooth networks."""
    return nn.ReLU() if style.activation == "relu" else nn.SiLU()


def relu_conv_norm(c_in: int, c_out: int, style: OperationStyle) -> nn.Module:
    """Activation, 1×1 convolution, norm."""
    return nn.Sequential(
        activation(style), nn.Conv2d(c_in, c_out, 1, bias=False), norm(style, c_out)
    )


class FactorizedReduce(nn.Module):
    """Activation, two 1×1 convolutions of stride 2 on pixel grids one apart, norm."""

    def __init__(self, c_in: int, c_out: int, style: OperationStyle) -> None:
        super().__init__()
        self.activation = activation(style)
        self.even = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, stride=2, bias=False)
        self.norm = norm(style, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Halves the resolution."""
        x = self.activation(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


class Zero(nn.Module):
    """`none`."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Returns zeros of the output's shape."""
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


def convolutions(
    c: int, kernel: int, stride: int, dilation: int, style: OperationStyle
) -> list[nn.Module]:
    """Activation, depthwise, pointwise, norm."""
    padding = dilation * (kernel // 2)
    return [
        activation(style),
        nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        norm(style, c),
    ]


def operation(primitive: str, c: int, stride: int, style: OperationStyle) -> nn.Module:
    """One operation of one edge."""
    if primitive == "none":
        return Zero(stride)
    if primitive == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, padding=1), norm(style, c))
    if primitive == "avg_pool_3x3":
        return nn.Sequential(
            nn.AvgPool2d(3, stride, padding=1, count_include_pad=False), norm(style, c)
        )
    if primitive == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(c, c, style)
    kernel = int(primitive[-1])
    if primitive.startswith("dil"):
        return nn.Sequential(*convolutions(c, kernel, stride, 2, style))
    return nn.Sequential(
        *convolutions(c, kernel, stride, 1, style), *convolutions(c, kernel, 1, 1, style)
    )


class MixedOp(nn.Module):
    """An edge: every operation, weighted and added up.

    With partial channels the operations see the first C / K of them.
    """

    def __init__(
        self, c: int, stride: int, primitives: tuple[str, ...], style: OperationStyle, part: int
    ) -> None:
        super().__init__()
        self.part = part
        self.operations = nn.ModuleDict(
            {name: operation(name, c // part, stride, style) for name in primitives}
        )
        self.bypass = nn.Identity() if stride == 1 else nn.MaxPool2d(2)

    def forward(self, x: Tensor, weights: Tensor, drop: float) -> Tensor:
        """Mixes the operations on `x`."""
        seen = x[:, : x.shape[1] // self.part]
        out = 0
        for weight, op in zip(weights, self.operations.values(), strict=True):
            y = op(seen)
            if isinstance(op, nn.Identity) and drop > 0.0:
                y = F.dropout(y, drop, self.training)
            out = out + weight * y
        if self.part == 1:
            return out
        others = weights.sum() * self.bypass(x[:, x.shape[1] // self.part :])
        return F.channel_shuffle(torch.cat([out, others], dim=1), self.part)


class Cell(nn.Module):
    """A cell, edge by edge."""

    def __init__(
        self,
        before: tuple[int, int],
        c: int,
        *,
        nodes: int,
        reduces: bool,
        reduced_before: bool,
        primitives: tuple[tuple[str, ...], ...],
        style: OperationStyle,
        part: int,
    ) -> None:
        super().__init__()
        self.nodes, self.reduces = nodes, reduces
        make_first = FactorizedReduce if reduced_before else relu_conv_norm
        self.preprocess0 = make_first(before[0], c, style)
        self.preprocess1 = relu_conv_norm(before[1], c, style)
        sources = [source for node in range(nodes) for source in range(2 + node)]
        self.edges = nn.ModuleList(
            MixedOp(c, 2 if reduces and source < 2 else 1, names, style, part)
            for source, names in zip(sources, primitives, strict=True)
        )

    def forward(self, before_last: Tensor, last: Tensor, weights: Tensor, drop: float) -> Tensor:
        """Returns the concatenation of the nodes."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        row = 0
        for _ in range(self.nodes):
            incoming = []
            for edge, state in enumerate(states, start=row):
                incoming.append(self.edges[edge](state, weights[edge], drop))
            row += len(states)
            states.append(sum(incoming))
        return torch.cat(states[2:], dim=1)


class ReferenceSupernet(nn.Module):
    """The supernet with the arguments, function and parameter number of `lfmcw_app`'s."""

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        channels: int = 16,
        layers: int = 8,
        nodes: int = 4,
        primitives: tuple[str, ...] | Candidates = DARTS_PRIMITIVES,
        style: OperationStyle | None = None,
        stem: str = "cifar",
        partial_channels: int = 1,
    ) -> None:
        super().__init__()
        self.skip_drop_probability = 0.0
        style = style or OperationStyle()
        candidates = as_candidates(primitives, nodes)
        width = 3 * channels

        def conv(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            affine = {"batch": nn.BatchNorm2d(c_out), "none": nn.Identity()}
            groups = 1 if style.norm == "group" else c_out
            after = affine.get(style.norm) or nn.GroupNorm(groups, c_out)
            return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False), after]

        if stem == "cifar":
            self.stem, self.second_stem = nn.Sequential(*conv(in_channels, width, 1)), nn.Identity()
        else:
            self.stem = nn.Sequential(
                *conv(in_channels, width // 2, 2), activation(style), *conv(width // 2, width, 2)
            )
            self.second_stem = nn.Sequential(activation(style), *conv(width, width, 2))
        self.cells = nn.ModuleList()
        before, reduced_before = (width, width), stem == "imagenet"
        for layer in range(layers):
            reduces = layer in reduction_layers(layers)
            channels *= 2 if reduces else 1
            cell = Cell(
                before,
                channels,
                nodes=nodes,
                reduces=reduces,
                reduced_before=reduced_before,
                primitives=candidates.reduction if reduces else candidates.normal,
                style=style,
                part=partial_channels,
            )
            self.cells.append(cell)
            before, reduced_before = (before[1], nodes * channels), reduces
        self.out_channels = before[1]
        self.classifier: nn.Module = nn.Linear(self.out_channels, num_classes)

    def features(self, images: Tensor, mixing: MixingWeights) -> Tensor:
        """The last cell's output."""
        before_last = self.stem(images)
        last = self.second_stem(before_last)
        for cell in self.cells:
            weights = mixing.reduction if cell.reduces else mixing.normal
            before_last, last = last, cell(before_last, last, weights, self.skip_drop_probability)
        return last

    def forward(self, images: Tensor, mixing: MixingWeights) -> Tensor:
        """Logits [B, num_classes]."""
        return self.classifier(self.features(images, mixing).mean(dim=(2, 3)))


BANK = re.compile(r"cells\.(\d+)\.fans\.(\d+)\.banks\.(\w+)\.(.+)")
POOL = re.compile(r"cells\.(\d+)\.fans\.(\d+)\.pools\.(\w+)\.(.+)")
LAYERS = {
    "sep": {
        "layers.0": "1",
        "layers.1": "2",
        "layers.2": "3",
        "layers.4": "5",
        "layers.5": "6",
        "norm": "7",
    },
    "dil": {"layers.0": "1", "layers.1": "2", "norm": "3"},
    "ski": {"even": "even", "odd": "odd", "norm": "norm"},
}
"""Layers of a bank → layers of the reference's operation.

A bank does not hold the activation in front, and holds the last norm apart.
"""


def split_by_edge(supernet: Supernet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes tensors of a supernet apart into those of the reference.

    They are parameters, buffers or gradients, by name.

    Returns:
        name in `ReferenceSupernet` → tensor.
    """
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(".positions"):
            continue
        bank, pool = BANK.fullmatch(name), POOL.fullmatch(name)
        found = bank or pool
        if found is None:
            result[name] = tensor
            continue

        # The rows of α of the edges out of a state. Edge e leads to node first + e, before which
        # stand the rows of the nodes with 2, 3, ... edges.
        layer, source, primitive, rest = int(found[1]), int(found[2]), found[3], found[4]
        edges = supernet.cells[layer].fans[source].edges[primitive]
        first = max(0, source - 1)
        rows = [sum(range(2, 2 + first + edge)) + source for edge in edges]
        if bank:
            where, leaf = rest.rsplit(".", 1)
            rest = f"{LAYERS[primitive[:3]][where]}.{leaf}"
        parts = tensor.chunk(len(rows)) if bank and tensor.dim() else [tensor] * len(rows)
        for row, part in zip(rows, parts, strict=True):
            result[f"cells.{layer}.edges.{row}.operations.{primitive}.{rest}"] = part
    return result
