"""Stochastic bilevel methods at equal oracle calls: mlo's beside those of benchopt's bilevel suite.

    python benchmarks/stochastic.py [--suite FOLDER] [--tasks quadratic10 ...] [--units 4096]
    python benchmarks/stochastic.py --spread       # one point of the quadratics' grid, five seeds
    python benchmarks/stochastic.py --short        # seconds; no suite, a few rounds

FOLDER (or the environment variable BILEVEL_SUITE) is a checkout of benchopt/benchmark_bilevel; its
solvers need jax and benchopt. Without it the table has mlo's rows only.

One oracle call is a gradient of a loss in both variables, or a Hessian or mixed product, on a batch
of 64. Every method gets the same grid of step sizes α (of the lower variable and of the linear
system) and ratios (the upper step size is α / ratio). The row is the best point of the grid at the
end of the budget: one seed, so differences of a few per cent mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import write_measurements
from stochastic_tasks import BATCH, TASKS, Task, quadratic
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import mlo

STEPS = (0.03, 0.1, 0.3)
RATIOS = (0.001, 0.01, 0.1, 1.0)
GRID = tuple(product(STEPS, RATIOS))
INNER = 10
"""Lower steps and terms of a series per round, where a method has several."""

SHORT = 1600
"""Oracle calls of the short version."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One of mlo's combinations.

    Attributes:
        engine: α → the engine of the lower problem.
        cost: oracle calls per round, given the blocks of both data sets.
        lower, upper: settings of the problems.
        order: of the round.
        whole_every: rounds from one batch of all data to the next, given the blocks.
        solves: whether the lower problem has data for its solves.
        exponents: of the decay of the lower and the upper step size with the round.
        averaged: whether the average of x is judged.
    """

    engine: Callable[[float], Any]
    cost: Callable[[int, int], float]
    lower: dict[str, Any]
    upper: dict[str, Any]
    order: str = "simultaneous"
    whole_every: Callable[[int, int], int] | None = None
    solves: bool = False
    exponents: tuple[float, float] = (0.0, 0.0)
    averaged: bool = False


def soba(alpha: float) -> Any:
    """`soba` at the lower problem's learning rate."""
    return mlo.Soba(step_size="lower")


def neumann(alpha: float) -> Any:
    """A series of which each factor is on a batch of its own."""
    return mlo.Neumann(num_terms=INNER + 1, step_size=alpha, fresh_batches=True, tol=1e9)


def half_an_epoch(lower: int, upper: int) -> int:
    """Rounds from one pass over all data to the next, as in the suite's SRBA."""
    return (lower + upper) // 2


def estimator(name: str | None) -> dict[str, Any]:
    """The settings of a problem with an estimator."""
    return {"estimator": name}


METHODS = {
    "soba": Method(engine=soba, cost=lambda n, m: 4, lower={}, upper={}),
    "soba, average": Method(
        engine=soba, cost=lambda n, m: 4, lower={}, upper={"average": "tail"}, averaged=True
    ),
    "soba, 1/√t": Method(
        engine=soba, cost=lambda n, m: 4, lower={}, upper={}, exponents=(0.5, 0.5)
    ),
    "saga (SABA)": Method(
        engine=soba, cost=lambda n, m: 4, lower=estimator("saga"), upper=estimator("saga")
    ),
    "spider (SRBA)": Method(
        engine=soba,
        cost=lambda n, m: 8 + (3 * n + m - 8) / half_an_epoch(n, m),
        lower=estimator("spider"),
        upper=estimator("spider"),
        whole_every=half_an_epoch,
    ),
    "storm, neumann (MRBO)": Method(
        engine=neumann,
        # Twice: the lower gradient, the upper one, ten factors, the mixed product.
        cost=lambda n, m: 2 * (3 + INNER),
        lower={"estimator": mlo.Storm(rate=lambda t: 0.5 * (t + 1) ** (-2 / 3))},
        upper={"estimator": mlo.Storm(rate=lambda t: 0.5 * (t + 1) ** (-2 / 3))},
        solves=True,
        exponents=(1 / 3, 1 / 3),
    ),
    "soba, fresh steps (AmIGO)": Method(
        engine=lambda alpha: mlo.Soba(step_size="lower", steps=INNER, fresh_batches=True),
        cost=lambda n, m: 2 * INNER + 2,
        lower={"steps": INNER},
        upper={},
        order="lower_first",
        solves=True,
    ),
    "neumann, fresh (StocBiO)": Method(
        engine=neumann,
        cost=lambda n, m: 2 * INNER + 2,
        lower={"steps": INNER},
        upper={},
        order="lower_first",
        solves=True,
    ),
}

