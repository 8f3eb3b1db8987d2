"""Engines side by side: the same gradients as in runs with these engines, and nothing changed."""

from __future__ import annotations

import ast
import math
import warnings
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from noisy_regression import lines, regression

import mlo
from mlo import compare
from mlo.hypergradient import Solve
from mlo.testing import (
    LEARNING_RATE,
    Vector,
    bilevel_quadratic,
    bilinear_game,
    diamond,
    identical,
    relative_error,
    snapshot,
    trilevel_quadratic,
)


def still(closed):
    """The problems of a closed form, of which the outermost does not move."""
    for optimizer in closed.problems[-1].optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.0
    return closed


def displaced(closed):
    """The same with the lower problems away from their solutions."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for problem in closed.problems[:-1]:
            v = problem.parameters["v"]
            v += torch.randn(v.shape, generator=generator, dtype=v.dtype)
    return still(closed)


def rows_of(comparison):
    return {row.label: row for row in comparison.rows}


# ------------------------------ the numbers


def test_engines_are_compared_with_the_most_exact_one():
    closed = diamond()
    optimizer = closed.optimizer("one_step")
    found = mlo.compare_engines(
        optimizer, "arch", ["identity", "direct", "neumann", "darts", "first_order"]
    )
    assert found.reference == "direct" and "the most exact of these" in found.why
    rows = rows_of(found)
    assert relative_error(rows["direct"].gradient["v"], closed.exact) < 1e-10
    assert (rows["direct"].error, rows["direct"].products) == (0.0, 3 * 5)
    for label, row in rows.items():
        g = row.gradient["v"]
        own = mlo.MultilevelOptimizer(diamond().problems, label).gradient("arch")["v"]
        assert relative_error(g, own) < 1e-12, label
        error = relative_error(own, closed.exact)
        assert row.error == pytest.approx(error, rel=1e-8, abs=1e-12)
        cosine = float(torch.cosine_similarity(own, closed.exact, dim=0))
        assert row.cosine == pytest.approx(cosine, abs=1e-12)
    assert rows["first_order"].error > rows["neumann"].error > 0.1


@pytest.mark.parametrize("own", ["one_step", "cg", mlo.Unroll(steps=4)], ids=str)
def test_the_row_of_the_own_engine_is_the_gradient(own):
    optimizer = regression(hypergradient=own, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(optimizer.run(2))
        found = mlo.compare_engines(optimizer, "decay", {"own": own, "other": "first_order"})
        assert identical(rows_of(found)["own"].gradient, optimizer.gradient("decay"))


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_solves_see_the_batches_that_the_run_would_draw_for_them():
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 5, generator=generator), torch.randn(8, 1, generator=generator))
        for _ in range(5)
    ]
    engine = mlo.ConjugateGradient(damping=1.0)
    optimizer = regression(hypergradient=engine, solve_data=batches)
    list(optimizer.run(2))
    (row,) = mlo.compare_engines(optimizer, "decay", [engine]).rows
    assert identical(row.gradient, optimizer.gradient("decay"))


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
@pytest.mark.parametrize("options", [{}, {"order": "simultaneous"}], ids=["lower first", "at once"])
@pytest.mark.parametrize(
    "estimator",
    [None, mlo.Saga(index=lambda batch: int(batch[3])), "storm"],
    ids=["none", "saga", "storm"],
)
def test_the_own_engine_keeps_what_it_has_seen(estimator, options):
    """Estimators, learning rates and the memory of `soba` are those of the run."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    data = list(torch.cat([rows, torch.arange(4.0).double()[:, None]], dim=1))
    w, x = Vector(torch.zeros(3).double()), Vector(torch.ones(3).double())
    sgd = torch.optim.SGD(w.parameters(), lr=0.1)
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=sgd,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9),
            loss=lambda w, b, *, x: ((w.v - b[:3] * x.v) ** 2).sum(),
            data=data,
            estimator=estimator,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, b, *, w: ((w.v - b[:3]) ** 2).sum() + (x.v**2).sum(),
            data=data,
            estimator=estimator,
        ),
    ]
    soba = mlo.Soba(step_size="lower")
    optimizer = mlo.MultilevelOptimizer(problems, soba, **options)
    list(optimizer.run(7))
    before = snapshot(optimizer)
    rows = rows_of(mlo.compare_engines(optimizer, "x", {"own": soba, "step": "one_step"}))
    assert identical(rows["own"].gradient, optimizer.gradient("x"))
    refused = "order" in options or estimator is not None
    assert bool(rows["step"].failure) is refused
    assert identical(snapshot(optimizer), before)


