"""Records of rounds, as a person and as a program read them."""

from __future__ import annotations

import itertools
import warnings
import xml.etree.ElementTree as ET

import pytest
import torch
from quadratics import POSITIVE, quadratic, symmetric

import mlo
from mlo.hypergradient import registry
from mlo.records import CONVERGED

STEPS_OF = {
    "neumann": lambda steps: {"num_terms": steps},
    "cg": lambda steps: {"max_steps": steps},
    "minres": lambda steps: {"max_steps": steps},
    "gmres": lambda steps: {"max_steps": steps},
    "normal_cg": lambda steps: {"max_steps": steps},
    "nystrom": lambda steps: {"rank": min(steps, 8), "max_steps": 0 if steps == 2 else steps},
    "penalty": lambda steps: {"steps": steps},
    "sid": lambda steps: {"steps": steps},
}
"""Engine → its option for a number of steps, of each engine that solves a system in one call."""

UNTRIED = ("first_order", "outer_product", "zeroth_order")
"""They solve no system; of the first one there is no report."""


def test_the_record_of_a_game_and_of_a_failed_solve_says_so():
    record = mlo.Record(round=2)
    record.add(
        "gan",
        loss={"g": torch.tensor(0.5), "d": torch.tensor(1.25)},
        metrics={},
        gradient_norm=torch.tensor(1.0),
    )
    for name, converged, advice in (("gan", False, "Damp."), ("w", False, ""), ("m", True, "")):
        record.solves[name] = mlo.SolveReport(
            problem=name, engine="gmres", residual=0.0, converged=converged, advice=advice
        )
    shown = "gan=(g=0.5, d=1.25); converged: m; truncated: w; failed: gan"
    assert repr(record) == f"Record(round=2: {shown})"


def test_tensors_are_read_as_numbers():
    record = mlo.Record(round=1)
    record.add(
        "w",
        loss=torch.tensor(0.25),
        metrics={
            "accuracy": torch.tensor(0.5),
            "weights": torch.tensor([1.0, 2.0]),
            "one": torch.ones(1),
        },
        gradient_norm=torch.tensor(3.0),
        player_norms={"a": torch.tensor(4.0)},
    )
    assert record.losses == {"w": 0.25}
    assert record.metrics == {"w": {"accuracy": 0.5, "weights": [1.0, 2.0], "one": 1.0}}
    assert record.gradient_norms == {"w": 3.0}
    assert record.player_gradient_norms == {"w": {"a": 4.0}}
    assert type(record.losses["w"]) is float


def test_a_later_update_takes_the_place_of_an_earlier_one():
    record = mlo.Record(round=1)
    for loss in (1.0, 2.0):
        record.add(
            "w", loss=torch.tensor(loss), metrics={}, gradient_norm=torch.tensor(10.0 * loss)
        )
    assert (record.losses, record.gradient_norms) == ({"w": 2.0}, {"w": 20.0})


def test_the_worst_solve_of_a_round_stays_and_then_the_last():
    def solve(residual, advice=""):
        return mlo.SolveReport(
            problem="w", engine="cg", residual=residual, converged=residual == 0.0, advice=advice
        )

    converged, truncated, failed = solve(0.0), solve(0.5), solve(0.7, "Damp.")
    for order in itertools.permutations((converged, truncated, failed)):
        record = mlo.Record(round=1)
        for report in order:
            record.add_solve(report)
        assert record.solves["w"] is failed
    later = solve(0.3)
    record = mlo.Record(round=1)
    for report in (converged, truncated, later, converged):
        record.add_solve(report)
    assert record.solves["w"] is later


def test_a_round_that_solved_nothing_shows_losses_only():
    record = mlo.Record(round=3)
    record.add("w", loss=torch.tensor(0.5), metrics={}, gradient_norm=torch.tensor(1.0))
    assert repr(record) == "Record(round=3: w=0.5)"


def test_a_solve_report_has_what_engines_leave_out():
    report = mlo.SolveReport(problem="w", engine="identity")
    assert (report.iterations, report.residual, report.converged) == (0, None, True)
    assert report.outcome == "no solve"
    with pytest.raises(AttributeError):
        report.converged = False


