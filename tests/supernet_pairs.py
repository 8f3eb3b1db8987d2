"""Small supernets of every space beside the reference with the same weights."""

from __future__ import annotations

import itertools

import torch
from reference_supernet import ReferenceSupernet, split_by_edge

from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture, Supernet

SMALL = {"in_channels": 2, "num_classes": 4, "channels": 4, "layers": 3, "nodes": 2}


def windows(count):
    """Candidates that differ from edge to edge, as in the later stages of P-DARTS."""
    ring = itertools.cycle(DARTS_PRIMITIVES)
    edges = tuple(tuple(itertools.islice(ring, count)) for _ in range(edge_count(2)))
    return Candidates(normal=edges, reduction=edges[::-1])


SPACES = {
    "darts": {},
    "darts, four nodes of 12 channels": {"channels": 12, "nodes": 4},
    "darts, odd halves": {"channels": 5},
    "p-darts, second stage": {"primitives": windows(5)},
    "p-darts, third stage": {"primitives": windows(3)},
    "pc-darts": {"partial_channels": 2},
    "pc-darts, images of imagenet": {"partial_channels": 4, "channels": 8, "stem": "imagenet"},
    "instance norm": {"style": OperationStyle(norm="instance")},
    "group norm": {"style": OperationStyle(norm="group")},
    "no norm": {"style": OperationStyle(norm="none")},
    "silu": {"style": OperationStyle(activation="silu")},
}


def pair(dtype=torch.float64, **options):
    """A supernet, the reference with the same weights, and an architecture away from its start."""
    torch.manual_seed(0)
    options = SMALL | options
    supernet = Supernet(**options).to(dtype)
    reference = ReferenceSupernet(**options).to(dtype)
    # The reference keeps running statistics, as the original programs do.
    split = split_by_edge(supernet, dict(supernet.named_parameters()))
    reference.load_state_dict({**reference.state_dict(), **split})
    edge_weights = options.get("partial_channels", 1) > 1
    arch = Architecture(
        options["nodes"],
        options.get("primitives", DARTS_PRIMITIVES),
        scale=0.5,
        edge_weights=edge_weights,
    )
    return supernet, reference, arch.to(dtype)
