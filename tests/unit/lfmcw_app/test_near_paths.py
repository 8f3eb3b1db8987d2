"""What is named where a path does not exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lfmcw_app.classifier import network_path
from lfmcw_app.commands.predict import _lines
from lfmcw_app.errors import InputError
from lfmcw_app.folders import FolderListing, list_folder
from lfmcw_app.genotype_argument import read_genotype
from lfmcw_app.groups import read_groups
from lfmcw_app.lookup import with_table_digest
from lfmcw_app.near_paths import near_paths, near_runs
from lfmcw_app.prediction import find_images
from lfmcw_app.recipe_loading import load_recipe, read_config
from lfmcw_app.report.reading import read_run
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.sampling import load_generator
from lfmcw_app.starting_weights import with_digests


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures/cats", "pictures/dogs", "runs/old", "runs/new", "runs/none"):
        Path(folder).mkdir(parents=True)
    for time, name in ((100, "old"), (200, "new")):
        config = Path("runs", name, "config.yaml")
        config.write_text("")
        os.utime(config, (time, time))
    Path("recipe.yaml").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("picture", " Did you mean pictures?"),
        ("Pictures/cat", " Did you mean pictures/cats?"),
        ("recipe.yml", " Did you mean recipe.yaml?"),
        ("unlike", ""),
        ("/", ""),
        ("x" * 5000, ""),
        ("x/" * 5000, ""),
        ("picture\0", " Did you mean pictures?"),
        ("recipe.yaml/part", ""),
    ],
)
def test_a_path_is_answered_with_similar_ones(given, said, here):
    assert near_paths(Path(given)) == said


def test_what_could_not_be_meant_is_not_named(here):
    assert near_paths(Path("recipes.yaml"), os.path.isdir) == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("runs/nw", " Did you mean runs/new?"),
        ("runs", " There are runs in runs, the newest first: runs/new, runs/old."),
        ("runs/unlike", " There are runs in runs, the newest first: runs/new, runs/old."),
        ("runs/none", " There are runs in runs, the newest first: runs/new, runs/old."),
        ("pictures/cats", ""),
    ],
)
def test_where_there_is_no_run_runs_nearby_are_named(given, said, here):
    assert near_runs(Path(given)) == said


def test_a_folder_that_cannot_be_read_names_nothing(here, monkeypatch):
    def refused(folder):
        raise PermissionError(folder)

    monkeypatch.setattr(os, "scandir", refused)
    assert near_paths(Path("picture")) == ""


def readers():
    """What reads a path that a user names → a path with a typing error, and what it is near."""
    digits = {"dataset": "digits"}
    smoke = load_recipe("smoke", overrides=digits)

    def resolved(check, key):
        return lambda path: check(load_recipe("smoke", overrides={**digits, key: str(path)}))

    return {
        "folder:": (list_folder, "picture", "pictures"),
        "--config": (read_config, "recipe.yml", "recipe.yaml"),
        "--list": (_lines, "recipe.yml", "recipe.yaml"),
        "--resume": (RunFolder.open, "runs/nw", "runs/new"),
        "--lookup": (resolved(with_table_digest, "lookup.file"), "recipe.yml", "recipe.yaml"),
        "--init of run": (resolved(with_digests, "search.init.run"), "runs/nw", "runs/new"),
        "--init of evaluate": (
            resolved(with_digests, "evaluation.init.run"),
            "runs/nw",
            "runs/new",
        ),
        "a warm-up": (resolved(with_digests, "search.generator.init.run"), "runs/nw", "runs/new"),
        "IMAGE": (lambda path: find_images([path], ["cat"]), "pictures/cat", "pictures/cats"),
        "RUN of predict and export": (network_path, "runs/nw", "runs/new"),
        "RUN of sample": (load_generator, "runs/nw", "runs/new"),
        "RUN of report": (read_run, "runs/nw", "runs/new"),
        "GENOTYPE": (lambda path: read_genotype(str(path), smoke.search), "runs/nw", "runs/new"),
        "data.groups": (
            lambda path: read_groups(path, Path("pictures"), FolderListing(parts={})),
            "recipe.yml",
            "recipe.yaml",
        ),
    }


@pytest.mark.parametrize(("name", "reader"), readers().items(), ids=list(readers()))
def test_every_path_of_a_command_is_answered(name, reader, here):
    read, given, near = reader
    with pytest.raises(InputError) as caught:
        read(Path(given))
    assert f"Did you mean {near}?" in str(caught.value)
    assert "Errno" not in str(caught.value)
