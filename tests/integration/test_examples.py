"""The examples run as their users run them, and what they print holds."""

from __future__ import annotations

import ast
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from started_processes import finished

from mlo.testing import bilevel_quadratic

EXAMPLES = Path(__file__).parents[2] / "examples"


UNDER = {
    "architecture_search.py": 125,
    "few_shot.py": 220,
    "gan_game.py": 150,
    "learning_from_mistakes.py": 170,
    "transformer_reweighting.py": 190,
}
"""Lines that these examples stay under; the others have at most 120."""


def output_of(name: str, folder: Path, *arguments: object) -> str:
    """What an example prints, run in an empty folder; a warning of mlo or of PyTorch is a failure.

    An example leaves nothing behind but the picture that its `--picture` names.
    """
    assert "--picture" in arguments
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    result = finished([sys.executable, EXAMPLES / name, *arguments], cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    picture = [
        folder / arguments[k + 1] for k, argument in enumerate(arguments) if argument == "--picture"
    ]
    assert list(folder.iterdir()) == picture
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in picture)
    return result.stdout


def change(printed: str, label: str) -> tuple[float, float]:
    """The two numbers of the line `label: before -> after`."""
    found = re.search(rf"^{re.escape(label)}: (\S+) -> (\S+)$", printed, re.MULTILINE)
    assert found, printed
    return float(found[1]), float(found[2])


def number(printed: str, label: str) -> float:
    """The number behind `label` and a blank."""
    found = re.search(rf"{re.escape(label)} (-?\d+(?:\.\d+)?)", printed)
    assert found, printed
    return float(found[1])


def test_every_example_is_tested_and_short():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    source = Path(__file__).read_text()
    assert names
    for name in names:
        text = (EXAMPLES / name).read_text()
        assert re.search(rf'output_of\(\s*"{re.escape(name)}"', source), name
        assert f"python examples/{name}" in ast.get_docstring(ast.parse(text))
        assert len(text.splitlines()) < UNDER.get(name, 160), name


@pytest.mark.slow
def test_learned_regularisation_finds_the_decoys(tmp_path):
    """Learned regularisation finds the decoys and helps on test images."""
    printed = output_of("hyperparameter_optimization.py", tmp_path, "--picture", "decays.png")
    before, after = change(printed, "test loss")
    assert after < 0.8 * before
    before, after = change(printed, "test accuracy (%)")
    assert after > before + 2
    assert number(printed, "decoys") > 5 * number(printed, "median decay: pixels")


@pytest.mark.slow
def test_regularisation_by_cg_agrees_with_the_dense_solve(tmp_path):
    """The learned regularisation is the same by conjugate gradients and by a dense solve."""
    by = {}
    for engine in ("cg", "direct"):
        folder = tmp_path / engine
        folder.mkdir()
        by[engine] = output_of(
            "hyperparameter_optimization.py",
            folder,
            "--engine",
            engine,
            "--steps",
            4,
            "--picture",
            "decays.png",
        )
    for label in ("validation loss", "test loss"):  # cg stops at a residual of 1e-2
        assert change(by["cg"], label) == pytest.approx(change(by["direct"], label), abs=5e-4)


@pytest.mark.slow
def test_data_reweighting_finds_the_wrong_labels(tmp_path):
    printed = output_of(
        "data_reweighting.py",
        tmp_path,
        "--dataset",
        "digits",
        "--steps",
        20,
        "--picture",
        "weights.png",
    )
    before, after = change(printed, "validation loss")
    assert after < 0.9 * before
    before, after = change(printed, "test accuracy (%)")
    assert after > before
    assert float(re.search(r"^AUC: (\S+)$", printed, re.MULTILINE)[1]) > 0.9


@pytest.mark.slow
def test_the_program_from_betty_learns_what_a_high_loss_means(tmp_path):
    """The program from Betty learns that a high loss is a wrong label."""
    printed = output_of("from_betty.py", tmp_path, "--steps", 150, "--picture", "weights.png")
    assert number(printed, "right labels") > number(printed, "wrong labels") + 0.2
    assert number(printed, "AUC:") > 0.95
    assert number(printed, "weighted") > number(printed, "all alike") + 3


@pytest.mark.slow
def test_the_program_from_betty_learns_the_same_on_bettys_engine(tmp_path):
    """Not the same numbers: Betty's darts leaves out the learning rate, which Adam's epsilon sees.

    And its differences see through what the loss detaches, which the example's `mlo.once` prevents.
    """
    pytest.importorskip("betty", reason="betty-ml is not installed (make betty)")
    arguments = ("--steps", 50, "--picture", "weights.png")
    theirs = output_of("from_betty.py", tmp_path, *arguments, "--on-betty")
    assert theirs.startswith("Betty ")
    ours = output_of("from_betty.py", tmp_path, *arguments)
    for label in ("right labels", "wrong labels"):
        assert number(theirs, label) == pytest.approx(number(ours, label), abs=0.06)
    for printed in (theirs, ours):
        assert number(printed, "wrong labels") < 0.3  # about 0.5 at first