RECORDED = {"default": "one_step", "w2": mlo.Unroll(steps=3)}


@pytest.mark.parametrize(
    ("choice", "notes"),
    [
        (RECORDED, []),
        ({**RECORDED, "gan": "cg"}, ["1 of 3 steps of 'w2' are recorded"]),
    ],
    ids=["the same engines", "another engine below"],
)
def test_earlier_steps_serve_under_the_engines_of_then(choice, notes):
    """Earlier steps of w2 read solutions of w1 and gan that have moved since."""
    optimizer = displaced(diamond()).optimizer(RECORDED)
    list(optimizer.run(4))
    (row,) = mlo.compare_engines(optimizer, "arch", {"this": choice}).rows
    assert list(row.notes) == notes
    if not notes:
        assert relative_error(row.gradient, optimizer.gradient("arch")) < 1e-14
        return
    other = displaced(diamond()).optimizer({"default": "one_step", "gan": "cg"})
    list(other.run(4))
    assert relative_error(row.gradient, other.gradient("arch")) < 1e-10


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_recorded_steps_are_those_that_are_differentiated(kept):
    """Of five recorded steps `unroll` takes as many as it asks for.

    For a quadratic, dθ_K/dx = Σ_{k<K} (I − ηA)^k ηB.
    """
    closed = displaced(bilevel_quadratic())
    closed.problems[0].steps = 5
    optimizer = closed.optimizer(mlo.Unroll(steps=5))
    optimizer.step()
    (row,) = mlo.compare_engines(optimizer, "x", [mlo.Unroll(steps=kept)]).rows
    a, b = closed.jacobians["w"], -closed.mixed["w"]["x"]
    x, w = closed.value("x"), closed.value("w")
    contraction = torch.eye(len(a), dtype=a.dtype) - LEARNING_RATE * a
    slope = sum(torch.linalg.matrix_power(contraction, k) for k in range(kept)) * LEARNING_RATE @ b
    # The direct gradient is ρx, and that of the upper loss in w is w − t.
    t = bilevel_quadratic().value("w") - bilevel_quadratic().direct["w"]
    assert relative_error(row.gradient["v"], 0.1 * x + slope.T @ (w - t)) < 1e-10
    assert row.notes == () and row.reports[0].iterations == kept


