"""What comes between a command's options and its work."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from lfmcw_app.commands import preparation
from lfmcw_app.commands.preparation import prepared
from lfmcw_app.errors import InputError
from lfmcw_app.projection import Projection
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.genotype import random_genotype


def prepare(tmp_path, *, target="cpu", dry_run=False, max_steps=None, checks=(), genotype=None):
    """What was prepared of a small run on digits, and what was said."""
    said = io.StringIO()
    found = prepared(
        load_recipe("smoke"),
        tmp_path,
        torch.device(target),
        Console(file=said, width=200),
        preset_chosen=False,
        dry_run=dry_run,
        max_steps=max_steps,
        checks=checks,
        genotype=genotype,
    )
    return found, said.getvalue()


def test_checks_see_the_images_and_are_said(tmp_path):
    seen = []

    def told(recipe, images):
        seen.append((recipe.dataset, len(images.train)))
        return "It fits."

    (recipe, images), said = prepare(tmp_path, checks=(told, lambda *_: ""))
    assert seen == [("digits", len(images.train))]
    assert recipe.dataset == "digits" and "Reading digits" in said
    assert said.count("It fits.") == 1


def test_a_check_that_refuses_ends_the_preparation(tmp_path):
    def refuse(recipe, images):
        raise InputError("It does not fit.")

    with pytest.raises(InputError, match="does not fit"):
        prepare(tmp_path, checks=(refuse,))


@pytest.fixture
def projected(monkeypatch):
    """What is projected, which takes rounds, and counted, which takes graphs."""
    calls = []

    def note(name, result):
        def called(*_, **options):
            calls.append((name, options))
            return result

        return called

    monkeypatch.setattr(preparation, "project", note("time", [MEASURED]))
    monkeypatch.setattr(preparation, "count_memory", note("memory", []))
    return calls


MEASURED = Projection(name="search", rounds=10, seconds=0.1, memory=1.0)
SEARCH_TOO = {"searches": True, "genotype": None}


def test_a_dry_run_prepares_nothing_to_run(tmp_path, projected):
    found, said = prepare(tmp_path, dry_run=True)
    assert found is None and projected == [("time", SEARCH_TOO)]
    assert "Reading" not in said and "Measuring two rounds of each phase" in said


def test_memory_is_counted_where_nothing_is_computed(tmp_path, projected):
    found, said = prepare(tmp_path, target="meta", dry_run=True)
    assert found is None and projected == [("memory", SEARCH_TOO)]
    assert "Measuring" not in said


def test_a_trial_has_the_rounds_of_a_trial(tmp_path, projected):
    (recipe, _), said = prepare(tmp_path, max_steps=2)
    assert recipe.trial and projected == [("time", SEARCH_TOO)]
    assert "A trial with a meaningless result" in said


def test_a_whole_run_is_not_projected(tmp_path, projected):
    (recipe, _), _ = prepare(tmp_path)
    assert not recipe.trial and projected == []


def test_a_training_alone_is_projected_as_one(tmp_path, projected):
    genotype = random_genotype(2, 0)
    found, _ = prepare(tmp_path, dry_run=True, genotype=genotype)
    assert found is None and projected == [("time", {"searches": False, "genotype": genotype})]
