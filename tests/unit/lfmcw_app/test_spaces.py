"""The search spaces: every one keeps the contract; nothing else asks for their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lfmcw_app
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import load_recipe
from lfmcw_app.spaces import SPACES, Space, space_named
from lfmcw_app.testing import SpaceContract


@pytest.mark.parametrize("space", SPACES)
class TestSpaces(SpaceContract):
    """All of them."""


def test_no_other_file_asks_which_space_it_is():
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(lfmcw_app.__file__).parent.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"""space\s*(==|!=|in)\s*[\["'(]""", line)
    ]
    assert found == []


def test_a_space_of_ones_own_is_one_entry(monkeypatch):
    class Tiny(Space):
        def candidates(self, how):
            return super().candidates(how.model_copy(update={"primitives": ("conv_3x3",)}))

    monkeypatch.setitem(SPACES._entries, "tiny", Tiny(title="Tiny"))
    recipe = load_recipe("smoke", space="tiny")
    assert recipe.search.space == "tiny"
    assert set(space_named("tiny").candidates(recipe.search).normal) == {("conv_3x3",)}
    SpaceContract().test_supernet_and_architecture_fit_each_other("tiny")


def test_an_unknown_space_is_answered_with_its_nearest_name():
    with pytest.raises(InputError, match="Did you mean 'pcdarts'"):
        space_named("pcdart")
    with pytest.raises(InputError, match="Did you mean 'pcdarts'"):
        load_recipe("smoke", space="pcdart")


def test_the_first_space_of_robust_darts_has_cells_of_four_nodes():
    with pytest.raises(InputError, match="cells of 4 nodes"):
        load_recipe("smoke", space="s1", overrides={"search.nodes": 2})
    how = load_recipe("smoke", space="s1").search
    candidates = SPACES["s1"].candidates(how)
    assert [len(edge) for edge in (*candidates.normal, *candidates.reduction)] == [2] * 28


def test_the_set_of_operations_can_be_chosen():
    how = load_recipe("smoke", assignments=("search.primitives=[none, conv_3x3, skip_connect]",))
    assert SPACES["darts"].candidates(how.search).normal[0] == ("none", "conv_3x3", "skip_connect")
    for wrong, words in {
        "[conv_9x9]": "Unknown primitive 'conv_9x9'",
        "[none]": "other than 'none'",
        "[noise, noise]": "names one twice",
        "[]": "at least 1 item",
    }.items():
        with pytest.raises(InputError, match=words):
            load_recipe("smoke", assignments=(f"search.primitives={wrong}",))
