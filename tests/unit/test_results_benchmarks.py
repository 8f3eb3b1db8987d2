"""The page of benchmarks says what the files of measurements say, and no more."""

from __future__ import annotations

import csv
import re

import pytest
from results_benchmarks import BLOCKS, compared, draw_ratios, ratios_digest
from results_data import read_all
from results_page import BLOCK, DOCS

MADE = {
    "command": "python benchmarks/engines.py", "machine": "2 cores", "load": "0.1",
    "date": "2026-11-29", "commit": "abc1234", "versions": "torch 2.14.1",
}  # fmt: skip
ENGINE = {
    "problem": "logistic", "library": "Betty", "method": "darts", "error": "1.0e-02",
    "error_one_step": "1.0e-03", "ms": "2.00", "ratio": "", "ratio_low": "", "ratio_high": "",
    "memory_mb": "1.0", "losses": "4", "passes": "5", "failed": "",
}  # fmt: skip
ROUND = {
    "network": "small", "parameters": "970", "batch": "128", "problem": "mixed activations",
    "engine": "darts", "by_hand_ms": "2", "mlo_ms": "3", "ratio": "1.5", "ratio_low": "1.4",
    "ratio_high": "1.6", "noise": "1.01",
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """Writes rows into files of measurements, and reads them."""

    def made(**files):
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        for name, rows in files.items():
            with (tmp_path / "benchmarks" / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0], *MADE])
                writer.writeheader()
                writer.writerows([row | MADE for row in rows])
        return read_all(tmp_path)

    return made


def engine(ratio, **more):
    low, high = (f"{ratio * factor:.4g}" for factor in (0.9, 1.1))
    return {**ENGINE, "ratio": str(ratio), "ratio_low": low, "ratio_high": high, **more}


def test_a_peer_has_its_best_and_worst_row_with_quartiles(results):
    rows = [engine(2.0), engine(0.5, method="cg, K=10"), engine(1.0, method="neumann, K=10")]
    (line,) = BLOCKS["peers"](results(engines=rows)).splitlines()[2:]
    assert line == (
        "| Betty | 2 of 3 | 0.50 (0.45–0.55): logistic regression, cg, K=10 | 1.00 | "
        "2.00 (1.80–2.20): logistic regression, darts |"
    )


def test_peers_come_by_their_medians_and_loops_by_size(results):
    rows = [engine(2.0), engine(0.5, library="TorchOpt"), {**ENGINE, "library": "mlo"}]
    rounds = [ROUND, {**ROUND, "network": "convolutional"}, {**ROUND, "batch": "64"}]
    found = compared(results(engines=rows, overhead=rounds))
    assert list(found) == ["TorchOpt", "the hand-written loop, 970 parameters", "Betty"]
    assert len(found["the hand-written loop, 970 parameters"]) == 1


def test_what_was_compiled_is_compared_apart(results):
    rows = [
        engine(0.1, library="JAXopt", problem="ridge", method="solve_cg"),
        engine(9.0, library="JAXopt", problem="ridge", method="solve_cg, jit"),
    ]
    assert list(compared(results(engines=rows))) == ["JAXopt, not compiled", "JAXopt, compiled"]


def test_a_median_without_quartiles_is_shown_alone(results):
    row = engine(0.5, ratio_low="", ratio_high="")
    assert "| 0.50: logistic regression, darts |" in BLOCKS["peers"](results(engines=[row]))


def test_what_failed_has_its_reason(results):
    row = {**ENGINE, "ms": "", "error": "", "failed": "over 60 s (start)"}
    ours = {**ENGINE, "library": "mlo"}
    text = BLOCKS["engines"](results(engines=[ours, row]))
    assert "| logistic regression | darts | 2.00 | over 60 s (start) |" in text
    assert "Betty" not in BLOCKS["peers"](results(engines=[row]))


def test_the_figure_is_another_one_if_a_ratio_changes(results, tmp_path):
    before = ratios_digest(results(engines=[engine(0.5)]))
    after = results(engines=[engine(0.6)])
    assert ratios_digest(after) != before
    draw_ratios(after, tmp_path / "a.svg")
    assert f">{ratios_digest(after)}<" in (tmp_path / "a.svg").read_text("utf-8")


def test_how_it_was_made_is_on_the_page_once_for_each_command(results):
    text = BLOCKS["measurements"](results(engines=[engine(0.5), engine(2.0)]))
    (line,) = text.splitlines()[2:]
    assert all(value in line for value in MADE.values())


def test_the_page_begins_with_one_table_and_one_figure():
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    beginning = text.partition("\n## ")[0]
    assert [name for name, _ in BLOCK.findall(beginning)] == ["peers", "ratios"]


def test_the_page_has_no_dates_but_those_of_the_files():
    text = BLOCK.sub("", (DOCS / "benchmarks.md").read_text("utf-8"))
    assert re.findall(r"\d{4}-\d\d-\d\d|\bms\b \d|\d(?:\.\d+)? ms\b(?! of)", text) == []