CHOICES = [
    {"default": "one_step", "w1": "cg"},
    {"default": "direct", "w2": "one_step"},
    {"default": "cg", "gan": "first_order", "w2": "darts"},
    "gmres",
    "unroll",
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_another_engine_gives_what_a_run_with_it_would(choice):
    """The outermost problem rests, so runs with different engines are at the same state.

    The steps that were recorded read other problems' solutions under the engine of then.
    """
    optimizer = displaced(diamond()).optimizer("one_step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(optimizer.run(3))
        (row,) = mlo.compare_engines(optimizer, "arch", {"this": choice}).rows
        if choice == "unroll":
            assert any("1 of 5 steps of 'w1'" in note for note in row.notes)
            choice = "one_step"  # all that is recorded
        other = displaced(diamond()).optimizer(choice)
        list(other.run(3))
    assert identical(
        snapshot(other)["problems"]["w2"]["module"], snapshot(optimizer)["problems"]["w2"]["module"]
    )
    assert relative_error(row.gradient["v"], other.gradient("arch")["v"]) < 1e-10


def test_batches_and_noise_are_those_of_the_last_update():
    def learned(engine):
        optimizer = regression(hypergradient=engine)
        optimizer.problems["decay"].optimizers["decay"].param_groups[0]["lr"] = 0.0
        list(optimizer.run(3))
        return optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = learned("one_step"), learned({"name": "neumann", "step_size": 0.1})
        choice = {"neumann": {"name": "neumann", "step_size": 0.1}, "one": "one_step"}
        rows = rows_of(mlo.compare_engines(first, "decay", choice))
        assert relative_error(rows["neumann"].gradient, second.gradient("decay")) < 1e-5
    assert identical(rows["one"].gradient, first.gradient("decay"))


def test_without_recorded_steps_engines_look_ahead_and_say_so():
    closed = displaced(bilevel_quadratic())
    optimizer = closed.optimizer("direct")
    optimizer.step()
    rows = rows_of(mlo.compare_engines(optimizer, "x", ["direct", "one_step"]))
    assert rows["one_step"].notes == ("no step of w is recorded, so it is seen one step ahead",)
    assert rows["direct"].notes == ()
    # As before the first round: a fresh optimizer of the same problems has no steps either.
    fresh = mlo.MultilevelOptimizer(closed.problems, "one_step")
    assert relative_error(rows["one_step"].gradient, fresh.gradient("x")) < 1e-12


def test_a_problem_that_looks_ahead_has_nothing_missing():
    optimizer = mlo.MultilevelOptimizer(
        displaced(diamond()).problems, "one_step", order="outermost_first"
    )
    optimizer.step()
    rows = rows_of(mlo.compare_engines(optimizer, "arch", ["one_step", "direct", "unroll"]))
    assert rows["one_step"].notes == ()
    assert identical(rows["one_step"].gradient, optimizer.gradient("arch"))
    assert "looks one step ahead" in rows["unroll"].failure


# ------------------------------ nothing is changed


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_comparison_changes_nothing():
    twin = regression()
    expected = lines(twin.run(7))[3:]
    optimizer = regression()
    list(optimizer.run(3))
    before, gradient = snapshot(optimizer), optimizer.gradient("decay")
    history = optimizer._history
    stepped, checks = history.stepped["net"], history.losses["net"].checks
    mlo.compare_engines(optimizer, "decay", ["darts", "cg", "soba", "unroll", "first_order"])
    assert identical(snapshot(optimizer), before)
    assert identical(optimizer.gradient("decay"), gradient)
    assert history.stepped["net"] is stepped and stepped.engine is optimizer.engines["net"]
    assert history.losses["net"].checks is checks
    assert lines(optimizer.run(4)) == expected


def test_a_warning_becomes_a_note_and_still_comes_in_a_run():
    optimizer = regression(hypergradient="cg")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (row,) = mlo.compare_engines(optimizer, "decay", ["cg"]).rows
    assert said == []
    assert any("a solve on one batch is biased" in note for note in row.notes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("a solve on one batch is biased" in str(warning.message) for warning in said)


def test_an_engines_memory_is_that_of_the_optimizer():
    closed = displaced(bilevel_quadratic())
    soba = mlo.Soba()
    optimizer = closed.optimizer(soba)
    list(optimizer.run(20))
    rows = rows_of(
        mlo.compare_engines(optimizer, "x", {"own": soba, "cold": mlo.Soba(damping=1e-9)})
    )
    assert identical(rows["own"].gradient, optimizer.gradient("x"))
    assert relative_error(rows["cold"].gradient, rows["own"].gradient) > 0.1


# ------------------------------ the reference


ORDER = [
    "direct",
    mlo.ConjugateGradient(max_steps=2, tol=1e-9),
    mlo.ConjugateGradient(damping=0.5, max_steps=50),
    mlo.Unroll(steps=3),
    "one_step",
    {"name": "cg", "products": "finite_difference"},
    "first_order",
]


def test_the_reference_is_the_most_exact_that_is_there():
    closed = displaced(bilevel_quadratic())
    closed.problems[0].steps = 3
    optimizer = closed.optimizer(mlo.Unroll(steps=3))
    optimizer.step()
    engines = {str(rank): engine for rank, engine in enumerate(ORDER)}
    while engines:
        found = mlo.compare_engines(optimizer, "x", dict(reversed(engines.items())), repetitions=1)
        assert found.reference == min(engines)
        assert rows_of(found)[found.reference].error == 0.0
        del engines[found.reference]


SOLVES_ONE = {"aug": "one_step", "net": "direct"}
MORE_STEPS = {"aug": "one_step", "net": mlo.Unroll(steps=3)}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (SOLVES_ONE, "one_step"),
        (MORE_STEPS, "one_step"),
        (SOLVES_ONE, MORE_STEPS),
        ("direct", SOLVES_ONE),
        (SOLVES_ONE, {"net": "direct", "aug": "first_order"}),
        (SOLVES_ONE, {"net": mlo.Direct(damping=0.1), "aug": "one_step"}),
    ],
)
def test_the_reference_of_engines_per_problem_is_the_best(better, worse, swapped):
    """A problem without a residual does not count as one that is solved exactly."""
    closed = displaced(trilevel_quadratic())
    renamed = dict(zip(("net", "aug"), [problem.name for problem in closed.problems], strict=False))
    closed.problems[0].steps = 3
    optimizer = closed.optimizer({"default": "one_step", renamed["net"]: mlo.Unroll(steps=3)})
    optimizer.step()
    engines = {"better": better, "worse": worse}
    for label, choice in engines.items():
        if isinstance(choice, dict):
            engines[label] = {renamed[name]: engine for name, engine in choice.items()}
    given = dict(reversed(engines.items())) if swapped else engines
    top = list(optimizer.problems)[-1]
    assert mlo.compare_engines(optimizer, top, given, repetitions=1).reference == "better"


def test_a_reference_with_a_large_residual_is_not_called_exact():
    optimizer = displaced(bilevel_quadratic()).optimizer("one_step")
    optimizer.step()
    found = mlo.compare_engines(optimizer, "x", ["one_step", mlo.ConjugateGradient(max_steps=2)])
    assert found.reference.startswith("cg")
    assert "exact" not in found.why and "name another one with reference=" in found.why


def test_complex_gradients_are_compared_over_the_real_numbers():
    w = Vector(torch.zeros(2, dtype=torch.float64))
    x = Vector(torch.tensor([1.0 + 2.0j, -1.0j], dtype=torch.complex128))
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=LEARNING_RATE),
        loss=lambda w, _, *, x: (w.v - x.v.real - 3.0 * x.v.imag).square().sum(),
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: w.v.sum() + x.v.real.sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], "direct")
    rows = rows_of(mlo.compare_engines(optimizer, "x", ["direct", "first_order"]))
    # dw/dx adds 1 + 3i to the 1 of the direct term, per entry.
    assert rows["direct"].error == 0.0
    assert rows["first_order"].error == pytest.approx(abs(1 + 3j) / abs(2 + 3j))
    assert rows["first_order"].cosine == pytest.approx(2.0 / abs(2 + 3j))


