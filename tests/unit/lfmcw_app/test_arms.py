"""What the tables of the paper compare."""

from __future__ import annotations

import pytest

from lfmcw_app.arms import TABLES, arm_recipe, check_arms, check_settings, contrasts
from lfmcw_app.errors import InputError
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.recipe_loading import validate_recipe


def test_the_arms_are_those_of_the_paper_and_its_controls():
    assert set(TABLES) == {"table2", "table4", "table5", "fig3", "controls", "ablation"}
    assert {arm.settings["search.generator.name"] for arm in TABLES["table5"].values()} == {
        "dcgan",
        "wgan_gp",
        "biggan",
    }
    assert 0.0 in {arm.settings["search.lambda"] for arm in TABLES["fig3"].values()}
    controls = [arm.settings for arm in TABLES["controls"].values()]
    assert {"search.method": "random"} in controls
    assert {"search.class_weighting": "uniform"} in controls


def test_the_controls_differ_in_what_they_control():
    """The controls differ from the method in what they control."""
    found = {
        label: arm_recipe(arm, "fashion-mnist", "small", None, [], 3, space=None, order=None)
        for label, arm in TABLES["controls"].items()
    }
    ours = found["LFM-CW"].search
    assert all(recipe.seed == 3 for recipe in found.values())
    assert found["no LFM-CW"].search == ours.model_copy(update={"method": "darts"})
    assert found["no LFM-CW, 4 times the rounds"].search == ours.model_copy(
        update={"method": "darts", "steps": 1200}
    )
    assert found["uniform class weights"].search == ours.model_copy(
        update={"class_weighting": "uniform"}
    )
    longer = arm_recipe(
        TABLES["controls"]["no LFM-CW, 4 times the rounds"],
        "cifar10",
        "paper",
        None,
        [],
        0,
        space=None,
        order=None,
    )
    assert longer.search.epochs == 200


def test_a_setting_can_name_the_seed(tmp_path):
    arm = TABLES["table2"]["LFM-CW"]
    setting = "search.steps={seed}1"
    recipe = arm_recipe(arm, "digits", "smoke", None, [setting], 4, space=None, order=None)
    assert recipe.search.steps == 41


def test_a_setting_as_a_value_does_not_name_the_seed():
    arm, given = TABLES["table2"]["LFM-CW"], {"data.groups": "{seed}.csv"}
    recipe = arm_recipe(arm, "digits", "smoke", None, [], 4, space=None, order=None, settings=given)
    assert recipe.data.groups == "{seed}.csv"


def ablation(*settings, seed=0, order="first"):
    """The recipes of the ablation, by label."""
    return {
        label: arm_recipe(
            arm, "fashion-mnist", "small", None, settings, seed, space=None, order=order
        )
        for label, arm in TABLES["ablation"].items()
    }


def test_every_arm_is_compared_with_the_first_one():
    for name, arms in TABLES.items():
        first, *others = arms
        pairs = contrasts(name)
        assert pairs[: len(others)] == [(label, first) for label in others], name
        assert all(set(pair) <= set(arms) for pair in pairs)
    further = contrasts("ablation")[5:]
    assert further == [
        ("LFM-CW", control) for control in ("uniform class weights", "λ = 0", "random cells")
    ]


def test_the_ablation_takes_the_method_apart():
    found = ablation("search.generator.name=wgan_gp", order="second")
    check_arms("ablation", {(label, 0): recipe for label, recipe in found.items()})
    ours = found["LFM-CW"].search
    assert (ours.method, ours.order, ours.generator.name) == ("lfmcw", "second", "wgan_gp")
    assert found["uniform class weights"].search == ours.model_copy(
        update={"class_weighting": "uniform"}
    )
    assert found["synthetic only"].search == ours.model_copy(update={"synthetic_only": True})
    assert found["no LFM-CW"].search.method == "darts"
    assert found["random cells"].search.method == "random"
    assert found["λ = 0"].search.lam == 0


def test_arms_without_a_generator_have_one_recipe_for_all():
    """What does not depend on the generator is run once for the tables of all generators."""
    settings = ("search.generator.name=wgan_gp", "search.generator.lr=0.5", "search.nodes=1")
    usual, other = ablation("search.nodes=1"), ablation(*settings)
    alone = {label for label in usual if usual[label] == other[label]}
    assert alone == {"no LFM-CW", "λ = 0", "random cells"}
    assert other["no LFM-CW"].search.nodes == 1
    assert other["λ = 0"].search.lam == 0
    idle = other["λ = 0"].search.generator
    assert (idle.warmup_rounds, idle.quality) == (0, "never")
    assert usual["LFM-CW"].search.generator.warmup_rounds > 0


def test_random_cells_have_one_recipe_whatever_a_search_would_do():
    """The tables of both orders share their runs; what they are drawn from stays."""
    settings = (
        "search.steps=7", "search.weights.lr=0.5", "search.layers=5", "search.channels=8",
    )  # fmt: skip
    usual = ablation("search.nodes=1")
    other = ablation("search.nodes=1", *settings, order="second")
    alone = {label for label in usual if usual[label] == other[label]}
    assert alone == {"random cells"}
    chosen = ablation("search.nodes=2", "search.primitives=[none,skip_connect]")["random cells"]
    assert (chosen.search.nodes, chosen.search.primitives) == (2, ("none", "skip_connect"))
    assert chosen.search.method == "random"
    assert validate_recipe(parse_yaml(chosen.to_yaml())) == chosen


def test_random_cells_of_progressive_stages_have_a_valid_recipe():
    few = (
        "search.primitives=[none,skip_connect,sep_conv_3x3,max_pool_3x3]", "search.layers=5",
        "search.progressive.added_layers=[0,1]", "search.progressive.skip_dropout=[0.1,0.2]",
        "search.progressive.dropped_operations=[1,1]",
    )  # fmt: skip
    found = ablation(*few, "search.space=pdarts")["random cells"]
    assert len(found.search.primitives) == 4
    assert validate_recipe(parse_yaml(found.to_yaml())) == found


@pytest.mark.parametrize(
    ("table", "setting"),
    [
        ("fig3", "search.lambda=2"),
        ("fig3", "search={lambda: 2}"),
        ("table5", "search.generator={name: dcgan, lr: 1e-3}"),
        ("table2", "seed=3"),
    ],
)
def test_what_a_table_varies_cannot_be_set(table, setting):
    with pytest.raises(InputError, match=r"sets .* itself; drop --set"):
        check_settings(table, [setting])


def test_other_keys_of_a_section_go_to_every_arm():
    settings = ["search={steps: 7}", "search.generator={lr: 0.5}", "data.groups={seed}.csv"]
    check_settings("table5", settings)
    for arm in TABLES["table5"].values():
        made = arm_recipe(arm, "digits", "smoke", None, settings, 2, space=None, order=None)
        plain = arm_recipe(arm, "digits", "smoke", None, [], 2, space=None, order=None)
        assert (made.search.steps, made.search.generator.lr) == (7, 0.5)
        assert made.search.channels == plain.search.channels
        assert made.search.generator.name == arm.settings["search.generator.name"]
