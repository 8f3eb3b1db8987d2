"""`lfmcw_app.evaluate`: what resumes after a stop, what is refused, projections and trials."""

from __future__ import annotations

import json

import pytest
import typer
from interrupted_runs import RECIPE, Killed, kill_after
from typer.testing import CliRunner

from lfmcw_app.commands.evaluate import evaluate
from lfmcw_app.commands.run import run
from lfmcw_app.run_folder import RunFolder

SETTINGS = [
    f"--set={key}={value}"
    for key, value in RECIPE.items()
    if key not in ("dataset", "search.method")
]


def call(command, *arguments):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    result = CliRunner().invoke(app, [*map(str, arguments), "--threads=1"])
    return result.exit_code, " ".join(result.output.split())


def outcome(folder):
    names = ("metrics.jsonl", "evaluated.json", "result.json", "config.yaml")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    code, printed = call(
        evaluate, "random:1", "digits", "--preset=smoke", "--out", folder, *SETTINGS
    )
    assert code == 0, printed
    return folder


@pytest.mark.parametrize(
    "lines", [1, 3, 7], ids=["before the first checkpoint", "at one", "behind two"]
)
def test_a_killed_evaluation_resumes_bit_for_bit(whole, tmp_path, monkeypatch, lines):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_after(patch, lines)
        with pytest.raises(Killed):
            call(evaluate, "random:1", "digits", "--preset=smoke", "--out", folder, *SETTINGS)
    code, printed = call(evaluate, "--resume", folder)
    assert code == 0, printed
    assert outcome(folder) == outcome(whole)


def test_a_complete_evaluation_prints_its_result_again(whole):
    before = outcome(whole)
    code, printed = call(evaluate, "--resume", whole)
    assert code == 0
    assert "test error" in printed
    assert outcome(whole) == before


def test_what_resume_cannot_take_is_refused(whole, runs, tmp_path):
    search = RunFolder.create(tmp_path / "search", runs.recipe())
    for command, arguments, words in (
        (evaluate, ["random:2", "digits", "--resume", whole], "a genotype other than random:2"),
        (evaluate, ["--resume", whole, "--seed=3"], "seed 0 → 3. This cannot change"),
        (evaluate, ["--resume", whole, "--set=search.weights.lr=0.1"], "has no search"),
        (evaluate, ["--resume", whole, "--set=on_nonfinite=skip"], "is complete"),
        (evaluate, ["--resume", search.path], f"python -m lfmcw_app.run --resume {search.path}"),
        (evaluate, ["--resume", tmp_path / "nowhere"], "there is no such folder"),
        (
            evaluate,
            ["--resume", whole, "--max-steps", "2"],
            "--max-steps starts a separate trial",
        ),
        (evaluate, ["random:1"], "Name a data set after the genotype"),
        (run, ["--resume", whole], f"python -m lfmcw_app.evaluate --resume {whole}"),
    ):
        code, printed = call(command, *arguments)
        assert code == 2, printed
        assert words in printed


def test_an_evaluation_can_be_projected_and_tried(tmp_path):
    given = ("random:1", "digits", "--preset=smoke", *SETTINGS)
    code, printed = call(evaluate, *given, "--out", tmp_path / "none", "--dry-run")
    assert code == 0
    assert "training" in printed and "peak memory" in printed
    assert not (tmp_path / "none").exists()
    code, printed = call(evaluate, *given, "--out", tmp_path / "trial", "--max-steps", 3)
    assert code == 0
    assert "peak memory" in printed and "rounds of each phase: 3." in printed
    assert len((tmp_path / "trial" / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "trial" / "result.json").read_text())["trial"] is True


# ------------------------------ genotypes and weights of another run


def test_an_evaluation_draws_the_cells_that_it_was_given(whole):
    assert {"cells.png", "cells.svg"} <= {path.name for path in whole.iterdir()}


@pytest.fixture(scope="module")
def continued(whole, tmp_path_factory):
    """An evaluation of the same cells that begins with the weights of `whole`."""
    folder = tmp_path_factory.mktemp("continued") / "run"
    code, printed = call(
        evaluate, whole, "digits", "--preset=smoke", "--init", whole, "--out", folder, *SETTINGS
    )
    assert code == 0, printed
    assert "Starting weights: the network in" in printed
    return folder


def test_an_evaluation_goes_on_from_the_weights_of_another(whole, continued):
    def first_loss(folder):
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["losses"]

    assert first_loss(continued)["network"] < first_loss(whole)["network"]
    assert (continued / "evaluated.json").read_bytes() == (whole / "evaluated.json").read_bytes()
    init = json.loads((continued / "result.json").read_text())["init"]
    assert init["run"] == str(whole)
    assert f"digest: {init['digest']}" in (continued / "config.yaml").read_text()


def test_starting_weights_are_needed_until_the_first_checkpoint(
    whole, continued, tmp_path, monkeypatch
):
    moved = whole.with_name("moved")
    for lines, needs in ((1, True), (7, False)):
        folder = tmp_path / f"after-{lines}"
        with monkeypatch.context() as patch:
            kill_after(patch, lines)
            with pytest.raises(Killed):
                call(
                    evaluate, whole, "digits", "--preset=smoke", "--init", whole,
                    "--out", folder, *SETTINGS,
                )  # fmt: skip
        whole.rename(moved)
        try:
            code, printed = call(evaluate, "--resume", folder)
            if needs:
                assert code == 2
                assert "There is no run folder" in printed
                code, printed = call(
                    evaluate, "--resume", folder, f"--set=evaluation.init.run={moved}"
                )
            assert code == 0, printed
        finally:
            moved.rename(whole)
        for name in ("metrics.jsonl", "evaluated.json"):
            assert (folder / name).read_bytes() == (continued / name).read_bytes()