def solved_by(engine):
    """The report on the first solve of a well-conditioned problem, without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlo.SolveWarning)
        optimizer, *_ = quadratic(POSITIVE, engine)
        return optimizer.step().solves["w"]


@pytest.mark.parametrize("steps", [2, 400])
@pytest.mark.parametrize("engine", STEPS_OF)
def test_converged_means_a_residual_below_the_tolerance(engine, steps):
    report = solved_by({"name": engine, **STEPS_OF[engine](steps)})
    assert report.converged == (report.residual <= CONVERGED) == (steps == 400)
    assert report.outcome in ("truncated", "failed") or report.converged


def test_every_engine_that_solves_has_a_case_above():
    reports = {name: solved_by(name) for name in registry._FACTORIES if name not in UNTRIED}
    solving = {name for name, report in reports.items() if report.residual is not None}
    assert solving == {*STEPS_OF, "direct", "soba"}
    assert all(report.converged for name, report in reports.items() if name not in solving)
    unsolved = {name for name, report in reports.items() if report.outcome == "no solve"}
    assert unsolved == set(reports) - solving
    assert reports["soba"].outcome == "truncated" and reports["direct"].converged


@pytest.mark.filterwarnings("ignore:No gradient reaches problem 'x':mlo.SolveWarning")  # rate 0
@pytest.mark.parametrize(("engine", "steps"), [("one_step", 1), ("darts", 1), ("unroll", 2)])
def test_an_engine_of_steps_reports_how_many_it_took(engine, steps):
    choice = {"name": "unroll", "steps": 2} if engine == "unroll" else engine
    optimizer, *_ = quadratic(POSITIVE, choice)
    record = list(optimizer.run(2))[-1]
    report = record.solves["w"]
    assert (report.iterations, report.outcome) == (steps, "no solve")
    assert f"{engine}, {steps} step{'s' * (steps > 1)}" in record._repr_html_()
    assert "converged" not in repr(record)


def test_a_series_at_a_residual_of_a_tenth_is_truncated():
    report = solved_by({"name": "neumann", "num_terms": 3, "step_size": 0.6})
    assert 0.01 < report.residual < 0.5
    assert (report.outcome, report.advice) == ("truncated", "")
    alone = solved_by({"name": "neumann", "num_terms": 1})  # leaves the whole cotangent, as meant
    assert (alone.residual, alone.outcome) == (1.0, "truncated")


def test_soba_converges_where_the_problems_rest():
    optimizer, *_ = quadratic(symmetric([1.0, 1.2] * 4), {"name": "soba"})
    reports = [record.solves["w"] for record in optimizer.run(400)]
    assert reports[0].outcome == "truncated"
    assert reports[-1].converged and reports[-1].residual <= CONVERGED


def test_records_are_equal_whatever_time_they_took():
    assert mlo.Record(round=1, seconds={"w": 1.0}) == mlo.Record(round=1, seconds={"w": 2.0})
    assert mlo.Record(round=1) != mlo.Record(round=2)


def test_a_gradient_report_is_a_gradient_and_its_solves():
    solve = mlo.SolveReport(problem="w", engine="cg")
    found = mlo.GradientReport(gradient={"v": torch.ones(2)}, reports=(solve,))
    assert found.reports[0].problem == "w" and set(found.gradient) == {"v"}


def shown_rows(record):
    """What a notebook shows: the title, and problem → the other cells of its row."""
    root = ET.fromstring(record._repr_html_())
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in root.iter("tr")}
    return root.find("caption").text, rows


def test_a_notebook_shows_a_row_for_each_problem():
    record = mlo.Record(round=2, seconds={"w": 0.0125})
    record.add("w", loss=torch.tensor(0.5), metrics={}, gradient_norm=torch.tensor(2.0))
    record.add(
        "gan",
        loss={"g": torch.tensor(0.5), "d": torch.tensor(1.25)},
        metrics={},
        gradient_norm=torch.tensor(1.0),
    )
    record.solves["w"] = mlo.SolveReport(
        problem="w", engine="cg", iterations=7, residual=0.25, converged=False, advice="Damp <it>."
    )
    title, rows = shown_rows(record)
    assert title == "Round 2"
    assert list(rows) == ["problem", "w", "gan"]
    solve = "cg, 7 products, residual 2.5e-01, failed. Damp <it>."
    assert rows["w"] == ["0.5", "2", "12.5", solve]
    assert rows["gan"] == ["(g=0.5, d=1.25)", "1", None, None]


def test_a_notebook_shows_what_was_left_out():
    error = mlo.NonFiniteError("lost", problem="w", round=3, term="loss", data={})
    record = mlo.Record(round=3, skipped={"w": error}, rolled_back=error)
    title, rows = shown_rows(record)
    assert title == f"Round 3, after going back: {error}"
    assert rows["w"] == [None, None, None, f"skipped: {error}"]
