"""The architecture's gradient, taken apart by the paths of the method."""

from __future__ import annotations

import math

import pytest
import torch

from lfmcw_app.gradient_terms import PATHS, gradient_terms

PARTS = {
    "direct": torch.tensor([3.0, 0.0]),
    "w2": torch.tensor([0.0, 4.0]),
    "w1_w2": torch.tensor([-1.0, 0.0]),
    "gan_w2": torch.tensor([0.0, 0.0]),
}


class Search:
    """A search whose gradient has given parts: what is held fixed takes its own away."""

    def __init__(self, *problems):
        self.problems = dict.fromkeys(problems)

    def gradient(self, name, held_constant=()):
        assert name == "arch"
        total = PARTS["direct"].clone()
        if "w2" not in held_constant:
            total += PARTS["w2"]
            for lower in ("w1", "gan"):
                if lower in self.problems and lower not in held_constant:
                    total += PARTS[f"{lower}_w2"]
        return {"normal": total[:1], "reduction": total[1:]}


def test_each_path_has_its_part():
    found = gradient_terms(Search("w1", "gan", "w2", "arch"))
    assert tuple(found) == PATHS
    total = sum(PARTS.values())
    for path, part in PARTS.items():
        assert found[path]["norm"] == pytest.approx(float(part.norm()))
        size = float(part.norm() * total.norm())
        expected = float(part @ total) / size if size else 0.0
        assert found[path]["cosine"] == pytest.approx(expected)


def test_a_search_without_a_game_has_three_paths():
    found = gradient_terms(Search("w1", "w2", "arch"))
    assert tuple(found) == ("direct", "w2", "w1_w2")
    assert found["w1_w2"]["norm"] == pytest.approx(1.0)
    assert found["w1_w2"]["cosine"] == pytest.approx(-2.0 / math.hypot(2.0, 4.0))


def test_plain_darts_has_two_paths():
    found = gradient_terms(Search("w2", "arch"))
    assert tuple(found) == PATHS[:2]
    assert found["direct"]["cosine"] == pytest.approx(3.0 / math.hypot(3.0, 4.0))
