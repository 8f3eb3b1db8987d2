"""The tables of a report."""

from __future__ import annotations

import json
import re

import pytest
from made_run_folders import make_folder

from lfmcw_app.report.page import run_page
from lfmcw_app.report.reading import read_run
from lfmcw_app.report.tables import (
    costs,
    environment_rows,
    key_figures,
    phase_seconds,
    progress_text,
    solves,
)


def test_solves_that_did_not_converge_are_counted(tmp_path):
    html = run_page(read_run(make_folder(tmp_path / "run", {"search": (8, 4)})))
    row = re.search(r'<tr data-solve="w2">(.*?)</tr>', html)[1]
    assert re.findall(r">([^<]+)</td>", row) == ["cg", "4", "5.0", "0.125", "0.125", "1"]


def timed(folder, *lines):
    """Writes timings: (phase, rounds, seconds, problem → (updates, seconds, peak, held))."""
    keys = ("updates", "seconds", "peak_bytes", "held_bytes")
    with (folder / "timings.jsonl").open("w") as file:
        for phase, rounds, seconds, problems in lines:
            taken = {name: dict(zip(keys, of, strict=True)) for name, of in problems.items()}
            entry = {"phase": phase, "rounds": rounds, "seconds": seconds, "problems": taken}
            file.write(json.dumps(entry) + "\n")
    return read_run(folder)


def test_intervals_of_a_phase_are_added_up(tmp_path):
    run = timed(
        make_folder(tmp_path / "run", {"search": (8, 2)}),
        ("search", [1, 1], 4.0, {"w2": (1, 3.0, 100, 10), "arch": (1, 1.0, None, 5)}),
        ("search", [2, 2], 6.0, {"w2": (2, 3.0, 300, 20)}),
        ("training", [1, 3], 200.0, {"network": (3, 150.0, None, 7)}),
    )
    assert phase_seconds(run) == {"search": 10.0, "training": 200.0}
    w2, arch, network = costs(run)
    assert (w2.updates, w2.seconds, w2.share, w2.each) == (3, 6.0, 60.0, 2000.0)
    assert (w2.peak, w2.held) == (300, 20)
    assert (arch.peak, arch.share) == (None, 10.0)
    assert (network.phase, network.share) == ("training", 75.0)


def test_the_key_figures_begin_with_the_result(tmp_path):
    run = timed(
        make_folder(tmp_path / "run", {"search": (8, 2)}),
        ("generator", [1, 9], 120.0, {"gan": (9, 100.0, None, 10)}),
        ("search", [1, 2], 600.0, {"w2": (1, 3.0, 2_500_000_000, 10)}),
    )
    found = {figure.key: f"{figure.value} {figure.unit}".strip() for figure in key_figures(run)}
    assert found == {
        "test_error": "12.50 %", "parameters": "1,234", "multiply_adds": "1.5 M",
        "warmup_time": "2.0 min", "search_time": "10.0 min", "peak_memory": "2.5 GB",
    }  # fmt: skip
    notes = {figure.key: figure.note for figure in key_figures(run) if figure.note}
    assert notes == {
        "test_error": "1 of 8; 95% interval 2.2–47.1%", "peak_memory": "of the whole process",
    }  # fmt: skip


def test_an_unfinished_run_has_no_result(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 2)}, finished=False))
    assert key_figures(run) == []
    assert progress_text(run) == "unfinished: search, round 2"


@pytest.mark.parametrize(("trial", "text"), [(False, "complete"), (True, "says nothing")])
def test_a_finished_run_is_complete_unless_it_was_a_trial(tmp_path, trial, text):
    settings = (f"trial={str(trial).lower()}",)
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 1)}, settings=settings))
    assert text in progress_text(run)


