"""The contracts, of every generator; that a broken entry fails them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfmcw_app.generators import GAMES
from lfmcw_app.search_space.operations import PRIMITIVES, Primitive
from lfmcw_app.testing import GeneratorContract, PrimitiveContract, noise_dataset


@pytest.mark.parametrize("generator", GAMES)
class TestGenerators(GeneratorContract):
    """All of them."""


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2.0)


BROKEN = {
    "keeps_its_size": (lambda channels, stride, style: nn.Identity(), "keeps_or_halves"),
    "in_place": (lambda channels, stride, style: InPlace(), "leaves_its_input"),
    "is_shifted": (
        lambda channels, stride, style: nn.Conv2d(channels, channels, 1, stride, bias=True),
        None,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_primitive_fails_its_contract(name, monkeypatch):
    layer, broken = BROKEN[name]
    monkeypatch.setitem(PRIMITIVES._entries, name, Primitive(layer=layer, colour="#123456"))
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
