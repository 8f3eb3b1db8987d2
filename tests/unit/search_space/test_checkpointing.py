"""Activation checkpointing of modules with buffers."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from reference_supernet import ReferenceSupernet, split_by_edge

from lfmcw_app.generators.blocks import normalize_spectrally
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.checkpointing import checkpointed
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle
from lfmcw_app.search_space.supernet import Architecture, Supernet
from mlo.testing import relative_error

SMALL = {"in_channels": 2, "num_classes": 4, "channels": 4, "layers": 3, "nodes": 2}


def windows(count):
    """Candidates that differ from edge to edge, as in the later stages of P-DARTS."""
    ring = itertools.cycle(PRIMITIVES)
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


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def pair(dtype=torch.float64, **options):
    """A supernet, the reference with the same weights, and an architecture away from its start."""
    torch.manual_seed(0)
    options = SMALL | options
    supernet = Supernet(**options).to(dtype)
    reference = ReferenceSupernet(**options).to(dtype)
    reference.load_state_dict(split_by_edge(supernet, tensors(supernet)))
    edge_weights = options.get("partial_channels", 1) > 1
    arch = Architecture(
        options["nodes"],
        options.get("primitives", PRIMITIVES),
        scale=0.5,
        edge_weights=edge_weights,
    )
    return supernet, reference, arch.to(dtype)


@pytest.mark.parametrize("space", ["darts", "no norm", "p-darts, second stage"])
def test_checkpointing_changes_no_gradient(space):
    """Checkpointing changes no gradient, and moves buffers once.

    With BatchNorm, spectral norm (whose vectors move between two passes) and dropout, to second
    order.
    """
    supernet, _, arch = pair(**SPACES[space])
    if space == "no norm":
        normalize_spectrally(supernet)
    supernet.skip_drop_probability = 0.3
    images = torch.randn(2, 2, 2, 8, 8, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        network = copy.deepcopy(supernet)
        network.checkpointing = checkpointing
        torch.manual_seed(3)
        variables = [p for p in network.parameters() if p is not network.classifier.weight] + list(
            arch.parameters()
        )
        out = (
            network.features(images[0], arch()).square().mean()
            + network.features(images[1], arch()).sin().mean()
        )
        first = torch.autograd.grad(out, variables, create_graph=True, allow_unused=True)
        size = sum(g.square().sum() for g in first if g is not None)
        second = torch.autograd.grad(size, variables, allow_unused=True)
        tensors_found = [out, *(g for g in (*first, *second) if g is not None), *network.buffers()]
        results.append({str(k): tensor.detach().double() for k, tensor in enumerate(tensors_found)})
    assert relative_error(results[1], results[0]) < 1e-13


class Counting(torch.nn.Module):
    """Moves a buffer in each forward pass, and multiplies by what it was before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.tensor(2.0))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        out = x * self.passes.clone()
        self.passes.add_(1.0)
        return out.sin()


def test_the_second_run_finds_the_buffers_of_the_first():
    module, x = Counting(), torch.tensor(0.5, requires_grad=True)
    out = checkpointed(module, x)
    assert float(module.passes) == 3.0
    module.passes.fill_(10.0)  # as a later forward pass would
    (gradient,) = torch.autograd.grad(out, x)
    assert float(gradient) == pytest.approx(2.0 * math.cos(1.0))
    assert module.calls == 2
    assert float(module.passes) == 10.0
