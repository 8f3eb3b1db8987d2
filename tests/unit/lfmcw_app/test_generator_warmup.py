"""The warm-up of the generator, before the search."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from lfmcw_app.build_modules import make_generator
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.errors import NumbersWarning
from lfmcw_app.generator_quality import Judge, Quality
from lfmcw_app.generator_warmup import build_warmup, warm_up
from lfmcw_app.generators import GAMES
from lfmcw_app.parts import search_parts
from lfmcw_app.pictures import describe_dataset
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import search
from lfmcw_app.starting_weights import averaged_generator, with_digests

TINY = {
    "dataset": "digits",
    "data.search_images": 80,
    "search.channels": 4,
    "search.nodes": 1,
    "search.steps": 2,
    "search.order": "first",
    "search.batch_size": 8,
    "search.generator.channels": 2,
    "search.generator.noise_dim": 4,
    "search.generator.warmup_rounds": 4,
    "search.generator.warmup_discriminator_channels": 4,
    "checkpoint_every": 2,
}
CPU = torch.device("cpu")


def recipe(**changes):
    return load_recipe("smoke", overrides=TINY | changes)


def optimizer_of(made, device=CPU):
    digits = load_dataset("digits")
    torch.manual_seed(1)
    train, _ = search_split(digits, made.data.search_images, made.seed)
    return build_warmup(made, digits, train, device=device)


def warmed(folder, made):
    run = RunFolder.open(folder) if folder.exists() else RunFolder.create(folder, made)
    digits = load_dataset("digits")
    train = search_parts(made, digits).train
    judge = Judge.of(digits, made)
    return warm_up(run, digits, train, judge, Console(quiet=True), CPU)


def searched(folder, made):
    run = RunFolder.create(folder, made)
    describe_dataset(load_dataset("digits"), run)
    search(run, load_dataset("digits"), Console(quiet=True), CPU)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["phase"] == "search"], lines


def equal(first, second):
    return set(first) == set(second) and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def test_both_players_move_and_the_average_lags_behind():
    optimizer = optimizer_of(recipe(**{"search.generator.warmup_rounds": 40}))
    players = optimizer.problems["gan"].module
    before = {name: tensor.clone() for name, tensor in players.state_dict().items()}
    for _ in range(30):
        optimizer.step()
    after = players.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    weights = {name for name, _ in players.named_parameters()}
    assert weights <= moved
    found = averaged_generator(after)
    for name, parameter in players.generator.named_parameters():
        start, average = before[f"generator.{name}"], found[name]
        assert not torch.equal(average, parameter)
        assert torch.dist(average, parameter) < torch.dist(start, parameter)


def test_the_average_reaches_over_the_last_rounds_only():
    """What the weights were half-way has a share of e^-5."""
    average = optimizer_of(recipe(**{"search.generator.warmup_rounds": 1000})).problems
    average = average["gan"].module.average
    assert average.start == 500
    assert average.decay**500 == pytest.approx(0.0066, abs=3e-4)


@pytest.mark.slow
def test_a_generator_learns_what_classes_look_like():
    """After a warm-up of some seconds, mean images of classes are near those of real ones."""
    digits = load_dataset("digits")
    made = recipe(
        **{
            "data.search_images": 1000, "search.batch_size": 32, "search.generator.channels": 8,
            "search.generator.noise_dim": 16, "search.generator.warmup_rounds": 300,
            "search.generator.warmup_lr": 2e-3, "search.generator.warmup_discriminator_lr": 2e-3,
            "search.generator.warmup_discriminator_channels": 8,
        }
    )  # fmt: skip
    optimizer = optimizer_of(made)
    for _ in range(300):
        optimizer.step()
    generator = optimizer.problems["gan"].module.generator
    labels = torch.arange(10).repeat(32)
    with torch.no_grad():
        images = generator.sample(labels) * generator.std + generator.mean
    real = digits.train.pixels.float() / 255.0
    means = torch.stack([real[digits.train.labels == label].mean(0) for label in range(10)])
    drawn = torch.stack([images[labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(drawn.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == torch.arange(10)).sum() >= 7


@pytest.mark.slow
def test_a_search_begins_with_what_the_warm_up_learned(tmp_path):
    """And one that takes the same generator from that run is the same, to the last bit."""
    lines, every = searched(tmp_path / "own", recipe())
    assert [line["phase"] for line in every] == ["generator"] * 4 + ["search"] * 2
    taking = with_digests(
        recipe(
            **{
                "search.generator.init.run": str(tmp_path / "own"),
                "search.generator.warmup_rounds": 0,
            }
        )
    )
    taken, every = searched(tmp_path / "taken", taking)
    assert [line["phase"] for line in every] == ["search"] * 2
    assert taken == lines
    without, _ = searched(tmp_path / "without", recipe(**{"search.generator.warmup_rounds": 0}))
    assert without != lines


def test_a_warm_up_that_was_cut_off_is_completed(tmp_path, monkeypatch):
    whole = warmed(tmp_path / "whole", recipe())
    made = recipe()
    with monkeypatch.context() as patch:
        patch.setattr("lfmcw_app.generator_warmup.save_snapshot", _fails_in_round(3))
        with pytest.raises(KeyboardInterrupt):
            warmed(tmp_path / "cut", made)
    assert equal(warmed(tmp_path / "cut", made), whole)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def _fails_in_round(number):
    rounds = []

    def fail(*_):
        rounds.append(1)
        if len(rounds) == number:
            raise KeyboardInterrupt

    return fail


def test_warm_ups_of_other_seeds_are_others(tmp_path):
    first = warmed(tmp_path / "0", recipe())
    assert not equal(first, warmed(tmp_path / "1", recipe(seed=1)))


@pytest.mark.parametrize(
    "changes",
    [
        {"search.generator.warmup_rounds": 0},
        {"search.method": "darts"},
        {"search.method": "random"},
    ],
)
def test_there_is_no_warm_up_without_rounds_or_generator(tmp_path, changes):
    assert warmed(tmp_path / "run", recipe(**changes)) is None
    assert not (tmp_path / "run" / "generator.pt").exists()


@pytest.mark.parametrize("name", list(GAMES))
def test_every_game_can_be_warmed_up(tmp_path, name):
    """The search's generator has the averaged weights; its own average begins with them."""
    made = recipe(**{"search.generator.name": name, "search.generator.warmup_rounds": 2})
    found = warmed(tmp_path / "run", made)
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_the_discriminator_may_move_several_times():
    optimizer = optimizer_of(recipe(**{"search.generator.discriminator_steps": 3}))
    record = optimizer.step()
    assert set(record.losses["gan"]) == {"generator", "discriminator"}
    assert int(optimizer.problems["gan"].module.average.updates) == 3


