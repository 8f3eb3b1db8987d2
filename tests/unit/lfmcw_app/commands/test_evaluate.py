"""The command line of an evaluation: genotypes by name. Evaluations are tried in tests/faults."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from lfmcw_app.commands.evaluate import evaluate
from lfmcw_app.errors import InputError
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Genotype, random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES


@pytest.fixture
def call(monkeypatch):
    """Runs the command up to its training; returns its exit code, what it says, and the genotype
    that it would train.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(evaluate)

    def run(*arguments):
        taken = []

        def train(recipe, dataset, device, *, searches, genotype):
            taken.append(genotype)
            raise InputError("caught")

        monkeypatch.setattr("lfmcw_app.commands.preparation.project", train)
        arguments = [*map(str, arguments), "--dry-run", "--threads=1"]
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, " ".join(result.output.split()), taken

    return run


SMOKE = ("digits", "--preset=smoke", "--set=search.nodes=2")


def test_a_published_genotype_has_a_name(call):
    assert call("PDARTS", *SMOKE)[2] == [NAMED_GENOTYPES["PDARTS"]]


def test_a_random_genotype_has_a_number(call):
    assert call("random:17", *SMOKE)[2] == [random_genotype(2, 17)]


def test_a_genotype_is_read_from_a_file(call, tmp_path):
    path = tmp_path / "genotype.json"
    genotype = random_genotype(3, 1)
    path.write_text(genotype.to_json())
    assert call(path, *SMOKE)[2] == [genotype] == [Genotype.load(path)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("random:x", *SMOKE), "random:N with a whole number N"),
        ((f"random:{2**62}", *SMOKE), "below 2**62"),
        (("PDART", *SMOKE), "Did you mean 'PDARTS'"),
        ((), "Name a genotype and a data set"),
        (("random:0",), "Name a data set after the genotype 'random:0'"),
        (("random",), "Name a data set after"),
        (("random", *SMOKE), "A random one is random:N"),
    ],
)
def test_what_is_no_genotype_is_refused(call, arguments, words):
    code, printed, taken = call(*arguments)
    assert (code, taken) == (2, [])
    assert words in printed


def test_a_search_is_not_resumed_as_an_evaluation(call, tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    code, printed, _ = call("--resume", folder.path)
    assert code == 2
    assert f"python -m lfmcw_app.run --resume {folder.path}" in printed


def test_the_memory_of_a_gpu_is_told_without_one():
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(evaluate)
    small = ("--set=evaluation.channels=2", "--set=evaluation.batch_size=8", "--threads=1")
    result = CliRunner().invoke(app, ["random:0", *SMOKE, *small, "--dry-run", "--device=meta"])
    assert result.exit_code == 0, result.output
    assert "GPU memory, counted on the meta device" in result.output
    assert "│ training │" in result.output
    assert "│ search" not in result.output
    refused = CliRunner().invoke(app, ["random:0", *SMOKE, "--device=meta"])
    assert refused.exit_code == 2
    assert "has shapes but no numbers" in " ".join(refused.output.split())
