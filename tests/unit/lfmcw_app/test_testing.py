"""The contracts, of every generator; that a broken entry fails them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lfmcw_app.generators import GAMES
from lfmcw_app.search_space.batched_operations import LayerBank
from lfmcw_app.search_space.operations import PRIMITIVES, Primitive
from lfmcw_app.testing import GeneratorContract, PrimitiveContract, noise_dataset


@pytest.mark.parametrize("generator", GAMES)
class TestGenerators(GeneratorContract):
    """All of them."""


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2.0)


class Cut(torch.autograd.Function):
    """The identity, whose backward pass has no graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2.0 * g * ctx.saved_tensors[0]


class DifferentiableOnce(nn.Module):
    def forward(self, x):
        return Cut.apply(x)


def pointwise(channels, stride, style):
    return nn.Conv2d(channels, channels, 1, stride)


def halved(module, stride):
    return nn.Sequential(nn.AvgPool2d(stride), module)


def other_bank(channels, edges, stride, style):
    """A bank of another operation."""
    return LayerBank(
        lambda c, s, style: nn.Conv2d(c, c, 1, s, groups=2), channels, edges, stride, style
    )


BROKEN = {
    "keeps_its_size": ({"layer": lambda c, s, style: nn.Identity()}, "keeps_or_halves"),
    "in_place": ({"layer": lambda c, s, style: InPlace()}, "leaves_its_input"),
    "drops_out": ({"layer": lambda c, s, style: halved(nn.Dropout(), s)}, "draws_random"),
    "never_draws": ({"layer": pointwise, "draws": True}, "draws_random"),
    "differentiable_once": (
        {"layer": lambda c, s, style: halved(DifferentiableOnce(), s)}, "second_derivatives",
    ),
    "has_another_bank": ({"layer": pointwise, "supernet": other_bank}, "its_bank_is"),
    "is_colourless": ({"layer": pointwise, "colour": "blue"}, "has_a_colour"),
    "is_right": ({"layer": pointwise}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_primitive_fails_its_contract(name, monkeypatch):
    given, broken = BROKEN[name]
    monkeypatch.setitem(PRIMITIVES._entries, name, Primitive(**{"colour": "#123456", **given}))
    contract, failed = PrimitiveContract(), []
    for test in (name for name in dir(PrimitiveContract) if name.startswith("test_")):
        try:
            getattr(contract, test)(name)
        except (AssertionError, RuntimeError):
            failed.append(test)
    assert any(broken in test for test in failed) if broken else failed == []


def test_noise_is_a_data_set_of_equal_classes():
    data = noise_dataset(classes=4, per_class=3)
    assert torch.bincount(data.train.labels).tolist() == [3] * 4
