"""Settings that change on --resume: which may, what is written down, and that rates are applied.

Whole runs are tried in tests/faults/test_changes.py.
"""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.errors import InputError
from lfmcw_app.problems import build_search
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import changed_recipe, load_recipe
from lfmcw_app.resuming import (
    CHANGEABLE,
    change_lines,
    known_recipes,
    learning_rates,
    numbers_changed,
    planned_changes,
    set_learning_rates,
)
from lfmcw_app.run_files import CHANGES
from lfmcw_app.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", load_recipe("smoke"))


def changed(recipe, **settings):
    tree = recipe.model_dump(mode="json", by_alias=True)
    for key, value in settings.items():
        section = tree
        *sections, last = key.split(".")
        for name in sections:
            section = section[name]
        section[last] = value
    return Recipe.model_validate(tree)


def planned(folder, *, searches=True, **settings):
    wanted = changed(folder.recipe, **settings)
    return planned_changes(folder.path, folder.recipe, wanted, searches=searches)


def test_every_key_that_may_change_is_one_of_a_recipe():
    tree = load_recipe("smoke").model_dump(by_alias=True)
    for key in CHANGEABLE:
        value = tree
        for part in key.split("."):
            value = value[part]


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"search.channels": 8}, {"search.hypergradient": "cg"}, {"preset": "small"},
     {"evaluation.weights.momentum": 0.5}, {"data.image_size": 8}],
    ids=str,
)  # fmt: skip
def test_what_may_not_change_is_refused_by_name(folder, settings):
    with pytest.raises(
        InputError, match=f"{next(iter(settings))} .*→.*Settings that can: on_nonfinite"
    ):
        planned(folder, **settings)


def test_only_the_place_of_a_folder_of_images_may_change(tmp_path):
    own = RunFolder.create(
        tmp_path / "own", load_recipe("smoke", overrides={"dataset": "folder:a"})
    )
    (change,) = planned(own, dataset="folder:b")
    assert (change.old, change.new) == ("folder:a", "folder:b")
    with pytest.raises(InputError, match="Only the place of a folder"):
        planned(own, dataset="cifar10")


def test_a_change_that_comes_too_late_is_refused(folder):
    assert planned(folder, **{"search.weights.lr": 0.1})
    (folder.path / "training.pt").touch()
    with pytest.raises(InputError, match=r"has ended its search, so search\.weights\.lr"):
        planned(folder, **{"search.weights.lr": 0.1})
    with pytest.raises(InputError, match="has no search"):
        planned(folder, searches=False, **{"search.weights.lr": 0.1})
    folder.write("result.json", "{}")
    with pytest.raises(InputError, match=r"is complete, so evaluation\.weights\.lr"):
        planned(folder, **{"evaluation.weights.lr": 0.1})
    assert planned(folder, **{"evaluation.weights.lr": 0.1, "evaluation.epochs": 9})
    assert planned(folder, checkpoint_every=7) == ()


def test_a_stage_of_pdarts_is_not_made_longer_after_its_end(tmp_path):
    own = RunFolder.create(tmp_path / "own", load_recipe("smoke", space="pdarts"))
    (own.path / "search-1.pt").touch()
    assert planned(own, **{"search.steps": 9})
    (own.path / "search-2.pt").touch()
    with pytest.raises(InputError, match="stage search-2"):
        planned(own, **{"search.steps": 9})
    assert planned(own, **{"search.weights.lr": 0.1})


def test_every_recipe_that_a_run_had_is_known(folder):
    first = folder.recipe
    second = changed(first, **{"search.weights.lr": 0.1})
    third = changed(second, on_nonfinite="skip")
    for recipe in (second, third):
        changes = planned_changes(folder.path, folder.recipe, recipe, searches=True)
        before = (folder.path / CHANGES).read_text() if (folder.path / CHANGES).exists() else ""
        lines = change_lines(changes, time="", phase="search", round_number=3)
        folder.write(CHANGES, before + lines)
    assert known_recipes(folder.path, third) == [first, second, third]
    (folder.path / "environment.json").unlink()  # as in folders of an earlier version
    assert known_recipes(folder.path, third) == [first, second, third]
    assert [change["key"] for change in numbers_changed(folder.path)] == [
        "search.weights.lr",
        "on_nonfinite",
    ]


# ------------------------------ learning rates


def search_of(recipe):
    torch.manual_seed(0)
    dataset = load_dataset("digits")
    train, validation = search_split(dataset, 24, 0)
    return build_search(recipe, dataset, train, validation, build_modules(recipe.search, dataset))


