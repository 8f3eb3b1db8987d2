"""What the tables of the paper compare."""

from __future__ import annotations

from lfmcw_app.arms import TABLES, arm_recipe


def test_the_arms_are_those_of_the_paper_and_its_controls():
    assert set(TABLES) == {"table2", "table4", "table5", "fig3", "controls"}
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