SUITE = {
    "soba": lambda n, m: 4,
    "saba": lambda n, m: 4,
    "srba": lambda n, m: 8 + (3 * n + m - 8) / ((n + m) // 2),
    "mrbo": lambda n, m: 2 * (3 + INNER),
    # Every `period` rounds all data: two gradients, the factors and the mixed product.
    "vrbo": lambda n, m: 2 * INNER * (3 + INNER) + ((2 + INNER) * n + m) / ((n + m) // 2),
    "amigo": lambda n, m: 2 * INNER + 2,
    "stocbio": lambda n, m: 2 * INNER + 2,
    "f2sa": lambda n, m: 3 * INNER + 3,
}
"""Solver of the suite → oracle calls per iteration, given the blocks of both data sets."""


SPREAD = {
    "saga (SABA)": ("saba", 1.0),
    "spider (SRBA)": ("srba", 1.0),
    "storm, neumann (MRBO)": ("mrbo", 0.1),
}
"""Method → the suite's solver of it, and the ratio at which both are run with several seeds."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The best point of one method's grid on one task."""

    side: str
    method: str
    value: float
    second: float
    step: float
    ratio: float
    rounds: int
    seconds: float


# ------------------------------ mlo


def optimizer_of(task: Task, method: Method, step: float, ratio: float, seed: int) -> Any:
    """The optimizer of one run, and the modules that hold z and x."""
    n, m = task.blocks
    whole = None if method.whole_every is None else method.whole_every(n, m)

    def data(tensors: Any, number: int) -> mlo.IndexedBatches:
        generator = torch.Generator().manual_seed(10 * seed + number)
        return mlo.IndexedBatches(
            *tensors, batch_size=task.rows, generator=generator, whole_every=whole
        )

    def problem(
        name: str, start: np.ndarray, rate: float, decay: float, loss: Any, **settings: Any
    ) -> mlo.Problem:
        module = torch.nn.ParameterDict({"p": torch.tensor(start)})
        sgd = SGD(module.parameters(), lr=rate)
        schedule = LambdaLR(sgd, lambda t: (t + 1) ** -decay) if decay else None
        return mlo.Problem(
            name, module=module, optimizer=sgd, scheduler=schedule, loss=loss, **settings
        )

    solve_data = data(task.lower_data, 2) if method.solves else None
    lower = problem(
        "z",
        task.z0,
        step,
        method.exponents[0],
        lambda z, batch, *, x: task.lower(z["p"], x["p"], batch.tensors),
        data=data(task.lower_data, 0),
        solve_data=solve_data,
        **method.lower,
    )
    upper = problem(
        "x",
        task.x0,
        step / ratio,
        method.exponents[1],
        lambda x, batch, *, z: task.upper(z["p"], x["p"], batch.tensors),
        data=data(task.upper_data, 1),
        **method.upper,
    )
    return mlo.MultilevelOptimizer(
        [lower, upper], method.engine(step), order=method.order, on_nonfinite=None
    )


def run_mlo(task: Task, name: str, units: int, step: float, ratio: float, seed: int) -> Row | None:
    """One point of the grid; None where it diverged."""
    method = METHODS[name]
    optimizer = optimizer_of(task, method, step, ratio, seed)
    rounds = max(1, int(units / method.cost(*task.blocks)))
    x, start = optimizer.problems["x"].module["p"], time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlo.SolveWarning)
        for k, _ in enumerate(optimizer.run(rounds)):
            if k % 32 == 0 and not has_settled(x.detach().numpy()):
                return None
    seconds = time.process_time() - start
    found = optimizer.averages["x"]["p"] if method.averaged else x.detach()
    return judged("mlo", task, name, found.numpy(), step, ratio, rounds, seconds)


def has_settled(x: np.ndarray) -> bool:
    """Whether x has not run away."""
    return bool(np.isfinite(x).all() and np.abs(x).max() < 1e4)


def judged(
    side: str,
    task: Task,
    method: str,
    x: np.ndarray,
    step: float,
    ratio: float,
    rounds: int,
    seconds: float,
) -> Row | None:
    """The row of a run; None where it diverged."""
    if not has_settled(x):
        return None
    value, second = task.value(x.astype(np.float64))
    if not np.isfinite(value):
        return None
    return Row(
        side=side,
        method=method,
        value=value,
        second=second,
        step=step,
        ratio=ratio,
        rounds=rounds,
        seconds=seconds,
    )


# ------------------------------ the suite


@contextlib.contextmanager
def suite_at(folder: Path) -> Iterator[None]:
    """Makes the suite's modules importable; its cache stays in its folder."""
    before = os.getcwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))


