"""Small supernets, and candidates that differ from edge to edge."""

from __future__ import annotations

import itertools

import torch

from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.supernet import Architecture, Supernet

SMOOTH = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


def both(edges):
    """The same candidates for both kinds of cell."""
    edges = tuple(edges)
    return Candidates(normal=edges, reduction=edges)


def alternating(primitives, nodes, count):
    """Candidates that differ from edge to edge: a window of `count` primitives that moves on with
    each edge.
    """
    ring = itertools.cycle(primitives)
    return both(tuple(itertools.islice(ring, count)) for _ in range(edge_count(nodes)))


def tiny(kind, *, style=None, dropout=0.3):
    """A supernet and an architecture of a space, in float64."""
    torch.manual_seed(1)
    names = SMOOTH if kind == "pc-darts" else alternating(SMOOTH, 2, 3)
    part = 2 if kind == "pc-darts" else 1
    supernet = Supernet(
        in_channels=1,
        num_classes=3,
        channels=4,
        layers=3,
        nodes=2,
        primitives=names,
        style=style,
        partial_channels=part,
    )
    supernet.skip_drop_probability = dropout
    return supernet.double(), Architecture(
        2, names, scale=0.5, edge_weights=kind == "pc-darts"
    ).double()
