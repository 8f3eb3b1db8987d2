"""How exact each engine is, in float64: the table "Exactness" of docs/benchmarks.md.

    python benchmarks/exactness.py --csv docs/data/exactness.csv   # a minute; then: make results

- Engines that solve are compared with closed forms: graphs of quadratic problems of two to many
  levels, at their solution (`mlo.testing`). An iteration is given enough steps to reach rounding.
- Engines that differentiate steps are compared with the same steps written as one plain program,
  which autograd differentiates: two problems, five steps from a point that is not the solution.
- Those that leave something out are compared with their formula.
- The architecture's gradient of a tiny LFM-CW search is compared with Eqs. 6-10 and 4 of the paper
  as one plain program, which is tests/oracle/naive_lfmcw.py.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measuring import ROOT, write_measurements
from torch import Tensor

import mlo
from mlo.errors import SolveWarning
from mlo.testing import (
    GRAPHS,
    LEARNING_RATE,
    ClosedForm,
    bilevel_quadratic,
    layered,
    relative_error,
    trilevel_quadratic,
)

SEEDS = range(5)

Options = dict[str, object]

SOLVERS: dict[str, Options] = {
    "direct": {},
    "cg": {"max_steps": 50, "tol": 1e-15},
    "minres": {"max_steps": 50, "tol": 1e-15},
    "gmres": {"max_steps": 50, "tol": 1e-15},
    "normal_cg": {"max_steps": 100, "tol": 1e-15},
    "nystrom": {"max_steps": 50, "tol": 1e-15},
    "neumann": {"num_terms": 4000},
    "sid": {"steps": 4000},
    "soba": {"steps": 4000},
    "penalty": {"steps": 300},
}
"""Engines that approach the exact gradient, with options by which they reach it."""

LONG = ("neumann", "sid", "soba", "penalty")
"""Those of many products, which are not tried where products multiply or problems are many."""

STEPS: dict[str, tuple[int, Options]] = {
    "one_step": (1, {}),
    "darts": (1, {}),
    "unroll": (5, {"steps": 5}),
    "zeroth_order": (5, {"steps": 5, "samples": 16}),
}
"""Engines that differentiate steps → how many of the five, and their options."""

MADE = 5
"""Steps of the lower problem per round, for `STEPS`."""

CLOSED_FORM = "closed form"
PLAIN_STEPS = "the steps as a plain program, differentiated by autograd"
PLAIN_SEARCH = "Eqs. 6–10 and 4 as a plain program, differentiated by autograd"


def graphs(engine: mlo.hypergradient.AbstractEngine) -> dict[str, Callable[..., ClosedForm]]:
    """The graphs that an engine serves."""
    found = {name: make for name, make in GRAPHS.items() if name != "layered"}
    if engine.needs_symmetry:
        del found["game"]
    if engine.name not in LONG:
        found["1,024 paths"] = functools.partial(layered, layers=10)
        if engine.differentiable:
            found["tri-level"] = trilevel_quadratic
    return found


def row(engine: str, options: Options, against: str, cases: str, error: float) -> dict[str, object]:
    """A row of the file."""
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    return {
        "engine": engine,
        "options": said,
        "compared with": against,
        "cases": cases,
        "relative error": "0" if error == 0.0 else f"{error:.0e}",
    }


# ------------------------------ engines


def solver_row(name: str, options: Options) -> dict[str, object]:
    """The largest error of a solver, over graphs and seeds."""
    engine = mlo.engine_from({"name": name, **options})
    found = graphs(engine)
    errors = []
    for make in found.values():
        for seed in SEEDS:
            problem = make(seed=seed)
            gradient = problem.optimizer(engine).gradient(problem.upper)["v"]
            errors.append(relative_error(gradient, problem.exact))
    cases = f"{', '.join(found)}; {len(SEEDS)} seeds each"
    return row(name, options, CLOSED_FORM, cases, max(errors))


def away(seed: int) -> ClosedForm:
    """Two quadratic problems, the lower one away from its solution."""
    problem = bilevel_quadratic(seed=seed)
    (lower, _) = problem.problems
    with torch.no_grad():
        lower.parameters["v"].add_(1.0)
    return problem


def plain_steps(problem: ClosedForm, kept: int) -> Tensor:
    """The gradient through the last `kept` of `MADE` steps of gradient descent."""
    lower, upper = problem.losses["w"], problem.losses["x"]
    w, x = problem.value("w").clone(), problem.value("x").clone().requires_grad_()
    for step in range(MADE):
        w = (w.detach() if step <= MADE - kept else w).requires_grad_()
        w = w - LEARNING_RATE * torch.autograd.grad(lower(w, x), w, create_graph=True)[0]
    (gradient,) = torch.autograd.grad(upper(x, w), x)
    return gradient


def steps_row(name: str, kept: int, options: Options) -> dict[str, object]:
    """The largest error of the gradient with which the upper problem is moved in a round."""
    errors = []
    for seed in SEEDS:
        problem = away(seed)
        problem.problems[0].steps = MADE
        expected, before = plain_steps(problem, kept), problem.value("x").clone()
        problem.optimizer({"name": name, **options}).step()
        moved = (before - problem.value("x")) / LEARNING_RATE
        errors.append(relative_error(moved, expected))
    cases = f"bilevel, {kept} of {MADE} steps; {len(SEEDS)} seeds"
    return row(name, options, PLAIN_STEPS, cases, max(errors))


def left_out_rows() -> Iterator[dict[str, object]]:
    """Engines whose inverse is not meant to be the exact one, beside their formulas."""
    formulas: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "identity": ("its formula, q = v", lambda _, v: v),
        "first_order": ("the direct gradient", lambda _, v: torch.zeros_like(v)),
    }
    for name, (against, inverse) in formulas.items():
        engine = mlo.engine_from(name)
        found = graphs(engine)
        found.pop("tri-level", None)  # its closed form is that of the exact inverse
        errors = []
        for make in found.values():
            for seed in SEEDS:
                problem = make(seed=seed)
                gradient = problem.optimizer(engine).gradient(problem.upper)["v"]
                expected = problem.swept(inverse)
                distance, size = float((gradient - expected).norm()), float(expected.norm())
                errors.append(distance / size if size else distance)
        cases = f"{', '.join(found)}; {len(SEEDS)} seeds each"
        yield row(name, {}, against, cases, max(errors))
    errors = []
    for seed in SEEDS:
        problem = away(seed)
        w, x = (problem.value(name).clone().requires_grad_() for name in ("w", "x"))
        g, h = torch.autograd.grad(problem.losses["w"](w, x), (w, x))
        direct, v = torch.autograd.grad(problem.losses["x"](x, w), (x, w))
        found_gradient = problem.optimizer("outer_product").gradient("x")["v"]
        errors.append(relative_error(found_gradient, direct - (g @ v) / (g @ g) * h))
    cases = f"bilevel, away from its solution; {len(SEEDS)} seeds"
    yield row("outer_product", {}, "its formula, A = g gᵀ and B = g hᵀ", cases, max(errors))


# ------------------------------ the search


def search_rows() -> Iterator[dict[str, object]]:
    """The architecture's gradient of a tiny LFM-CW search."""
    # The plain program, and the search that it repeats, are those of the tests.
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "oracle")]
    from gradient_of_update import gradient_of_next_round
    from test_lfmcw_gradient import FEW, SMOOTH, make, oracle

    what = "architecture gradient of a tiny LFM-CW"
    for primitives, said in ((FEW, "one primitive of each kind"), (None, "all primitives")):
        recipe, modules, optimizer = make(primitives=primitives)
        error = relative_error(optimizer.gradient("arch"), oracle(recipe, modules, optimizer))
        details = f"{said}, ReLU, DCGAN, SGD with momentum, Adam; seed 3"
        yield row("one_step", {}, PLAIN_SEARCH, f"{what} ({details})", error)

    errors = []
    for _ in range(4):
        expected = oracle(recipe, modules, optimizer)
        errors.append(relative_error(gradient_of_next_round(optimizer), expected))
    cases = "the real updates of the architecture in rounds 1 to 4 of that search"
    yield row("one_step", {}, PLAIN_SEARCH, cases, max(errors))

    *_, exact = make(primitives=list(SMOOTH), activation="silu")
    *_, difference = make(primitives=list(SMOOTH), activation="silu", engine="darts")
    error = relative_error(difference.gradient("arch"), exact.gradient("arch"))
    cases = f"{what} (SiLU, average pooling; seed 3)"
    yield row("darts", {}, "`one_step`", cases, error)


def measured() -> Iterator[dict[str, object]]:
    """All rows."""
    yield from search_rows()
    for name, options in SOLVERS.items():
        yield solver_row(name, options)
    for name, (kept, options) in STEPS.items():
        yield steps_row(name, kept, options)
    yield from left_out_rows()


def main() -> None:
    """Prints the rows as they are measured, and writes the file."""
    parser = argparse.ArgumentParser(description="Measures how exact each engine is.")
    parser.add_argument("--csv", type=Path, help="the file to write: docs/data/exactness.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # A residual of 1e-15 is asked for so that iterations go on as far as rounding lets them.
    warnings.simplefilter("ignore", SolveWarning)
    rows = []
    for made in measured():
        rows.append(made)
        print(f"{made['engine']:14} {made['relative error']}  {made['cases']}", flush=True)
    if args.csv is not None:
        args.csv.unlink(missing_ok=True)  # all of it is measured anew
        write_measurements(args.csv, rows, part=("engine",))


if __name__ == "__main__":
    main()