def test_the_averaged_generator_is_what_is_judged(tmp_path, monkeypatch):
    """It is the one that goes into the search; nothing else of the warm-up changes by it."""
    monkeypatch.setattr("lfmcw_app.generator_quality.STEPS", 5)
    found = {}
    for when in ("never", "snapshots"):
        made = recipe(**{"search.generator.quality": when})
        found[when] = warmed(tmp_path / when, made)
        lines = [
            json.loads(line)
            for line in (tmp_path / when / "metrics.jsonl").read_text().splitlines()
        ]
        measured = [line.pop("quality") for line in lines if "quality" in line]
        assert len(measured) == (4 if when == "snapshots" else 0)
        found[f"{when}, lines"] = lines
    assert equal(found["never"], found["snapshots"])
    assert found["never, lines"] == found["snapshots, lines"]
    generator = make_generator(
        made.search.generator, num_classes=10, image_size=8, image_channels=1,
        mean=load_dataset("digits").mean, std=load_dataset("digits").std,
    )  # fmt: skip
    generator.load_state_dict(found["snapshots"])
    again = Judge.of(load_dataset("digits"), made).measure(generator)
    assert again == Quality.from_data(measured[-1])


def test_a_warm_up_that_draws_one_picture_per_class_is_warned_of(tmp_path, monkeypatch):
    """Once, at its end."""
    monkeypatch.setattr("lfmcw_app.generator_quality.STEPS", 5)
    monkeypatch.setattr("lfmcw_app.collapse.ALIKE", 100.0)
    settings = {"search.generator.quality": "snapshots", "detect_collapse": True}
    with pytest.warns(NumbersWarning) as told:
        warmed(tmp_path / "run", recipe(**settings))
    texts = [str(one.message) for one in told if one.category is NumbersWarning]
    assert [text[:44] for text in texts] == [
        "After the warm-up: The generator has collaps",
        "After the warm-up: The generated pictures do",
    ]
