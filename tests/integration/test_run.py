"""The main job as a user runs it: `python -m lfmcw_app.run`, killed, resumed, repeated."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import torch
from interrupted_command import command as interrupted
from PIL import Image
from started_processes import finished as finished_process
from tiny_runs import TINY, arguments, called, outcome, resume, run, settings

from lfmcw_app.commands.evaluate import evaluate
from lfmcw_app.commands.run import run as run_command
from lfmcw_app.search_space.genotype import Genotype, random_genotype


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finished = run("--out", folder)
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_a_run_leaves_everything_in_its_folder(whole):
    folder, printed = whole
    expected = {
        ".lock", "cells.png", "cells.svg", "config.yaml", "dataset.json", "environment.json",
        "genotype.json", "genotype.txt", "metrics.jsonl", "network.pt", "report.html",
        "result.json", "samples", "samples.png",
        "search.best.pt", "search.json", "search.previous.pt", "search.pt", "timings.jsonl",
        "training.best.pt", "training.previous.pt", "training.pt",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == expected
    result = json.loads((folder / "result.json").read_text())
    assert f"test error {result['test_error_percent']:.2f}%" in printed
    assert result["test_images"] == 50
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    search = [line for line in lines if line["phase"] == "search"]
    assert [line["round"] for line in search] == list(range(1, 5))
    assert set(search[0]["losses"]) == {"w1", "gan", "w2", "arch"}
    assert len(search[0]["metrics"]["w2"]["class_weights"]) == 10
    assert set(search[0]["solves"]) == {"w1", "gan", "w2"}
    assert "alpha" in search[1]
    assert {path.stem for path in (folder / "samples").iterdir()} == {
        "real",
        *(f"search-{n:06d}" for n in range(1, 5)),
    }
    assert sum(line["phase"] == "training" for line in lines) == 2 * (60 // 16)
    assert torch.load(folder / "search.pt", weights_only=True)["phase"] == "search"


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed(whole, tmp_path):
    """The same seed gives the same run, and another seed another."""
    folder, _ = whole
    again, other = tmp_path / "again", tmp_path / "other"
    assert run("--out", again).returncode == 0
    assert outcome(again) == outcome(folder)
    short = {"search.steps": 1, "evaluation.epochs": 1}
    assert run("--out", other, "--seed", 1, **short).returncode == 0
    first, second = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for path in (folder, other)
    )
    # Before anything has moved, so that it does not depend on the number of rounds.
    assert first["losses"]["w1"] != second["losses"]["w1"]


def killed(folder, lines, *given, **changes):
    """Leaves the folder of a run that was killed after so many lines of metrics."""
    options = arguments("--out", folder, *given, **changes)
    done = finished_process(interrupted(signal.SIGKILL, lines, *options))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines", [1, 3, 4, 6], ids=["first_round", "mid_search", "end_of_search", "mid_training"]
)
def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path, lines):
    folder = tmp_path / "killed"
    killed(folder, lines)
    resumed = resume(folder)
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(folder) == outcome(whole[0])


def test_resuming_a_complete_run_prints_its_result(whole):
    folder, printed = whole
    before = outcome(folder)
    resumed = resume(folder)
    assert resumed.returncode == 0
    assert "The run is complete, so nothing is left to do." in resumed.stdout
    assert "nothing is left to do" not in printed
    assert printed.splitlines()[-2] == resumed.stdout.splitlines()[-2]
    assert outcome(folder) == before


@pytest.mark.parametrize("order", ["first", "second"])
def test_orders_decide_whether_responses_are_differentiated(tmp_path, order):
    folder = tmp_path / order
    finished = run("--out", folder, "--order", order, **{"search.steps": 1, "evaluation.epochs": 1})
    assert finished.returncode == 0, finished.stderr
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert bool(first["solves"]) == (order == "second")


def test_a_genotype_is_evaluated_alone(whole, tmp_path):
    """A genotype is evaluated alone, and a random one for comparison."""
    for name, genotype in (("found", whole[0] / "genotype.json"), ("random", "random:3")):
        place = ("--threads=1", "--out", tmp_path / name)
        finished = called(evaluate, genotype, "digits", *settings(), *place)
        assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "found" / "result.json").read_text())
    of_run = json.loads((whole[0] / "result.json").read_text())
    assert of_run.pop("generator")["gan_test"] >= 0  # a search has one
    assert found == of_run
    assert (
        json.loads((tmp_path / "random" / "result.json").read_text())["genotype"]
        != found["genotype"]
    )


def test_an_error_is_one_paragraph_with_exit_code_2(tmp_path):
    """An error is one paragraph with exit code 2 and no traceback."""
    program = [sys.executable, "-m", "lfmcw_app.run", "digits", "--out", tmp_path / "x"]
    finished = finished_process([*program, "--preset", "smal"])
    assert finished.returncode == 2
    assert "Did you mean 'small'" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stderr.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()


def test_a_run_whose_numbers_are_lost_stops_and_says_where(tmp_path):
    finished = run("--out", tmp_path / "x", **{"search.weights.lr": 1e30})
    assert finished.returncode == 2
    assert "is not finite" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "x" / "genotype.json").exists()


def test_the_baseline_runs_and_resumes_without_a_generator(tmp_path):
    finished = run(
        "--out", tmp_path / "darts", "--method", "darts", **{"search.gradient_terms_every": 2}
    )
    assert finished.returncode == 0, finished.stderr
    assert not (tmp_path / "darts" / "samples.png").exists()
    entries = [
        json.loads(line) for line in (tmp_path / "darts" / "metrics.jsonl").read_text().splitlines()
    ]
    terms = [entry["gradient_terms"] for entry in entries if "gradient_terms" in entry]
    assert len(terms) == 2
    assert set(terms[0]) == {"direct", "w2"}


def test_a_trial_takes_few_rounds_of_every_phase(tmp_path):
    """They come after a projection of the whole run.

    Warm-ups are left out, so that the architecture moves in it.
    """
    warm = {"search.steps": 1000, "search.architecture.warmup_epochs": 1, "checkpoint_every": 1}
    finished = run("--out", tmp_path / "trial", "--max-steps", 1, **warm)
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout
    assert (
        said.index("Measuring two rounds of each phase")
        < said.index("1,000")
        < said.index("peak memory")
        < said.index("A trial with a meaningless result; rounds of each phase: 1.")
        < said.index("test error")
    )
    entries = [
        json.loads(line) for line in (tmp_path / "trial" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [entry["phase"] for entry in entries] == ["search", "training"]
    assert "arch" in entries[0]["losses"]
    assert json.loads((tmp_path / "trial" / "result.json").read_text())["trial"] is True
    assert "a trial: the result says nothing" in (tmp_path / "trial" / "report.html").read_text()


def test_cells_can_be_drawn_instead_of_searched(tmp_path):
    finished = run("--out", tmp_path / "x", "--method", "random", "--seed", 4)
    assert finished.returncode == 0, finished.stderr
    genotype = Genotype.load(tmp_path / "x" / "genotype.json")
    assert genotype == random_genotype(1, 4, TINY["search.primitives"])
    phases = {
        json.loads(line)["phase"]
        for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()
    }
    assert phases == {"training"}


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    finished = run(
        "--out", tmp_path / "x", "--method", "darts", **{"search.synthetic_only": "true"}
    )
    assert finished.returncode == 2
    assert "synthetic_only needs generated images" in finished.stderr
    finished = run("--out", tmp_path / "x", "--method", "dart")
    assert finished.returncode == 2
    assert "search.method" in finished.stderr
    assert not (tmp_path / "x").exists()


SPACES = {
    "pdarts": {
        "search.steps": 2,
        "search.progressive.added_layers": "[0, 1, 2]",
        "search.nodes": 2,
        "search.primitives": None,
    },
    "pcdarts": {
        "search.steps": 3,
        "search.partial_channels": 2,
        "search.architecture.warmup_epochs": 0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("space", "lines"), [("pdarts", 3), ("pdarts", 5), ("pcdarts", 2)])
def test_every_space_runs_and_resumes_bit_for_bit_from_any_stage(space, lines, tmp_path):
    options = {**SPACES[space], "checkpoint_every": 1, "evaluation.epochs": 2}
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    finished = run("--out", whole, "--space", space, **options)
    assert finished.returncode == 0, finished.stderr
    killed(folder, lines, "--space", space, **options)
    resumed = resume(folder)
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(folder) == outcome(whole)
    metrics = (folder / "metrics.jsonl").read_text()
    phases = [json.loads(line)["phase"] for line in metrics.splitlines()]
    stages = (
        ["search-1"] * 2 + ["search-2"] * 2 + ["search-3"] * 2
        if space == "pdarts"
        else ["search"] * 3
    )
    assert phases[: len(stages)] == stages


@pytest.mark.parametrize("generator", ["wgan_gp", "biggan"])
def test_every_generator_runs(generator, tmp_path):
    options = {
        "search.generator.name": generator,
        "search.steps": 2,
        "search.generator.noise_dim": 8,
    }
    finished = run("--out", tmp_path / "run", **options, **{"evaluation.epochs": 1})
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "samples.png").exists()


def test_a_norm_that_does_not_fit_the_game_is_refused(tmp_path):
    options = {"search.generator.name": "wgan_gp", "search.generator.discriminator_norm": "batch"}
    finished = run("--out", tmp_path / "run", **options)
    assert finished.returncode == 2
    assert "the game of wgan_gp takes group, instance, none" in finished.stderr


def test_a_folder_of_images_is_a_data_set(tmp_path):
    for index in range(48):
        folder = tmp_path / "pictures" / ("light" if index % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        image = torch.randint(
            100, (3, 20, 20), generator=torch.Generator().manual_seed(index)
        ) + 150 * (index % 2)
        Image.fromarray(image.movedim(0, -1).to(torch.uint8).numpy()).save(folder / f"{index}.png")
    changes = {"data.search_images": "null", "data.train_images": "null", "search.steps": 2}
    place = ("--preset=smoke", "--threads=1", "--out", tmp_path / "run")
    pictures = f"folder:{tmp_path / 'pictures'}"
    finished = called(run_command, pictures, *settings(**changes), *place)
    assert finished.returncode == 0, finished.stderr
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text())["test_top5_error_percent"]
        is None
    )


@pytest.mark.parametrize("space", ["darts", pytest.param("pdarts", marks=pytest.mark.slow)])
def test_a_dry_run_projects_every_phase_and_writes_nothing(space, tmp_path, monkeypatch):
    options = {**SPACES["pdarts"], "search.nodes": 1} if space == "pdarts" else {}
    monkeypatch.chdir(tmp_path)
    finished = run("--dry-run", "--space", space, "--out", tmp_path / "run", **options)
    assert finished.returncode == 0, finished.stderr
    phases = ["search-1", "search-2", "search-3"] if space == "pdarts" else ["search"]
    for phase in (*phases, "training", "all", "peak memory"):
        assert phase in finished.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"search.architecture.warmup_epochs": 1000},
            "search.architecture.warmup_epochs (1000 epochs",
        ),
        ({"evaluation.weights.warmup_epochs": 9}, "must be below evaluation.epochs"),
        ({"evaluation.stem": "imagenet"}, "evaluation.stem is imagenet"),
        ({"search.stem": "imagenet"}, "The imagenet stem"),
        (
            {"search.space": "pdarts", "search.progressive.added_layers": "[-3, 0, 0]"},
            "at least 3 in each stage",
        ),
    ],
    ids=["architecture warm-up", "learning rate warm-up", "stem", "search stem", "no cells"],
)
def test_what_could_not_end_well_is_refused_at_once(options, words, tmp_path):
    """What could not end well is refused before anything is written."""
    finished = run("--out", tmp_path / "run", **options)
    assert finished.returncode == 2, finished.stdout
    assert words in finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_space_by_set_must_not_contradict_the_option(tmp_path):
    """A space by --set has the preset's settings for it, and must not contradict the option."""
    space = {"search.space": "pdarts", "search.primitives": None}
    printed = run("--print-config", "--preset=smoke", **space).stdout
    assert "- 0\n    - 1\n    - 2" in printed
    finished = run("--space", "darts", "--set=search.space=pdarts")
    assert finished.returncode == 2
    assert "contradict" in finished.stderr


def test_a_quiet_run_prints_nothing(tmp_path):
    """A quiet run prints nothing, and writes event files if asked."""
    folder = tmp_path / "run"
    short = {"search.steps": 1, "search.order": "first", "evaluation.epochs": 1}
    finished = run("--out", folder, "--quiet", "--tensorboard", "--method", "darts", **short)
    assert (finished.returncode, finished.stdout) == (0, "")
    assert finished.stderr == ""
    assert {path.name for path in (folder / "tensorboard").iterdir()} == {"search", "training"}
    assert (folder / "result.json").exists()
