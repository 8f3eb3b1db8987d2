"""The options beside --resume."""

from __future__ import annotations

import json

import pytest

from lfmcw_app.commands.resumption import resumed_folder
from lfmcw_app.errors import InputError
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import EVALUATED
from lfmcw_app.run_folder import RunFolder


def resumed(path, *, searches=True, dataset=None, config=None, settings=None, out=None, **options):
    keys = {"space": "search.space", "order": "search.order", "method": "search.method"}
    given = {keys.get(name, name): value for name, value in options.items()}
    return resumed_folder(
        path,
        searches=searches,
        dataset=dataset,
        config=config,
        options=given,
        settings=settings or {},
        out=out,
    )


@pytest.fixture
def path(tmp_path):
    return RunFolder.create(tmp_path / "run", load_recipe("smoke", space="pdarts")).path


def test_the_command_that_started_a_run_resumes_it(path, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("search: {steps: 5}\n")
    folder = resumed(
        path, dataset="digits", preset="smoke", space="pdarts", order="second", seed=0,
        config=config, settings={"search.channels": 4}, out=path,
    )  # fmt: skip
    assert folder.changes == ()
    assert folder.recipe == load_recipe("smoke", space="pdarts")


def test_options_beside_resume_change_the_recipe(path, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("evaluation: {weights: {lr: 1e-1}}\n")
    folder = resumed(path, config=config, settings={"on_nonfinite": "skip"})
    assert [str(change) for change in folder.changes] == [
        "on_nonfinite 'stop' → 'skip'",
        "evaluation.weights.lr 0.025 → 0.1",
    ]
    assert folder.recipe.on_nonfinite == "skip"
    assert RunFolder.open(path).recipe.on_nonfinite == "stop"  # until the run resumes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed 0 → 1"),
        ({"preset": "small"}, "preset 'smoke' → 'small'"),
        ({"order": "first"}, "search.order 'second' → 'first'"),
        ({"settings": {"search.chanels": 8}}, "Did you mean 'search.channels'"),
        ({"dataset": "cifar10"}, "dataset 'digits' → 'cifar10'"),
        ({"dataset": "cifar11"}, "Unknown data set"),
        ({"seed": 1, "settings": {"seed": 0}}, "--seed is 1, and --set seed is 0"),
        ({"dataset": "cifar10", "settings": {"dataset": "digits"}}, "argument DATASET is 'cifar10"),
        ({"searches": False}, "python -m lfmcw_app.run --resume"),
    ],
)
def test_options_that_cannot_be_taken_up_are_refused(path, options, words):
    with pytest.raises(InputError, match=words):
        resumed(path, **options)


def test_another_folder_of_output_is_refused(path, tmp_path):
    with pytest.raises(InputError, match="resumes in its own folder; drop --out"):
        resumed(path, out=tmp_path / "other")
    (path / EVALUATED).touch()
    with pytest.raises(InputError, match=r"python -m lfmcw_app\.evaluate --resume"):
        resumed(path)


def test_a_folder_of_images_is_found_from_another_place(tmp_path, monkeypatch):
    for name in ("home/pictures", "away/pictures", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    recipe = load_recipe("smoke", overrides={"dataset": "folder:pictures"})
    path = RunFolder.create(tmp_path / "run", recipe).path
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resumed(path).recipe.dataset == "folder:pictures"  # it has not read anything yet
    began = {"path": str(tmp_path / "home" / "pictures")}
    (path / "dataset.json").write_text(json.dumps(began))
    assert resumed(path).recipe.dataset == f"folder:{tmp_path}/home/pictures"
    assert resumed(path, dataset="folder:new").recipe.dataset == "folder:new"
    monkeypatch.chdir(tmp_path / "away")  # which has a folder of this name, but another one
    assert resumed(path).recipe.dataset == f"folder:{tmp_path}/home/pictures"
    monkeypatch.chdir(tmp_path / "home")
    assert resumed(path).changes == ()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "home" / "pictures").rmdir()
    with pytest.raises(InputError, match=r"were in .*home/pictures.*folder:PATH --resume"):
        resumed(path)
    (tmp_path / "new.yaml").write_text("dataset: folder:new")
    assert resumed(path, config=tmp_path / "new.yaml").recipe.dataset == "folder:new"
    monkeypatch.chdir(tmp_path / "home")  # the same place, where nothing is any more
    with pytest.raises(InputError, match=r"were in .*home/pictures.*folder:PATH --resume"):
        resumed(path)
    monkeypatch.chdir(tmp_path / "away")  # all was moved together
    assert resumed(path).changes == ()