def run_suite(
    task: Task, name: str, units: int, seed: int, points: Sequence[tuple[float, float]] = GRID
) -> Iterator[Row]:
    """The points of the grid that did not diverge."""
    import jax
    import jax.numpy as jnp

    n, m = task.blocks
    iterations = max(1, int(units / SUITE[name](n, m)))
    pieces = 8
    options = {
        "step_size": points[0][0],
        "outer_ratio": points[0][1],
        "batch_size": BATCH,
        "eval_freq": max(1, iterations // pieces),
        "random_state": seed,
    }
    solver = importlib.import_module(f"solvers.{name}").Solver.get_instance(**options)
    f_inner, f_outer = task.jax_losses()
    solver.set_objective(
        f_inner, f_outer, n * BATCH, m * BATCH, jnp.asarray(task.z0), jnp.asarray(task.x0)
    )
    for step, ratio in points:
        solver.step_size, solver.outer_ratio = step, ratio
        left, start = pieces, time.process_time()

        def more() -> bool:
            nonlocal left
            left -= 1
            return left >= 0 and has_settled(np.asarray(solver.outer_var))

        solver.outer_var = jnp.asarray(task.x0)
        solver.run(more)
        jax.block_until_ready(solver.outer_var)
        if left >= 0:
            continue
        seconds = time.process_time() - start
        made = pieces * solver.eval_freq
        x = np.asarray(solver.outer_var)
        row = judged("suite", task, name, x, step, ratio, made, seconds)
        if row is not None:
            yield row


# ------------------------------ the table


def best(rows: list[Row]) -> Row | None:
    """The row of least value."""
    return min(rows, key=lambda row: row.value, default=None)


def rows_of(task: Task, units: int, seed: int, suite: Path | None) -> Iterator[Row]:
    """The best row of every method."""
    for name in METHODS:
        made = [run_mlo(task, name, units, a, r, seed) for a, r in GRID]
        row = best([row for row in made if row is not None])
        if row is not None:
            yield row
    if suite is not None:
        with suite_at(suite):
            for name in SUITE:
                row = best(list(run_suite(task, name, units, seed)))
                if row is not None:
                    yield row


def print_table(task: Task, rows: list[Row], units: int) -> None:
    """One task's table in Markdown, the best method first."""
    print(f"\n**{task.name}** ({task.unit}; {units} oracle calls)\n")
    print("| by | method | value | second | α | ratio | rounds | s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row.value):
        second = "" if np.isnan(row.second) else f"{row.second:.3f}"
        print(
            f"| {row.side} | {row.method} | {row.value:.4g} | {second} | {row.step} | {row.ratio} "
            f"| {row.rounds} | {row.seconds:.2f} |"
        )
    sys.stdout.flush()


def measurement(task: str, row: Row) -> dict[str, str]:
    """The columns of the file of measurements."""
    return {
        "task": task,
        "by": row.side,
        "method": row.method,
        "value": f"{row.value:.4g}",
        "second": "" if np.isnan(row.second) else f"{row.second:.3f}",
        "step": str(row.step),
        "ratio": str(row.ratio),
        "rounds": str(row.rounds),
        "seconds": f"{row.seconds:.2f}",
    }


def print_spread(task: Task, units: int, suite: Path | None) -> None:
    """The values of several seeds at one point of the grid, sorted."""
    for name, (solver, ratio) in SPREAD.items():
        point, seeds = (0.3, ratio), range(1, 6)
        rows = {"mlo": [run_mlo(task, name, units, *point, seed) for seed in seeds]}
        if suite is not None:
            with suite_at(suite):
                rows["suite"] = [
                    next(run_suite(task, solver, units, seed, [point]), None) for seed in seeds
                ]
        for side, made in rows.items():
            values = sorted(np.inf if row is None else row.value for row in made)
            print(f"| {task.name} | {name} | {side} | {', '.join(f'{v:.2g}' for v in values)} |")
    sys.stdout.flush()


def suite_folder(given: str | None) -> Path | None:
    """The suite's folder, or None with the reason on the standard output."""
    folder = given or os.environ.get("BILEVEL_SUITE")
    if not folder:
        print("Without the suite: --suite FOLDER or BILEVEL_SUITE names no checkout of it.")
        return None
    path = Path(folder).resolve()
    if not (path / "solvers" / "saba.py").exists():
        print(f"Without the suite: {path} has no solvers/saba.py.")
        return None
    for module in ("jax", "benchopt"):
        if importlib.util.find_spec(module) is None:
            print(f"Without the suite: its solvers need {module}, which is not installed.")
            return None
    return path


def main() -> None:
    """Runs the grid of every method and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a checkout of benchopt/benchmark_bilevel")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--units", type=int, default=4096, help="oracle calls per run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spread", action="store_true", help="five seeds of some methods")
    parser.add_argument("--short", action="store_true", help="one task, one point, few calls")
    parser.add_argument("--csv", type=Path, help="also writes the table into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.short:
        task = quadratic(0.1, n=512, m=256, d=10, p=4)
        rows = [run_mlo(task, name, SHORT, 0.3, 1.0, options.seed) for name in METHODS]
        print_table(task, [row for row in rows if row is not None], SHORT)
        return
    suite = suite_folder(options.suite)
    if options.spread:
        for name in ("quadratic10", "quadratic100"):
            print_spread(TASKS[name](), options.units, suite)
        return
    for name in options.tasks:
        task = TASKS[name]()
        rows = list(rows_of(task, options.units, options.seed, suite))
        print_table(task, rows, options.units)
        if options.csv:
            measured = [measurement(name, row) for row in rows]
            part, packages = ("task", "by", "method"), ("torch", "jax", "benchopt")
            write_measurements(options.csv, measured, part=part, packages=packages)


if __name__ == "__main__":
    main()
