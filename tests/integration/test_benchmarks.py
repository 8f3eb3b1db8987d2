"""The benchmarks' short versions run, and what they compare comes out as it must; no time is
tested.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from started_processes import finished

from lfmcw_app.lookup import open_table

ROOT = Path(__file__).parents[2]


def output_of(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = finished([sys.executable, ROOT / "benchmarks" / name, *arguments], env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def rows(printed, first):
    """The cells of every row of the tables that begins with a value."""
    return [row for row in cells_of(printed.splitlines()) if row[0] == first]


def cells_of(lines):
    """The cells of every line that is a row of a table."""
    cells = [line.strip("|").split("|") for line in lines if line[:1] == "|"]
    return [list(map(str.strip, row)) for row in cells]


def rows_after(printed, head):
    """The cells of every row of the table whose head begins so."""
    return cells_of(printed[printed.index(head) :].splitlines()[2:])


@pytest.mark.slow
def test_engines_beside_other_libraries():
    printed = output_of("engines.py", "--quick", "--problem", "layered")
    ours = {row[1]: row for row in rows(printed.split("ms per step")[0], "mlo")}
    assert float(ours["darts"][3]) < 1e-6  # against the derivative of one step
    assert float(ours["cg, K=10"][2]) < 1e-2  # against the implicit gradient
    assert int(ours["darts"][10]) > 5  # passes of autograd
    if any(row[1] == "-" for row in rows(printed, "Betty")):
        pytest.skip("betty-ml is not installed (make betty)")
    theirs = {row[1]: row for row in rows(printed.split("ms per step")[0], "Betty")}
    for method in ("darts", "cg, K=10"):
        assert float(theirs[method][3 if method == "darts" else 2]) > 0.1
        assert int(theirs[method][9]) > int(ours[method][9])  # evaluations of losses


@pytest.mark.slow
def test_the_notes_of_the_comparison_are_measured():
    """What docs/comparison.md says of Betty is what the program prints."""
    printed = output_of("comparison_notes.py")
    if "betty-ml not installed" in printed:
        pytest.skip("betty-ml is not installed (make betty)")
    page = " ".join((ROOT / "docs" / "comparison.md").read_text("utf-8").split())
    assert "three levels, darts: error 0.61" in printed
    assert "its error is 61%" in page
    assert printed.count("is not supported for higher order MLO") == 2  # neumann and cg
    assert "a frozen parameter: RuntimeError" in printed
    assert "darts at a rate of 0.1: 10 times as long" in printed
    assert "dropout of 0.1: error 35\n" in printed
    assert "is 35 times as large" in page
    assert "errors 0.42, 0.41, 0.56, 0.92, 0.96, 2.14" in printed
    assert "errors of 0.42, 0.41, 0.56, 0.92, 0.96 and 2.14" in page


@pytest.mark.slow
def test_solutions_of_other_solvers_beside_other_libraries():
    """A library that is not installed has a row that says so."""
    printed = output_of("engines.py", "--quick", "--problem", "solutions", "--repeats", "1")
    measured = rows_after(printed, "| problem | library | solver |")
    for problem in ("ridge", "deep equilibrium", "lasso"):
        by_library = {row[1]: row for row in measured if row[0] == problem}
        assert set(by_library) == {"mlo", "JAXopt", "TorchOpt"}
        for row in by_library.values():
            assert row[3] == "not installed" or float(row[3]) < 1e-8


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the sources have no history")
def test_a_revision_before_takes_the_same_work(tmp_path):
    """Each side counts with its own `mlo`; the same revision gives the same counts."""
    written = tmp_path / "before.csv"
    printed = output_of("before_after.py", "HEAD", "--only", "chain", "--csv", written)
    measured = rows(printed, "chain")
    assert len(measured) == 3
    assert all(row[3] == row[4] and int(row[3]) > 0 and row[5] == "1 (1–1)" for row in measured)
    assert written.read_text("utf-8").count("python benchmarks/before_after.py HEAD") == 3


@pytest.mark.slow
def test_the_fused_loss_beside_the_composition():
    printed = output_of("fused_loss.py", "--quick", "--repeats", "1")
    measured = rows(printed, "64 × 100")
    assert {row[1] for row in measured} == {"forward", "backward", "double backward", "end to end"}
    assert {row[2] for row in measured} == {"composition", "fused"}


@pytest.mark.slow
def test_the_class_weights_find_the_class_that_cannot_be_learned(tmp_path):
    file = tmp_path / "weights.csv"
    printed = output_of(
        "class_weights.py", "--dataset", "digits", "--rounds", "40", "--csv", str(file)
    )
    ranked = [line for line in printed.splitlines() if line.startswith("|")][2:]
    assert len(ranked) == 10
    assert "half mislabelled" in ranked[0]
    head, *lines = file.read_text("utf-8").splitlines()
    assert head == "data,labels,rounds,seed,class,weight,wrong_percent" and len(lines) == 10
    assert lines[0].startswith("digits,half of 0 are wrong,40,0,0,")


@pytest.mark.slow
def test_search_steps_beside_the_original_operations():
    printed = output_of(
        "search_step.py", "--size", "tiny", "--repeats", "1", "--only", "first order"
    )
    (errors,) = rows(printed, "torch.float64")
    assert all(float(error) < 1e-12 for error in errors[1:])
    measured = {row[0]: row for row in rows_after(printed, "| step |")}
    # Forward and backward passes through supernets.
    assert measured["DARTS, first order"][3:5] == ["2", "2"]
    assert measured["DARTS, first order, original operations"][3:5] == ["2", "2"]
    assert measured["LFM-CW, first order"][3:5] == ["7", "7"]
    memory = {
        tuple(row[:2]): float(row[4]) for row in rows_after(printed, "| pass |") if len(row) == 5
    }
    assert set(memory) == {
        (name, side)
        for name in ("forward", "full gradient", "α's gradient")
        for side in ("original", "this one")
    }
    assert all(float(row[5]) > 0 for row in measured.values())


@pytest.mark.slow
def test_launches_of_a_step_are_counted_by_part():
    """The launches of a step are told by part and problem, and the rest does few of them."""
    printed = output_of("search_step.py", "--size", "tiny", "--count", "--only", "LFM-CW, first")
    counted = {
        row[0]: row for row in rows_after(printed, "| LFM-CW, first order | w1 | gan | w2 | arch |")
    }
    launches = {part: int(row[5]) for part, row in counted.items()}
    assert launches.pop("all") == sum(launches.values())
    # Of 94 parameters in each of three problems (on a CPU, counters of Adam are read one by one).
    assert 0 < launches["optimizers"] - 202 < 94
    assert all(sum(map(int, row[1:5])) == int(row[5]) for row in counted.values())


@pytest.mark.slow
def test_what_the_guards_cost_is_printed_for_each_engine():
    printed = output_of("guards.py", "--quick")
    measured = rows_after(printed, "| engine | first round")
    assert [row[0] for row in measured] == ["one_step", "darts", "identity", "cg"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in measured)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["perceptron", "convolutional", "small"])
def test_overhead_beside_the_same_updates_written_by_hand(network):
    printed = output_of("overhead.py", "--quick", "--network", network)
    equal = rows_after(
        printed.split("\n\n| problem | engine | side |")[0], "| problem | engine | largest"
    )
    assert {tuple(row[:2]) for row in equal} == {
        *(
            ("mixed activations", engine)
            for engine in ("first_order", "darts", "one_step", "one_step, recomputed")
        ),
        *(("class weights", engine) for engine in ("darts", "one_step", "one_step, recomputed")),
    }
    assert all(float(row[2]) < (1e-6 if row[1] == "darts" else 1e-10) for row in equal)
    measured = rows_after(printed, "| problem | engine | side |")
    for name, engine, _ in equal:
        assert {row[2] for row in measured if row[:2] == [name, engine]} == {
            "by hand",
            "by hand, again",
            "mlo",
        }


def gpu_results(folder, **environment):
    """The file that benchmarks/gpu.sh writes on a CPU, and how it ends."""
    own = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    program = [ROOT / "benchmarks" / "gpu.sh", folder]
    result = finished(program, env={**os.environ, **own, **environment})
    files = list(folder.glob("gpu-results-*.md"))
    return result, files[0].read_text("utf-8") if files else ""


HEADS = (
    "skipped in", "| B × C | phase |", "| B × C | phase |",
    "skipped in", "| problem | engine | side |", "| problem | engine | side |",
    "skipped in", "| round | deterministic |", "| step | ms |",
)  # fmt: skip
"""What the steps of kernels, of engines and of the search print on a CPU."""


@pytest.mark.slow
def test_one_command_runs_all_gpu_work_into_one_file(tmp_path):
    """One command runs every GPU test and benchmark into one file."""
    result, written = gpu_results(tmp_path, DEVICE="cpu", SIZE="tiny")
    assert result.returncode == 0, result.stderr
    assert "A trial on a CPU" in written
    parts = rows_after(written, "| part | result | s |")[: len(HEADS)]
    assert [part[1] for part in parts] == ["passed"] * len(HEADS)
    for part, head in zip(parts, HEADS, strict=True):
        assert head in written.split(f"\n## {part[0]}\n")[1].split("\n## ")[0]
        assert part[0] in result.stderr and head in result.stderr  # shown while it runs
    assert "NO GPU: kernels not verified on hardware" in written


def test_a_part_that_fails_is_in_the_exit_code(tmp_path):
    """A part of the command that fails is in its file and in its exit code."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
        [ "$1" = - ] && exec "{sys.executable}" "$@"
        case "$*" in *pytest*) exit 124 ;; *) exit 3 ;; esac  # 124: as after a time-out
        """
    )
    python.chmod(0o755)
    result, written = gpu_results(tmp_path, DEVICE="cpu", SIZE="tiny", PYTHON=str(python))
    assert result.returncode == 1
    assert "**9 of 9 parts failed.**" in written
    results = [part[1] for part in rows_after(written, "| part | result | s |")[:9]]
    assert all(results[k].startswith("FAILED: stopped after ") for k in (0, 3, 6))
    assert {results[k] for k in (1, 2, 4, 5, 7, 8)} == {"FAILED: exit code 3"}


def test_a_part_of_the_gpu_work_can_be_called_alone(tmp_path):
    """A failing step does not stop the others, and they are those of the parts that are named."""
    result, written = gpu_results(tmp_path, DEVICE="cpu", SIZE="tiny", BUDGET="0", PARTS="engines")
    assert result.returncode == 1
    assert "**3 of 3 parts failed.**" in written
    assert written.count("NOT RUN: no time was left") >= 3
    assert "| parts | engines |" in written
    result, _ = gpu_results(tmp_path, DEVICE="cpu", SIZE="tiny", PARTS="engine")
    assert result.returncode == 2
    assert "PARTS holds kernels, engines, search, got 'engine'" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    result, written = gpu_results(tmp_path)
    assert result.returncode == 2
    assert "has no CUDA" in result.stderr
    assert not written


def test_a_problem_that_does_not_exist_is_refused():
    program = ROOT / "benchmarks" / "engines.py"
    result = finished([sys.executable, program, "--problem", "layerd"])
    assert result.returncode == 2
    assert "there is no problem 'layerd'" in result.stderr


@pytest.mark.slow
def test_stochastic_methods_at_equal_oracle_calls():
    printed = output_of("stochastic.py", "--short")
    value = {row[1]: float(row[2]) for row in rows(printed, "mlo")}
    assert len(value) == 8
    assert value["saga (SABA)"] < 1e-6 * value["soba"]
    assert value["soba, average"] < 0.1 * value["soba"]
    assert value["spider (SRBA)"] < value["soba"]


@pytest.mark.slow
def test_stochastic_methods_without_the_suite_say_so():
    printed = output_of(
        "stochastic.py", "--suite", "/nowhere", "--tasks", "quadratic10", "--units", "8"
    )
    assert "Without the suite: /nowhere has no solvers/saba.py." in printed
    assert len(rows(printed, "mlo")) == 8
    assert rows(printed, "suite") == []


@pytest.mark.slow
def test_a_table_of_cells_is_made_in_parts(tmp_path):
    """Two processes share the cells; the table is complete, and a repetition adds nothing."""
    path = tmp_path / "cells.csv"
    tiny = (
        "digits", f"--out={path}", "--preset=smoke", "--seeds=0", "--set=search.nodes=2",
        "--set=evaluation.epochs=1", "--set=evaluation.channels=4", "--set=evaluation.layers=3",
    )  # fmt: skip
    output_of("cell_table.py", *tiny, "--part=0/2")
    assert not open_table(path, "digits").complete
    output_of("cell_table.py", *tiny, "--part=1/2")
    table = open_table(path, "digits")
    assert table.complete
    assert table.cells["|none~0|"].mean > 80.0  # nothing of the images reaches the classifier
    assert table.cells[table.best].mean < 30.0
    before = path.read_bytes()
    output_of("cell_table.py", *tiny)
    assert path.read_bytes() == before
    other = (*tiny, "--set=evaluation.weights.lr=0.02")
    with pytest.raises(AssertionError, match="another table, with the recipe"):
        output_of("cell_table.py", *other)
    assert path.read_bytes() == before
