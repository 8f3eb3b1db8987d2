"""The training of the derived network."""

from __future__ import annotations

import io
import json
from statistics import fmean

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from lfmcw_app.data import load_dataset
from lfmcw_app.parts import training_labels, training_part
from lfmcw_app.recipe import Evaluation
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Edge, Genotype, random_genotype
from lfmcw_app.training import build_training, train_derived, training_rounds

CPU = torch.device("cpu")
SMALL = {
    "search.nodes": 1,
    "data.train_images": 64,
    "data.test_images": 40,
    "evaluation.channels": 2,
    "evaluation.layers": 3,
    "evaluation.batch_size": 16,
    "evaluation.epochs": 2,
}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def recipe(**changes):
    return load_recipe("smoke", overrides=SMALL | changes)


def test_no_more_images_than_there_are(digits):
    assert len(training_labels(recipe(), digits)) == 64
    for limit in (10**6, None):
        part = training_part(recipe(**{"data.train_images": limit}), digits)
        assert part.pixels is digits.train.pixels
        assert torch.equal(part.labels, digits.train.labels)


def test_a_training_lasts_epochs_or_steps():
    assert training_rounds(Evaluation(epochs=3), 10) == 30
    assert training_rounds(Evaluation(epochs=None, steps=7), 10) == 7


def test_epochs_are_added_until_there_are_enough_rounds():
    """Whole ones, so that schedules end where they would; steps are given as they are."""
    assert training_rounds(Evaluation(epochs=3, min_steps=30), 10) == 30
    assert training_rounds(Evaluation(epochs=3, min_steps=31), 10) == 40
    assert training_rounds(Evaluation(epochs=3, min_steps=1), 10) == 30
    assert training_rounds(Evaluation(epochs=None, steps=7, min_steps=30), 10) == 7


def test_the_training_has_one_problem_and_its_rounds(digits):
    optimizer, rounds = build_training(recipe(), random_genotype(1, 0), digits, CPU)
    assert list(optimizer.problems) == ["network"]
    assert rounds == 2 * (64 // 16)
    record = optimizer.step()
    assert 0.0 <= record.metrics["network"]["accuracy"] <= 1.0


def test_the_auxiliary_head_is_part_of_the_loss(digits):
    """The loss is that of the network's logits, and of the head's with its weight."""
    how = {"evaluation.auxiliary_weight": 0.25, "evaluation.label_smoothing": 0.1}
    optimizer, _ = build_training(recipe(**how), random_genotype(1, 0), digits, CPU)
    problem = optimizer.problems["network"]
    images, labels = problem.data.batch(0)
    logits, auxiliary = problem.module(images)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected = expected + 0.25 * F.cross_entropy(auxiliary, labels, label_smoothing=0.1)
    assert optimizer.step().losses["network"] == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("primitive", ["noise", "skip_connect"])
def test_networks_that_draw_have_noise_of_each_process(digits, monkeypatch, primitive):
    asked = []
    monkeypatch.setattr(
        "lfmcw_app.training.parallelism", lambda recipe, own_noise: asked.append(own_noise)
    )
    cell = (Edge(primitive, 0), Edge("skip_connect", 1)) * 2
    build_training(recipe(), Genotype(cell, cell), digits, torch.device("cpu"))
    assert asked == [primitive == "noise"]


def test_the_result_is_the_error_on_the_test_images(digits, tmp_path):
    folder = RunFolder.create(tmp_path / "run", recipe())
    genotype = random_genotype(1, 0)
    result = train_derived(folder, genotype, digits, Console(quiet=True), CPU)
    assert json.loads((folder.path / "result.json").read_text()) == result == folder.result
    assert (result["test_images"], result["dataset"], result["seed"]) == (40, "digits", 0)
    assert result["genotype"] == genotype.to_data()
    assert 0.0 <= result["test_top5_error_percent"] <= result["test_error_percent"] <= 100.0
    assert result["test_error_percent"] % 2.5 == 0.0  # of 40 images
    low, high = result["test_error_interval_percent"]
    assert low < result["test_error_percent"] < high
    assert len(folder.metrics.read_text().splitlines()) == 8


def test_loss_and_error_are_told_as_means_of_the_same_rounds(digits, tmp_path):
    """Of the last epoch: four rounds here. The file has each round's own."""
    folder = RunFolder.create(tmp_path / "run", recipe())
    output = io.StringIO()
    train_derived(folder, random_genotype(1, 0), digits, Console(file=output, width=200), CPU)
    entries = [json.loads(line) for line in folder.metrics.read_text().splitlines()][-4:]
    loss = fmean(entry["losses"]["network"] for entry in entries)
    error = 100 * (1 - fmean(entry["metrics"]["network"]["accuracy"] for entry in entries))
    told = f"mean of the last 4 rounds: loss {loss:.3f};  error on training batches {error:.1f}%"
    assert told in output.getvalue()


def test_a_result_lost_after_the_training_is_the_same(digits, tmp_path):
    """The statistics are a function of weights and images: nothing of the training is repeated."""
    folder = RunFolder.create(tmp_path / "run", recipe())
    genotype = random_genotype(1, 0)
    for _ in range(2):
        train_derived(folder, genotype, digits, Console(quiet=True), CPU)
    first = (folder.path / "result.json").read_bytes()
    (folder.path / "result.json").unlink()
    logged = folder.metrics.read_bytes()
    torch.manual_seed(5)
    train_derived(RunFolder.open(folder.path), genotype, digits, Console(quiet=True), CPU)
    assert (folder.path / "result.json").read_bytes() == first
    assert folder.metrics.read_bytes() == logged