@dataclass(frozen=True, kw_only=True)
class NotANumber(mlo.Engine):
    """Whose q, or whose residual alone, is not a number."""

    of_residual: bool = False

    name: ClassVar[str] = "not_a_number"

    def solve(self, system, cotangent):
        q = [torch.full_like(t, 1.0 if self.of_residual else math.nan) for t in system.parameters]
        report = self.report(system.problem, residual=math.nan, advice="Do not use it.")
        return Solve(q=q, report=report)


@pytest.mark.parametrize("of_residual", [False, True])
def test_a_row_that_is_not_finite_is_no_reference(of_residual):
    engines = {"nan": NotANumber(of_residual=of_residual), "cg": "cg", "identity": "identity"}
    found = mlo.compare_engines(still(bilevel_quadratic()).optimizer("cg"), "x", engines)
    assert found.reference == "cg"
    rows = rows_of(found)
    assert rows["cg"].error == 0.0 and math.isfinite(rows["identity"].error)
    assert "relative residual of inf" in rows["nan"].notes[0]


@pytest.mark.parametrize("reference", ["nan", None])
def test_a_gradient_that_is_not_finite_measures_nothing(reference):
    engines = {"nan": NotANumber()} | ({"cg": "cg"} if reference else {})
    optimizer = still(bilevel_quadratic()).optimizer("cg")
    by = f"'{reference}'" if reference else "any engine"
    with pytest.raises(mlo.EngineError, match=f"by {by} is not finite"):
        mlo.compare_engines(optimizer, "x", engines, reference=reference)


