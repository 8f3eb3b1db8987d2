"""Pictures of generated images during a search: they change nothing, and show the same noise each
time.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lfmcw_app.conditions import describe_conditions
from lfmcw_app.data import load_dataset
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.generators import GAMES
from lfmcw_app.pictures import describe_dataset, save_samples, save_snapshot, snapshot_rounds
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.mark.parametrize("game", GAMES)
def test_a_snapshot_changes_nothing(game, digits, tmp_path):
    """A snapshot leaves random state and generator as they were."""
    torch.manual_seed(3)
    generator = GAMES[game].generator(
        num_classes=10,
        image_size=8,
        image_channels=1,
        mean=digits.mean,
        std=digits.std,
        noise_dim=8,
        channels=4,
    )
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    random_state = torch.get_rng_state()
    for name in ("first.png", "second.png"):
        save_snapshot(generator, digits, tmp_path / "samples" / name, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(
            torch.equal(value, before[name]) for name, value in generator.state_dict().items()
        )
        assert all(module.training for module in generator.modules())
        torch.manual_seed(4)
        random_state = torch.get_rng_state()
    first, second = (
        (tmp_path / "samples" / name).read_bytes() for name in ("first.png", "second.png")
    )
    assert first == second
    with Image.open(tmp_path / "samples" / "first.png") as image:
        assert image.size == (16, 80)


def test_snapshots_are_few_and_hold_the_first_and_the_last_round():
    assert sorted(snapshot_rounds(800)) == [1, 100, 200, 300, 400, 500, 600, 700, 800]
    assert snapshot_rounds(1) == {1}
    for rounds in range(2, 40):
        found = snapshot_rounds(rounds)
        assert {1, rounds} <= found
        assert max(found) == rounds


def test_the_real_images_are_those_of_the_data_set(digits, tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    describe_dataset(digits, folder)
    with Image.open(folder.samples / "real.png") as image:
        tile = torch.from_numpy(np.array(image.crop((8, 24, 16, 32))))
    second_three = digits.train.pixels[(digits.train.labels == 3).nonzero()[1, 0], 0]
    assert torch.equal(tile, second_three)


def test_images_that_are_drawn_are_shown_as_a_generators(digits, tmp_path):
    """Real ones, where there is no generator."""
    folder = tmp_path / "samples"
    drawn = digits.train[torch.arange(200, len(digits.train))]
    save_snapshot(drawn, digits, folder / "drawn.png", torch.device("cpu"))
    with Image.open(folder / "drawn.png") as image:
        tile = torch.from_numpy(np.array(image.crop((8, 24, 16, 32))))
    assert torch.equal(tile, drawn.pixels[(drawn.labels == 3).nonzero()[1, 0], 0])
    save_samples(drawn, digits, folder / "samples.png", torch.device("cpu"))
    assert (folder / "samples.png").stat().st_size > 1000


def test_a_run_says_the_conditions_of_its_data(digits, tmp_path):
    """In dataset.json, with their numbers; a run without conditions says nothing of them."""
    for number, changes in enumerate(({}, {"data.class_shares": {"3": 0.5}})):
        recipe = load_recipe("smoke", overrides=changes)
        folder = RunFolder.create(tmp_path / str(number), recipe)
        describe_dataset(digits, folder)
        described = json.loads((folder.path / "dataset.json").read_text())
        assert described.get("conditions", "") == describe_conditions(recipe, digits)
        assert ("conditions" in described) == bool(changes)


def test_a_run_says_what_its_data_are_known_by(digits, tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    describe_dataset(digits, folder)
    described = json.loads((folder.path / "dataset.json").read_text())
    assert described["summary"] == digits.summary
    assert Fingerprint.from_data(described["fingerprint"]) == digits.fingerprint
    assert described["fingerprint"]["parts"]["train"]["3"]["count"] == int(
        (digits.train.labels == 3).sum()
    )
