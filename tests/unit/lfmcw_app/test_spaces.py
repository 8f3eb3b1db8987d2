"""The search spaces: every one keeps the contract; nothing else asks for their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lfmcw_app
from lfmcw_app.errors import InputError
from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.search_space.cell import edge_count
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
    how = load_recipe(
        "smoke", overrides={"search.primitives": ["none", "conv_3x3", "skip_connect"]}
    )
    assert SPACES["darts"].candidates(how.search).normal[0] == ("none", "conv_3x3", "skip_connect")
    for wrong, words in {
        "[conv_9x9]": "Unknown primitive 'conv_9x9'",
        "[none]": "other than 'none'",
        "[noise, noise]": "names a primitive twice",
        "[]": "other than 'none'",
        "[3]": "a list of names is needed",
        "sep_conv_3x3": "a list of names is needed",
    }.items():
        with pytest.raises(InputError, match=words):
            load_recipe("smoke", overrides=parsed_settings([f"search.primitives={wrong}"]))


def per_edge(names, nodes=2):
    return [list(names)] * edge_count(nodes)


def test_operations_can_be_chosen_for_each_edge():
    chosen = {"normal": per_edge(("noise", "conv_3x3")), "reduction": per_edge(("skip_connect",))}
    for space in ("darts", "pcdarts"):
        how = load_recipe("smoke", space=space, overrides={"search.primitives": chosen}).search
        candidates = SPACES[space].candidates(how)
        assert set(candidates.normal) == {("noise", "conv_3x3")}
        assert set(candidates.reduction) == {("skip_connect",)}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"normal": per_edge(("noise",))}, "has the keys normal and reduction"),
        ({"normal": 3, "reduction": 4}, "lists of lists"),
        ({"normal": per_edge(("noise",)), "reduction": [["noise"]]}, r"5 \(normal\) and 1 \(red"),
    ],
)
def test_impossible_choices_for_edges_are_refused(chosen, message):
    with pytest.raises(InputError, match=message):
        load_recipe("smoke", overrides={"search.primitives": chosen})


def test_a_space_with_operations_of_its_own_takes_no_others():
    with pytest.raises(InputError, match="S2 has its own operations"):
        load_recipe("smoke", space="s2", overrides={"search.primitives": ["skip_connect"]})


def test_the_spaces_of_robust_darts_are_the_published_ones():
    """Zela et al. (2020), section 3.1; of S1, its edges into the last node."""

    def candidates(space):
        how = load_recipe("smoke", space=space, overrides={"search.nodes": 4}).search
        return SPACES[space].candidates(how)

    for space, names in {
        "s2": ("skip_connect", "sep_conv_3x3"),
        "s3": ("none", "skip_connect", "sep_conv_3x3"),
        "s4": ("noise", "sep_conv_3x3"),
    }.items():
        assert set(candidates(space).normal) == set(candidates(space).reduction) == {names}
    dilated = ("dil_conv_3x3", "dil_conv_5x5")
    assert candidates("s1").normal[9:] == (
        ("skip_connect", "sep_conv_3x3"), ("max_pool_3x3", "skip_connect"),
        ("skip_connect", "dil_conv_3x3"), dilated, dilated,
    )  # fmt: skip
    pools = ("max_pool_3x3", "avg_pool_3x3")
    assert candidates("s1").reduction[9:] == (
        pools, pools, *[("skip_connect", "dil_conv_5x5")] * 3
    )  # fmt: skip


def test_spaces_with_dropout_or_noise_are_known_to_draw():
    found = {
        name: space.draws(load_recipe("smoke", space=name, overrides={"search.nodes": 4}).search)
        for name, space in SPACES.items()
    }
    assert {name for name, draws in found.items() if draws} == {"pdarts", "s4"}


STAGES = {
    "search.progressive.added_layers": [0, 1],
    "search.progressive.skip_dropout": [0.1, 0.2],
}


@pytest.mark.parametrize(
    ("primitives", "drops", "message"),
    [
        (["skip_connect", "conv_3x3", "noise"], [1, 2], "drops 3 of 3, but must leave one"),
        # The two that are left may be these, of which no cell with two skips could be made.
        (["none", "skip_connect", "conv_3x3", "noise"], [2, 1], "may be none and skip_connect"),
    ],
)
def test_pdarts_leaves_operations_that_a_cell_can_have(primitives, drops, message):
    changes = {
        **STAGES,
        "search.primitives": primitives,
        "search.progressive.dropped_operations": drops,
    }
    with pytest.raises(InputError, match=message):
        load_recipe("smoke", space="pdarts", overrides=changes)
    load_recipe(
        "smoke",
        space="pdarts",
        overrides={**changes, "search.progressive.dropped_operations": [1, 1]},
    )