def test_a_slow_gradient_is_not_repeated_for_its_time(monkeypatch):
    asked, clock = [], iter(range(100))
    ask = compare._ask
    monkeypatch.setattr(compare, "_ask", lambda *args: asked.append(args) or ask(*args))
    monkeypatch.setattr(compare, "_now", lambda optimizer: float(next(clock)))
    optimizer = bilevel_quadratic().optimizer("cg")
    mlo.compare_engines(optimizer, "x", ["cg"], repetitions=5)
    assert len(asked) == 2  # one to look at, and one second


def test_rows_are_shown_as_they_are_made():
    optimizer, seen = bilevel_quadratic().optimizer("cg"), []
    found = mlo.compare_engines(optimizer, "x", ["cg", "direct"], on_row=seen.append)
    assert [row.label for row in seen] == [row.label for row in found.rows]
    assert all(row.error is None and row.seconds is not None for row in seen)


def test_a_note_of_several_rows_is_printed_once():
    optimizer = trilevel_quadratic().optimizer("one_step")
    top = list(optimizer.problems)[-1]
    engines = {"a": "unroll", "b": {"name": "unroll", "steps": 2}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mlo.compare_engines(optimizer, top, engines)
    lines = str(found).splitlines()
    common = set(found.rows[0].notes) & set(found.rows[1].notes)
    assert common and all(f"a, b: {note}" in lines for note in common)


def test_solves_of_one_problem_share_a_note():
    optimizer = trilevel_quadratic().optimizer({"name": "neumann", "num_terms": 5})
    optimizer.step()
    top = list(optimizer.problems)[-1]
    found = mlo.compare_engines(optimizer, top, [{"name": "neumann", "num_terms": 5}])
    lowest = next(iter(optimizer.problems))
    made = sum(report.problem == lowest for report in found.rows[0].reports)
    notes = [note for note in found.rows[0].notes if repr(lowest) in note]
    assert made > 1 and len(notes) == 1
    assert f"{made} of the {made} solves of {lowest!r} are truncated at a relative" in notes[0]


def test_a_reference_may_be_named():
    optimizer = diamond().optimizer("one_step")
    found = mlo.compare_engines(optimizer, "arch", ["direct", "identity"], reference="identity")
    assert (found.reference, found.why) == ("identity", "as asked")
    rows = rows_of(found)
    assert rows["identity"].error == 0.0 and rows["direct"].error > 0.1


def test_a_gradient_of_zero_has_no_cosine():
    optimizer = bilinear_game().optimizer("gmres")
    rows = rows_of(mlo.compare_engines(optimizer, "x", ["gmres", "first_order"]))
    assert (rows["first_order"].error, rows["first_order"].cosine) == (1.0, None)
    zero = mlo.compare_engines(optimizer, "x", ["gmres", "first_order"], reference="first_order")
    assert rows_of(zero)["gmres"].error == float("inf")
    assert rows_of(zero)["first_order"].error == 0.0
    assert str(zero)


# ------------------------------ what is asked wrongly, or cannot be served


def test_an_engine_that_cannot_serve_has_the_reason_in_its_row():
    optimizer = bilinear_game().optimizer("gmres")
    found = mlo.compare_engines(
        optimizer, "x", ["cg", "gmres", {"name": "direct", "max_parameters": 1}]
    )
    rows = rows_of(found)
    assert "whose Jacobian is not symmetric" in rows["cg"].failure
    assert "more than max_parameters=1" in rows["direct(max_parameters=1)"].failure
    assert found.reference == "gmres" and rows["cg"].gradient is None
    text = str(found).splitlines()
    assert "cg                        not supported" in text
    assert any(line.startswith("cg: Problem 'game' is a game") for line in text)


class Once(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_a_loss_without_second_derivative_has_a_failing_row():
    w, x = Vector(torch.ones(2).double()), Vector(torch.ones(2).double())

    def problem(name, module, loss):
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        return mlo.Problem(name, module=module, optimizer=sgd, loss=loss)

    optimizer = mlo.MultilevelOptimizer(
        [
            problem("w", w, lambda w, _, *, x: Once.apply(w.v - 2 * x.v).sum()),
            problem("x", x, lambda x, _, *, w: (w.v**2).sum()),
        ],
        "darts",
    )
    found = mlo.compare_engines(optimizer, "x", ["one_step", "darts"])
    rows = rows_of(found)
    assert "has no double backward" in rows["one_step"].failure
    assert found.reference == "darts" and rows["darts"].error == 0.0


@pytest.mark.parametrize(
    ("name", "engines", "options", "error", "message"),
    [
        ("arhc", ["cg"], {}, mlo.GraphError, "Did you mean 'arch'"),
        ("w1", ["cg"], {}, mlo.GraphError, "flows through no solution"),
        ("arch", "cg", {}, mlo.ConfigurationError, "single engine 'cg'. Pass a list"),
        ("arch", {"name": "cg"}, {}, mlo.ConfigurationError, "Pass a list"),
        ("arch", [], {}, mlo.ConfigurationError, "engines is empty"),
        ("arch", ["cg", "cg"], {}, mlo.ConfigurationError, "Two of the engines are called 'cg'"),
        ("arch", ["cgg"], {}, mlo.EngineError, "Did you mean 'cg'"),
        ("arch", ["cg"], {"reference": "direct"}, mlo.ConfigurationError, "Valid names: cg"),
        ("arch", ["cg"], {"repetitions": 0}, mlo.ConfigurationError, "at least 1, got 0"),
        (
            "arch",
            {"dense": {"name": "direct", "max_parameters": 1}},
            {},
            mlo.EngineError,
            "No engine can serve as the reference.*dense: Engine 'direct' builds",
        ),
        (
            "arch",
            ["cg", {"name": "direct", "max_parameters": 1}],
            {"reference": "direct(max_parameters=1)"},
            mlo.EngineError,
            "No engine can serve as the reference",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_with_advice(name, engines, options, error, message):
    optimizer = diamond().optimizer("one_step")
    with pytest.raises(error, match=message):
        mlo.compare_engines(optimizer, name, engines, **options)


# ------------------------------ how it is shown


def test_labels_say_engines_and_options():
    engines = [
        "cg",
        {"name": "neumann", "num_terms": 5},
        mlo.ConjugateGradient(damping=0.1),
        mlo.Neumann(products=mlo.FiniteDifference()),
        mlo.darts(),
        {"default": "cg", "w1": mlo.Unroll(steps=2)},
    ]
    assert list(compare._labelled(engines)) == [
        "cg",
        "neumann(num_terms=5)",
        "cg(damping=0.1)",
        "neumann × finite_difference",
        "darts",
        "default: cg, w1: unroll(steps=2)",
    ]


def comparison(monkeypatch):
    """A comparison: one engine takes 0.5 seconds, another 1/8, 1/2 and 1/4 (the median)."""
    clock = iter([0.0, 0.5, 1.0, 1.5, 10.0, 10.125, 20.0, 20.5, 30.0, 30.25])
    monkeypatch.setattr(compare, "_now", lambda optimizer: next(clock))
    optimizer = diamond().optimizer("one_step")
    optimizer.step()
    return mlo.compare_engines(
        optimizer, "arch", ["first_order", "direct", {"name": "direct", "max_parameters": 1}]
    )


def test_a_comparison_prints_as_a_table(monkeypatch):
    found = comparison(monkeypatch)
    title, heading, first, direct, refused, note = str(found).splitlines()
    assert title.startswith("Gradient of 'arch' at round 1; errors are relative to 'direct' (the")
    assert heading.split() == ["engine", "error", "cosine", "seconds", "products"]
    assert direct.split() == ["direct", "0.0e+00", "1.000000", "0.25", "15"]
    assert refused.split() == ["direct(max_parameters=1)", "not", "supported"]
    assert len(heading) == len(first) == len(direct)
    assert note.startswith("direct(max_parameters=1): Engine 'direct' builds a dense Jacobian")


def test_a_notebook_shows_a_table(monkeypatch):
    table = ET.fromstring(comparison(monkeypatch)._repr_html_())
    rows = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    assert rows[0] == ["engine", "error", "cosine", "seconds", "products", "notes"]
    assert rows[2] == ["direct", "0.0e+00", "1.000000", "0.25", "15", ""]
    assert rows[3][:2] == ["direct(max_parameters=1)", "not supported"] and "dense" in rows[3][2]


def test_a_picture_has_a_point_per_engine(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = comparison(monkeypatch)
    axes = found.plot()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["first_order", "direct (no error)"]
    heights = [float(line.get_ydata()[0]) for line in axes.lines]
    assert heights == pytest.approx([found.rows[0].error, found.rows[0].error / 10])
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "seconds"
    assert found.plot(axes) is axes
    matplotlib.pyplot.close(axes.figure)


def test_matplotlib_is_imported_by_the_picture_only():
    tree = ast.parse(Path(compare.__file__).read_text("utf-8"))
    found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "matplotlib" in found
    assert "matplotlib" not in [getattr(node, "module", "") for node in tree.body]


def test_time_on_a_gpu_is_taken_when_its_work_is_done(monkeypatch):
    devices = [torch.device("cpu"), torch.device("cuda", 1), torch.device("cuda", 0)]
    problems = {str(k): SimpleNamespace(device=device) for k, device in enumerate(devices)}
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: float(len(waited)))
    assert compare._now(SimpleNamespace(problems=problems)) == 2.0
    assert sorted(device.index for device in waited) == [0, 1]


def test_time_is_the_processors_on_a_cpu():
    optimizer = diamond().optimizer("one_step")
    (row,) = mlo.compare_engines(optimizer, "arch", ["direct"], repetitions=5).rows
    assert 0.0 < row.seconds < 1.0


def test_a_choice_that_drops_a_solution_is_not_the_reference():
    """Its only solve may have the smallest residual, but the path through m has none."""
    optimizer = trilevel_quadratic().optimizer({"w": "cg", "m": "one_step"})
    optimizer.step()
    choices = {
        "m dropped": {"w": "direct", "m": "first_order"},
        "both solved": "direct",
        "both dropped": "first_order",
    }
    found = mlo.compare_engines(optimizer, "x", choices)
    assert found.reference == "both solved"
    by_label = {row.label: row for row in found.rows}
    assert by_label["both solved"].error == 0.0 < by_label["m dropped"].error
    left = mlo.compare_engines(
        optimizer, "x", {key: choices[key] for key in ("both dropped", "m dropped")}
    )
    assert left.reference == "m dropped"


def test_a_truncated_solve_has_a_note_with_its_residual():
    optimizer = bilevel_quadratic().optimizer("cg")
    optimizer.step()
    found = mlo.compare_engines(optimizer, "x", ["cg", {"name": "neumann", "num_terms": 20}])
    cg, neumann = found.rows
    assert cg.notes == ()
    (note,) = neumann.notes
    assert note.startswith("the solve of 'w' is truncated at a relative residual of ")
