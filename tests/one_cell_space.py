"""A search space with other cells than DARTS's: one kind, whose nodes sum all edges into them."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.network import ImageNetwork
from lfmcw_app.search_space.operations import make_operation
from lfmcw_app.spaces import Space

OPERATIONS = ("skip_connect", "avg_pool_3x3", "conv_3x3")
PLACES = [(node, source) for node in range(1, 4) for source in range(node)]


@dataclass(frozen=True)
class OneCell(Cells):
    """The operation of each edge of a cell with an input and three nodes."""

    edges: tuple[str, ...]

    def to_data(self):
        nodes = {1: [], 2: [], 3: []}
        for (node, source), primitive in zip(PLACES, self.edges, strict=True):
            nodes[node].append([primitive, source])
        return {"cell": list(nodes.values())}

    def notation(self):
        parts = [f"{name}~{source}" for (_, source), name in zip(PLACES, self.edges, strict=True)]
        return "|" + "|".join(parts) + "|"

    @classmethod
    def from_text(cls, text):
        if text.startswith("|"):
            return cls(tuple(part.partition("~")[0] for part in text.strip().strip("|").split("|")))
        try:
            nodes = json.loads(text)["cell"]
        except (ValueError, KeyError) as error:
            raise InputError(f"This is no cell ({error}).") from None
        return cls(tuple(primitive for node in nodes for primitive, _ in node))

    @staticmethod
    def state_name(source):
        return "the input" if source == 0 else f"node {source}"


@dataclass(frozen=True)
class Candidates:
    cell: tuple[tuple[str, ...], ...]


class Mixing(NamedTuple):
    cell: Tensor


class OneArchitecture(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(1e-3 * torch.randn(len(PLACES), len(OPERATIONS)))

    def forward(self):
        return Mixing(cell=self.alpha.softmax(-1))


class Stack(nn.Module):
    """A stem and two cells with a halving in front of each; `edges` makes what is on an edge."""

    def __init__(self, in_channels, num_classes, channels, edges):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.cells = nn.ModuleList(nn.ModuleList(edges() for _ in PLACES) for _ in range(2))
        self.out_channels = channels
        self.classifier = nn.Linear(channels, num_classes)

    def maps(self, images, through):
        x = self.stem(images)
        for cell in self.cells:
            states = [nn.functional.avg_pool2d(x, 2)]
            for node in (1, 2, 3):
                rows = range(node * (node - 1) // 2, node * (node + 1) // 2)
                states.append(sum(through(cell[row], states[PLACES[row][1]], row) for row in rows))
            x = states[-1]
        return x


class OneSupernet(Stack):
    def __init__(self, in_channels, num_classes, channels, style):
        def edges():
            return nn.ModuleList(make_operation(name, channels, 1, style) for name in OPERATIONS)

        super().__init__(in_channels, num_classes, channels, edges)

    def features(self, images, mixing):
        def through(edge, x, row):
            pairs = zip(edge, mixing.cell[row], strict=True)
            return sum(weight * operation(x) for operation, weight in pairs)

        return self.maps(images, through)

    def forward(self, images, mixing):
        return self.classifier(self.features(images, mixing).mean((2, 3)))


class OneNetwork(ImageNetwork):
    def __init__(self, genotype, *, in_channels, num_classes, channels, **unused):
        super().__init__()
        self.auxiliary = None
        self.divisor = 4
        names = itertools.cycle(genotype.edges)
        style = OperationStyle(affine=True)
        self.stack = Stack(
            in_channels, num_classes, channels,
            lambda: make_operation(next(names), channels, 1, style),
        )  # fmt: skip

    def forward(self, images):
        maps = self.stack.maps(images, lambda edge, x, row: edge(x))
        return self.stack.classifier(maps.mean((2, 3))), None


@dataclass(frozen=True, kw_only=True)
class OneCellSpace(Space):
    """Everything that a search asks of a space, in another way than DARTS."""

    def candidates(self, how):
        return Candidates(cell=(OPERATIONS,) * len(PLACES))

    def operations(self, how):
        return frozenset(OPERATIONS)

    def supernet(self, how, candidates, *, layers, in_channels, num_classes, style):
        return OneSupernet(in_channels, num_classes, how.channels, style)

    def architecture(self, how, candidates):
        return OneArchitecture()

    def derive(self, how, mixing, candidates):
        return self.derive_now(mixing, candidates)

    def derive_now(self, mixing, candidates):
        return OneCell(tuple(OPERATIONS[int(column)] for column in mixing.cell.argmax(1)))

    def random(self, how, seed):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(OPERATIONS), (len(PLACES),), generator=generator)
        return OneCell(tuple(OPERATIONS[int(column)] for column in drawn))

    @property
    def genotype(self):
        return OneCell

    @property
    def network_of(self):
        return "one_cell"

    def network(self, genotype, **sizes):
        return OneNetwork(genotype, **sizes)

    def draw(self, genotype, path, title):
        path.write_text(f"{title}: {genotype.notation()}")


ONE_CELL = OneCellSpace(title="One cell")