@pytest.mark.slow
def test_few_shot_methods_learn_to_adapt(tmp_path):
    printed = output_of("few_shot.py", tmp_path, "--steps", 40, "--picture", "few_shot.png")
    control = number(printed, "control, accuracy (%) on new tasks:")
    for method in ("MAML", "FOMAML", "iMAML", "ANIL", "Meta-SGD"):
        before, after = change(printed, f"{method}, accuracy (%) on new tasks")
        assert before < control + 3
        assert after > control + 5


@pytest.mark.slow
def test_the_regulariser_of_the_gan_learns_through_both_players(tmp_path):
    arguments = ("--steps", 20, "--picture", "gan.png")
    printed = output_of("gan_game.py", tmp_path, *arguments)
    # The penalty reaches the generator through the discriminator alone.
    before, after = change(printed, "penalty r")
    assert after > 1.1 * before
    assert number(printed, "learned") < number(printed, "fixed")


@pytest.mark.slow
def test_class_weights_find_the_mistakes_and_all_paths_are_used(tmp_path):
    """Three levels and a game: the gradient reaches the architecture along each of its paths."""
    printed = output_of(
        "learning_from_mistakes.py", tmp_path, "--steps", 60, "--picture", "mistakes.png"
    )
    assert number(printed, "threes") > 3 * number(printed, "mean of the others")
    parts = re.findall(r"^gradient along (.+): (\S+)$", printed, re.MULTILINE)
    assert [path for path, _ in parts] == ["a -> game -> w2", "a -> w1 -> w2", "a -> w2"]
    assert all(0 < float(norm) < math.inf for _, norm in parts)


@pytest.mark.slow
def test_architecture_search_chooses_better_than_chance(tmp_path):
    printed = output_of(
        "architecture_search.py", tmp_path, "--steps", 40, "--picture", "search.png"
    )
    assert number(printed, "mean weight") > number(printed, "uniform:") + 0.1
    assert number(printed, "(%): chosen") > number(printed, "random mean") + 5


@pytest.mark.slow
def test_the_learned_schedule_beats_the_best_constant_rate(tmp_path):
    printed = output_of(
        "learning_rate_schedule.py", tmp_path, "--steps", 40, "--picture", "schedule.png"
    )
    learned, reverse, constant = (
        number(printed, f"test, {label}: loss")
        for label in ("learned", "learned, reversed", "best constant")
    )
    assert learned < constant
    assert learned < reverse  # the order of the rates was learned, not only their size


@pytest.mark.slow
def test_data_distillation_beats_as_many_real_images(tmp_path):
    printed = output_of(
        "data_distillation.py", tmp_path, "--steps", 20, "--picture", "distilled.png"
    )
    before, after = change(printed, "synthetic images")
    assert after > before + 10
    assert after > number(printed, "best") + 5


@pytest.mark.slow
def test_the_transformer_learns_which_source_is_corrupted(tmp_path):
    arguments = ("--steps", 20, "--train-steps", 60, "--picture", "sources.png")
    printed = output_of("transformer_reweighting.py", tmp_path, *arguments)
    assert number(printed, "learned weight of mail") < 0.12
    assert number(printed, "learned weights: loss") < number(printed, "equal weights: loss")


@pytest.mark.slow
def test_a_source_that_is_not_corrupted_keeps_its_weight(tmp_path):
    arguments = ("--share", 0, "--steps", 20, "--train-steps", 1, "--picture", "sources.png")
    printed = output_of("transformer_reweighting.py", tmp_path, *arguments)
    assert number(printed, "learned weight of mail") > 0.18


@pytest.mark.slow
def test_the_custom_engine_keeps_its_bound(tmp_path):
    condition, dim = 25.0, 40
    arguments = (
        "--steps",
        1,
        5,
        20,
        60,
        "--condition",
        condition,
        "--seed",
        3,
        "--picture",
        "errors.png",
    )
    printed = output_of("custom_engine.py", tmp_path, *arguments)
    assert float(re.search(r"^direct: error (\S+)$", printed, re.MULTILINE)[1]) < 1e-10
    cells = re.findall(r"\| (\d+) " + r"\| (\S+) " * 4 + r"\|", printed)
    rows = [list(map(float, row)) for row in cells]
    assert [row[0] for row in rows] == [1, 5, 20, 60]

    # With r = Aq - v the hypergradient's error is B^T A^-1 r, so it is at most |B| |r| /
    # lambda_min.
    problem = bilevel_quadratic(dim=dim, condition=condition, seed=3)
    w, x = problem.value("w"), problem.value("x")
    cross = torch.autograd.functional.hessian(problem.losses["w"], (w, x))[0][1]
    v = torch.autograd.functional.jacobian(lambda w: problem.losses["x"](x, w), w)
    scale = float(torch.linalg.matrix_norm(cross, 2) * v.norm() * condition / problem.exact.norm())
    rate = (math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)
    for steps, residual, bound, error, neumann in rows:
        derived = 2 / (rate**steps + rate**-steps)  # 1 / T_K((c + 1) / (c - 1))
        assert bound == pytest.approx(derived, rel=0.01)
        assert residual <= 1.01 * derived  # 1 %: printed to three digits
        assert error <= 1.01 * scale * derived
        assert error < neumann
    assert rows[-1][3] < 1e-6