RATES = {
    "search.weights.lr": 0.05,
    "search.weights.min_lr": 0.01,
    "search.architecture.lr": 0.02,
    "search.generator.lr": 0.003,
    "search.generator.discriminator_lr": 0.004,
}


def settings_of(optimizer):
    return {
        (name, key): [group["lr"] for group in own.param_groups]
        for name, problem in optimizer.problems.items()
        for key, own in problem.optimizers.items()
    }


@pytest.mark.parametrize("rounds", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_rates_after_a_state_are_those_of_the_new_recipe(rounds):
    """They are what a run by the new recipe has after so many rounds, in every optimizer."""
    recipe = load_recipe(
        "smoke", overrides={"search.order": "first", "search.batch_size": 4, "search.nodes": 1}
    )
    other = changed(recipe, **RATES)
    ran, like = search_of(recipe), search_of(other)
    for _ in range(rounds):
        ran.step()
        like.step()
    resumed = search_of(other)
    rates = learning_rates(resumed)
    resumed.load_state_dict(ran.state_dict())
    assert settings_of(resumed) == settings_of(ran)  # a state brings its rates
    set_learning_rates(resumed, rates)
    assert settings_of(resumed) == settings_of(like)
    resumed.step()
    like.step()
    assert settings_of(resumed) == settings_of(like)


def test_a_step_after_a_change_has_the_new_length():
    """Of two runs from one state, a step of SGD with twice the rate is twice as long."""
    settings = {"search.order": "first", "search.method": "darts", "search.batch_size": 4,
                "search.weights.grad_clip": None}  # fmt: skip
    recipe = load_recipe("smoke", overrides=settings)
    ran = search_of(recipe)
    ran.step()
    state = ran.state_dict()
    lengths = []
    for factor in (1.0, 2.0):
        again = search_of(changed(recipe, **{"search.weights.lr": 0.025 * factor}))
        rates = learning_rates(again)
        again.load_state_dict(state)
        set_learning_rates(again, rates)
        before = [p.detach().clone() for p in again.problems["w2"].module.parameters()]
        again.step()
        after = again.problems["w2"].module.parameters()
        moved = [new.detach() - old for new, old in zip(after, before, strict=True)]
        lengths.append(torch.cat([part.flatten() for part in moved]).double().norm())
    assert lengths[1] / lengths[0] == pytest.approx(2.0, rel=1e-4)


def test_epochs_take_the_place_of_a_presets_least_rounds(tmp_path):
    """Else they would change nothing where few images made the preset add epochs."""
    own = RunFolder.create(tmp_path / "own", load_recipe("small"))
    wanted = changed_recipe(own.recipe, overrides={"evaluation.epochs": 120})
    found = planned_changes(own.path, own.recipe, wanted, searches=True)
    assert {(change.key, change.new) for change in found} == {
        ("evaluation.epochs", 120), ("evaluation.min_steps", 0),
    }  # fmt: skip


def test_a_search_after_a_warm_up_can_be_made_longer(tmp_path):
    """The warm-up is no stage, whose end would settle the length of the next."""
    recipe = load_recipe("smoke", overrides={"search.generator.warmup_rounds": 4})
    run = RunFolder.create(tmp_path / "run", recipe)
    for phase in ("generator", "search"):
        (run.path / f"{phase}.pt").touch()
    longer = changed_recipe(recipe, overrides={"search.steps": 99})
    (change,) = planned_changes(run.path, recipe, longer, searches=True)
    assert (change.key, change.new) == ("search.steps", 99)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"key": "search.none.x", "old": 1, "new": 2}', "there is no setting 'none'"),
        ('{"key": "seed.x", "old": 1, "new": 2}', "there is no setting 'seed'"),
        ('{"key": "seed", "old": 1, "new": "x"}', "a whole number, got 'x'"),
        ('{"key": ["seed"], "old": 1, "new": 2}', "key of a change is"),
        ('{"key": "seed", "old": 1, "new": 2, "round": true}', "round of a change is True"),
        ('{"key": "seed", "old": 1}', "a line is no change"),
        ("[]", "a line is no change"),
    ],
)
def test_changes_that_were_edited_are_refused_by_the_file(folder, line, words):
    (folder.path / "changes.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=rf"changes\.jsonl .*{words}"):
        known_recipes(folder.path, folder.recipe)
