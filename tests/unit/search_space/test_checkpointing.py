"""Activation checkpointing of modules with buffers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from supernet_pairs import SPACES, pair

from lfmcw_app.generators.blocks import normalize_spectrally
from lfmcw_app.search_space.checkpointing import checkpointed
from mlo.testing import relative_error


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