def test_solves_are_told_by_problem_and_engine(tmp_path):
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 4)}))
    report = run.searched[0].entries[3]["solves"]["w2"]
    report |= {"engine": "identity", "residual": None, "iterations": 0}
    cg, identity = solves(run)
    assert (cg.engine, cg.count, cg.iterations, cg.failed) == ("cg", 3, 5.0, 1)
    assert cg.residual == (0.125, 0.125)
    assert (identity.engine, identity.count, identity.residual) == ("identity", 1, None)


def test_a_truncated_solve_has_not_failed(tmp_path):
    """A truncated series has not converged either; older entries say only that."""
    run = read_run(make_folder(tmp_path / "run", {"search": (8, 4)}))
    entries = [entry["solves"]["w2"] for entry in run.searched[0].entries]
    entries[0] |= {"converged": False, "failed": False}
    entries[2] |= {"converged": False, "failed": True}
    (row,) = solves(run)
    assert row.failed == 2  # of rounds 2, an old entry, and 3


def test_the_command_has_a_place_of_its_own():
    rows = environment_rows({"command": "python", "cpu_threads": 2, "gpu": None})
    assert list(rows) == [("cpu threads", "2")]


def test_what_has_parts_has_a_row_for_each_of_them(tmp_path):
    """No raw dict, list or None of Python is on the page."""
    environment = {
        "numerics": {"search": {"autocast": None, "tf32": False}, "evaluation": {"tf32": True}},
        "gpus": ["A", "B"], "completed": {"time": "12:00", "device": None},
    }  # fmt: skip
    assert environment_rows(environment) == [
        ("numerics, search, tf32", "no"), ("numerics, evaluation, tf32", "yes"),
        ("gpus", "A, B"), ("completed, time", "12:00"),
    ]  # fmt: skip
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "changes.jsonl").write_text(
        '{"phase": "search", "round": 1, "key": "search.steps", "time": "12:00", '
        '"old": null, "new": {"name": "cg", "steps": [1, true]}}\n'
    )
    page = run_page(read_run(folder))
    assert "<td>null</td><td>name: cg, steps: 1, true</td>" in page
    texts = re.sub(r"<(style|script|pre)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    texts = re.sub(r"<[^>]*>", " ", texts)
    assert not re.search(r"\bNone\b|\bnan\b|\{[\'\"&]|\[[\'\"\d]|\bTrue\b|\bFalse\b", texts)


def logged_solves(folder, solve):
    """The page of a run whose engines' solves were all like this."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "solves" in line:
            line["solves"] = {"w2": solve}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = run_page(read_run(folder))
    return page[page.index('id="gradients"') :].split("</section>")[0]


def test_columns_of_what_no_engine_has_are_left_out(tmp_path):
    """Of an engine that solves no system there is no residual, and nothing that converges."""
    folder = make_folder(tmp_path / "run", {"search": (8, 3)})
    plain = {"engine": "one_step", "iterations": 0, "residual": None, "converged": True}
    part = logged_solves(folder, plain)
    assert "<table" not in part
    assert "The total gradients go through w2 (engine one_step, 3 times). No system is" in part
    neumann = plain | {"engine": "neumann", "iterations": 7}
    part = logged_solves(folder, neumann)
    assert "Hessian products each" in part
    assert "residual" not in part
    part = logged_solves(folder, neumann | {"residual": 0.5, "converged": False})
    assert part.count("<th scope") == 7 + 1
    assert '<td class="n bad">3</td>' in part


def test_memory_that_was_not_measured_has_no_column(tmp_path):
    entry = {"seconds": 1.0, "updates": 2, "peak_bytes": None, "held_bytes": 10}
    line = {"phase": "search", "rounds": [1, 2], "seconds": 2.0, "problems": {"w2": entry}}
    folder = make_folder(tmp_path / "run", {"search": (8, 2)})
    for peak, shown in ((None, False), (10_000, True)):
        entry["peak_bytes"] = peak
        (folder / "timings.jsonl").write_text(json.dumps(line) + "\n")
        page = run_page(read_run(folder))
        assert ("peak memory</th>" in page) == shown
        assert ("Peak: of the" in page) == shown
