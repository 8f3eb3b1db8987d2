"""What wrong input gets: what is wrong, what was received, what to do; exit code 2; nothing
half-written.
"""

from __future__ import annotations

import pytest
import typer
import yaml
from typer.testing import CliRunner

from lfmcw_app.commands import options
from lfmcw_app.commands.run import run
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import EVALUATED
from lfmcw_app.run_folder import RunFolder


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Runs the command line in an empty folder without a network."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lfmcw_app.readers.FASHION_MNIST_PACKAGE", tmp_path / "nowhere")

    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digit"], ["'digit'", "Did you mean 'digits'", "fashion-mnist"]),
        (["digits", "--preset", "smoky"], ["'smoky'", "Did you mean 'smoke'"]),
        (
            ["digits", "--set", "search.chanels=8"],
            ["'search.chanels'", "Did you mean 'search.channels'"],
        ),
        (["digits", "--set", "serch.channels=8"], ["'serch'", "Did you mean 'search.channels'"]),
        (
            ["digits", "--set", "search.channels=many"],
            ["'search.channels'", "'many'", "whole number"],
        ),
        (
            ["digits", "--set", "search.channels=0"],
            ["'search.channels'", "at least 4", "0"],
        ),
        (["digits", "--set", "search.weights.min_lr=3"], ["min_lr", "must not be above lr"]),
        (
            ["digits", "--set", "search.hypergradient=dart"],
            ["hypergradient", "Did you mean 'darts'"],
        ),
        (["digits", "--set", "search.hypergradient={w3: darts}"], ["'w3'", "Did you mean"]),
        (["digits", "--set", "search.epochs=3"], ["either epochs or steps"]),
        (["digits", "--set", "search.channels"], ["key=value"]),
        (["digits", "--set", "seed.x=1"], ["'seed'", "whole number"]),
        (["digits", "--set", "seed.x.y=1"], ["'seed'"]),
        (["digits", "--set", "search={"], ["not valid YAML"]),
        (
            ["digits", "--set", "search.batch_size=5000"],
            ["search.batch_size", "719 images", "5000"],
        ),
        (["digits", "--set", "data.image_size=10"], ["divisible by 4"]),
        (["digits", "--order", "third"], ["'search.order'", "'first' or 'second'", "'third'"]),
        (
            ["digits", "--set", "search.architecture.betas=[2, 3]"],
            ["'search.architecture.betas[0]'", "less than 1"],
        ),
        (["digits", "--set", "search.lambda=.inf"], ["'search.lambda'", "finite"]),
        (["digits", "--seed", "99999999999999999999"], ["'seed'", "less than"]),
        (["digits", "--set", "seed=2020-13-45"], ["a whole number", "2020-13-45"]),
        (["digits", "--set", "search.hypergradient={name: [1]}"], ["is a string", "[1]"]),
        (["digits", "--set", "dataset=cifar10"], ["DATASET"]),
        (["digits", "--preset", "paper"], ["cutout is 16", "8 pixels"]),
        (["digits", "--device", "tpu"], ["'tpu'", "cpu, cuda or auto"]),
        (["digits", "--config", "missing.yaml"], ["missing.yaml", "there is no file"]),
        (
            ["digits", "--set", "data.train_images=20", "--set", "evaluation.batch_size=32"],
            ["evaluation.batch_size", "20 images"],
        ),
        (["digits", "--resume", "nowhere"], ["nowhere", "there is no such folder"]),
        (["fashion-mnist"], ["could not be downloaded", "train-images-idx3-ubyte.gz", "digits"]),
        (["cifar100"], ["cifar-100-binary.tar.gz", "data", "digits"]),
        ([], ["Name a data set", "digits"]),
        (["random:cifar11"], ["random:", "Did you mean 'cifar10'"]),
        (["digits", "--set", "evaluation.steps=3"], ["either epochs or steps"]),
        (
            ["digits", "--set", "evaluation={epochs: null, steps: 5, weights: {warmup_epochs: 1}}"],
            ["evaluation.steps (5)"],
        ),
        (["--resume", "nowhere", "--max-steps", "2"], ["nowhere", "there is no such folder"]),
    ],
    ids=lambda value: (
        " ".join(map(str, value)) if isinstance(value, list) and "--" in str(value) else None
    ),
)
def test_wrong_input_gets_advice(invoke, tmp_path, arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    for word in words:
        assert word in text, text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_wrong_configuration_files_get_advice(invoke, tmp_path):
    for content, words in {
        "search: [1": ["not valid YAML"],
        "- 1": ["list", "mapping"],
        "search: {lambda: -1}": ["'search.lambda'", "at least 0"],
        "serach: {}": ["Did you mean 'search'"],
        "!!python/object/apply:os.system ['true']": ["not valid YAML"],
    }.items():
        (tmp_path / "c.yaml").write_text(content)
        result = invoke("digits", "--config", tmp_path / "c.yaml")
        assert result.exit_code == 2
        assert all(word in " ".join(result.output.split()) for word in words), result.output


def test_an_unknown_option_is_refused_with_the_nearest(invoke):
    result = invoke("digits", "--presett", "smoke")
    assert result.exit_code == 2
    assert "--preset" in result.output


def test_an_out_folder_with_another_run_is_left_alone(invoke, tmp_path):
    RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    result = invoke("digits", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "another run" in result.output
    assert "--resume" in result.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    assert "something else" in invoke("digits", "--out", tmp_path / "other").output


def test_a_run_is_not_resumed_with_another_recipe(invoke, tmp_path):
    RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    for arguments in (
        ["cifar10", "--resume", tmp_path / "run"],
        ["digits", "--resume", tmp_path / "run", "--seed", 7],
        ["digits", "--resume", tmp_path / "run", "--preset", "small"],
        ["--resume", tmp_path / "run", "--set", "search.channels=8"],
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        text = " ".join(result.output.split())
        assert "another recipe" in text
        assert (
            arguments[0] == "cifar10"
            or "Settings that can: on_nonfinite, checkpoint_every," in text
        )
    result = invoke("--resume", tmp_path / "run", "--seed", 0, "--print-config")
    assert result.exit_code == 0
    assert result.output == load_recipe("smoke").to_yaml()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 truncated", None], ids=["empty", "truncated", "foreign"]
)
def test_a_damaged_or_foreign_checkpoint_is_refused(invoke, tmp_path, content):
    import mlo

    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    path = folder.path / "search.pt"
    if content is None:
        state = {
            "recipe": load_recipe("small").to_yaml(),
            "phase": "search",
            "metrics_bytes": 0,
            "optimizer": {},
        }
        mlo.save_checkpoint(state, path)
    else:
        path.write_bytes(content)
    result = invoke("--resume", folder.path)
    assert result.exit_code == 2
    assert "search.pt" in result.output.replace("\n", "")
    assert ("never had" if content is None else "truncated") in " ".join(result.output.split())


def test_a_download_that_fails_leaves_the_users_empty_folders(invoke, tmp_path):
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    assert invoke("cifar10", "--data", tmp_path / "mine" / "inner").exit_code == 2
    assert (tmp_path / "mine" / "inner").is_dir()


def test_the_folder_of_an_evaluation_is_not_resumed_as_a_search(invoke, tmp_path):

    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.write(EVALUATED, "{}")
    result = invoke("--resume", folder.path)
    assert result.exit_code == 2
    assert "evaluation of a given genotype" in " ".join(result.output.split())


def test_a_damaged_result_is_named(invoke, tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.write("result.json", "")
    result = invoke("--resume", folder.path)
    assert result.exit_code == 2
    assert "result.json" in result.output.replace("\n", "")


# ------------------------------ recipes


def test_print_config_prints_what_would_run_and_runs_nothing(invoke, tmp_path):
    result = invoke(
        "digits", "--print-config", "--set", "search.lambda=2.5", "--seed", 4, "--order", "first"
    )
    assert result.exit_code == 0
    recipe = Recipe.model_validate(yaml.safe_load(result.output))
    assert (recipe.search.lam, recipe.seed, recipe.search.order, recipe.preset) == (
        2.5,
        4,
        "first",
        "smoke",
    )
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_option_with_its_default(invoke):
    text = " ".join(invoke("--help").output.split())
    for option in (
        "--preset",
        "--space",
        "--order",
        "--method",
        "--config",
        "--set",
        "--out",
        "--seed",
        "--resume",
        "--print-config",
    ):
        assert option in text
    assert "[default: data]" in text


def test_a_run_sets_its_threads(invoke, monkeypatch):
    def caught(threads, preset):
        raise InputError(f"{threads} of {preset}")

    monkeypatch.setattr(options, "set_threads", caught)
    assert (
        "2 of small"
        in invoke(
            "digits", "--preset", "small", "--threads", "2", "--set", "data.image_size=8"
        ).stderr
    )
