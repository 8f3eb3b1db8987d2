"""mlo's hypergradient engines against other libraries: error, time, memory, evaluations.

    python benchmarks/engines.py            # all problems; about 20 minutes on 2 cores
    python benchmarks/engines.py --problem diamond --repeats 9 --output table.md
    python benchmarks/engines.py --quick    # small sizes, about a minute; peers that are installed

`make benchmark-environment` makes an environment with the peers, `make benchmark` runs everything
in it. What the columns mean is printed below the tables. See `engines_problems.py` for the
problems, `engines_oracle.py` for the exact gradients and `engines_libraries.py` for the programs;
for `--problem solutions` (solutions of other solvers) `engines_solutions.py`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from engines_libraries import LIBRARIES, RECOMPUTED, TO_ROUNDING
from engines_oracle import reference
from engines_problems import PROBLEMS, build
from engines_solutions import SOLUTION_LEGEND, serve_row, solution_rows, solution_table
from engines_worker import serve
from measuring import Ratio, Worker, asked_in_turns, installed, write_measurements

import mlo
from lfmcw_app.errors import InputError

K = 10
"""Products with the Hessian of the iterative methods."""

MANY = 50

ROWS: dict[str, tuple[tuple[str, int], ...]] = {
    "mlo": (
        ("first_order", 0), ("one_step", 0), (RECOMPUTED, 0), ("darts", 0), ("neumann", K),
        ("cg", K), ("cg", MANY), (TO_ROUNDING, MANY), ("minres", K), ("gmres", K), ("nystrom", K),
        ("direct", 0), ("soba", 0), ("penalty", 0),
    ),
    "Betty": (("darts", 0), ("neumann", K), ("cg", K), ("cg", MANY)),
    "TorchOpt": (("one_step", 0), ("neumann", K), ("cg", K), (TO_ROUNDING, MANY), ("direct", 0)),
    "BOAT": (("one_step", 0), ("darts", 0), ("neumann", K), ("cg", K), ("cg", MANY)),
    "hypergrad": (("neumann", K), ("cg", K), ("nystrom", K)),
    "higher": (("one_step", 0),),
}  # fmt: skip
"""Library → (method by mlo's name, products). A method that it lacks has a row that says so."""

QUICK_METHODS = (RECOMPUTED, "darts", "cg")
BILEVEL = ("BOAT", "hypergrad")
"""Libraries that handle two levels only."""

LAYERED_METHODS = (
    ("one_step", 0), (RECOMPUTED, 0), ("darts", 0), ("neumann", K), ("cg", K), ("direct", 0),
    ("soba", 0), ("penalty", 0),
)  # fmt: skip
STEP_METHODS = ("one_step", RECOMPUTED, "darts")
"""Methods that approximate the derivative of one step, not of the solution."""

ROUNDS = {"soba": 100, "penalty": 20}
"""Steps at a fixed upper point before the error is taken, for methods that converge over steps."""

DIRECT_AT_MOST = 1000
"""Dense methods are left out if a lower problem has more parameters."""

READY_LIMIT = 120.0
"""Seconds for a process to import everything."""

FINISH_LIMIT = 300.0
"""Seconds for the steps before the comparison."""

SOLUTIONS = "solutions"
"""The problems of `engines_solutions.py`, with a table of their own."""

LAYERS = (2, 4, 6, 8)
PACKAGES = (
    "betty-ml", "torchopt", "boat-torch", "hypergrad", "higher", "jaxopt", "jax", "torch"
)  # fmt: skip

ROUNDED = ", ".join(f"`{method}` {count}" for method, count in ROUNDS.items())
LEGEND = f"""
One CPU thread. Every library gets the same losses, data, values and SGD, and one step is: one SGD
step of every lower problem, then the hypergradient and an SGD step of the outermost one. K = {K} or
{MANY} products with each Hessian as the row says, or fewer where `cg` ends at the rounding of
float32; Neumann series have the same α in all libraries (1 / λmax).

- *error*: ‖found − exact‖ / ‖exact‖ of the outermost gradient in float64, against the implicit
  function theorem at solutions with gradients below 1e-10; *error (1 step)*: against the derivative
  of one SGD step of each lower problem there, which is what `one_step` and `darts` approximate.
  *cosine* and *scale* (ratio of norms) are of the second for these methods, of the first for the
  others. The outermost problem rests. Steps before the error is taken: {ROUNDED}, else 1.
- *ms*: median processor time of a step in float32 over the turns, a process for each row, rows in
  turns; *mlo ÷ it*: ratio of the time of mlo's same method to it, median and quartiles over the
  turns.
- *MB*: peak resident memory of two steps over the resident memory after imports, set-up and a first
  evaluation of the losses.
- *losses*: evaluations of any problem's loss in one step in which no loss is checked; *passes*:
  those of autograd's engine.
"""


@dataclass(kw_only=True)
class Row:
    """One line of a table: what is measured, and the result.

    Attributes:
        answers: what the process answered to `start` and `finish`.
        failed: why there are no numbers, or an empty string.
    """

    library: str
    method: str
    steps: int
    seconds: list[float] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def name(self) -> str:
        """What distinguishes it from the other rows of its problem."""
        return f"{self.library}, {self.label}"

    @property
    def median(self) -> float | None:
        """Median time of a step."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def label(self) -> str:
        """The method and its products."""
        return f"{self.method}, K={self.steps}" if self.steps else self.method


def rows_of(problem: str, sizes: dict[str, int], *, quick: bool) -> list[Row]:
    """The rows of a problem's table; a library that is not installed has one."""
    rows = []
    offered = (*mlo.available_engines(), RECOMPUTED, TO_ROUNDING)
    for library, methods in ROWS.items():
        if find_spec(LIBRARIES[library][0]) is None:
            rows.append(Row(library=library, method="-", steps=0, failed="not installed"))
            continue
        if len(sizes) > 2 and library in BILEVEL:
            rows.append(Row(library=library, method="-", steps=0, failed="two levels only"))
            continue
        for method, steps in methods:
            if quick and (method not in QUICK_METHODS or steps == MANY):
                continue
            if problem.startswith("layered") and (method, steps) not in LAYERED_METHODS:
                continue
            if library == "mlo" and method not in offered:
                continue
            if method == "direct" and max(list(sizes.values())[:-1]) > DIRECT_AT_MOST:
                continue
            rows.append(Row(library=library, method=method, steps=steps))
    return rows


def measure(path: Path, rows: list[Row], *, repeats: int, limit: float) -> None:
    """Fills the rows: all are set up, then timed in turns, then compared."""
    workers: dict[str, Worker] = {}
    by_name = {row.name: row for row in rows}

    def ask(name: str, request: str, seconds: float) -> dict[str, Any]:
        answer = workers[name].ask(request, seconds)
        if "failed" in answer:
            give_up(name, answer["failed"])
        return answer

    def give_up(name: str, why: str) -> None:
        by_name[name].failed = why
        workers.pop(name).close()

    def set_up(row: Row) -> None:
        arguments = (row.library, row.method, row.steps, ROUNDS.get(row.method, 1), path)
        workers[row.name] = Worker([__file__, "worker", *map(str, arguments)])
        if "failed" not in ask(row.name, "ready", READY_LIMIT):
            row.answers |= ask(row.name, "start", limit)

    try:
        # Nothing is timed here, so each core sets up one at a time.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(set_up, [row for row in rows if not row.failed]))
        in_order = {row.name: workers[row.name] for row in rows if row.name in workers}
        times, failed = asked_in_turns(in_order, repeats, limit)
        for name, why in failed.items():
            give_up(name, why)
        for name, seconds in times.items():
            by_name[name].seconds = seconds
            by_name[name].answers |= ask(name, "finish", FINISH_LIMIT)
    finally:
        for worker in workers.values():
            worker.close()


def ratio_of(row: Row, rows: Sequence[Row]) -> Ratio | None:
    """The ratio of mlo's same method to a peer's row, if both were measured."""
    for ours in rows:
        same = ours.library == "mlo" and (ours.method, ours.steps) == (row.method, row.steps)
        if same and row.library != "mlo" and ours.seconds and row.seconds:
            return Ratio.of(ours.seconds, row.seconds)
    return None


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """The cells of one line."""
    found = row.answers
    if row.failed or row.median is None:
        return [row.library, row.label, row.failed, *[""] * 9]
    near = found["one_step" if row.method in STEP_METHODS else "implicit"]
    return [
        row.library,
        row.label,
        f"{found['implicit']['error']:.1e}",
        f"{found['one_step']['error']:.1e}",
        f"{near['cosine']:.4f}",
        f"{near['scale']:.3g}",
        f"{1e3 * row.median:.2f}",
        str(ratio_of(row, rows) or ""),
        f"{found['memory']:.1f}",
        str(found["evaluations"]),
        str(found["passes"]),
    ]


def measurements(problem: str, rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """The rows of the file of measurements."""
    for row in rows:
        found = dict.fromkeys(COLUMNS, "")
        if not row.failed and row.median is not None:
            (_, _, error, error_one_step, cosine, scale, ms, _, memory, losses, passes) = cells(
                row, rows
            )
            found |= {
                "error": error, "error_one_step": error_one_step, "cosine": cosine, "scale": scale,
                "ms": ms, "memory_mb": memory, "losses": losses, "passes": passes,
            }  # fmt: skip
            ratio = ratio_of(row, rows)
            found |= ratio.cells() if ratio else {}
        named = {"problem": problem, "library": row.library, "method": row.label}
        yield {**found, **named, "failed": row.failed}


COLUMNS = (
    "problem", "library", "method", "error", "error_one_step", "cosine", "scale", "ms", "ratio",
    "ratio_low", "ratio_high", "memory_mb", "losses", "passes", "failed",
)  # fmt: skip
"""Columns of the file of measurements; values that a row lacks are empty."""

HEADER = (
    "library", "method", "error", "error (1 step)", "cosine", "scale", "ms", "mlo ÷ it", "MB",
    "losses", "passes",
)  # fmt: skip


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(HEADER)} |"
    yield f"|{'---|' * len(HEADER)}"
    for row in rows:
        yield f"| {' | '.join(cells(row, rows)[: len(HEADER)])} |"


def growth(tables: dict[int, list[Row]]) -> Iterator[str]:
    """Time by number of layers: one line per library and method."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for layers, rows in tables.items():
        for row in rows:
            cell = f"{1e3 * row.median:.1f}" if row.median is not None else row.failed
            lines.setdefault((row.library, row.label), {})[layers] = cell
    yield f"| library | method | {' | '.join(f'{2**layers} paths' for layers in tables)} |"
    yield f"|---|---|{'---|' * len(tables)}"
    for (library, label), found in lines.items():
        yield f"| {library} | {label} | {' | '.join(found.get(layers, '') for layers in tables)} |"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Quick = Annotated[
    bool,
    typer.Option("--quick", help="Small problems, few methods, 2 repetitions: about a minute."),
]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    problem: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join((*PROBLEMS, SOLUTIONS))}; all by default."),
    ] = None,
    quick: Quick = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Repetitions of each timing; 5, or 2 with --quick.")
    ] = None,
    limit: Annotated[
        float, typer.Option(help="Seconds after which a measurement is given up.")
    ] = 60.0,
    output: Annotated[
        Path | None, typer.Option(help="Also writes the tables into this file.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--csv", help="Also writes the measurements into this CSV by problem."),
    ] = None,
) -> None:
    """Prints a Markdown table for each problem."""
    if context.invoked_subcommand is not None:
        return
    every = (*PROBLEMS, SOLUTIONS)
    for name in problem or ():
        if name not in every:
            raise typer.BadParameter(f"there is no problem {name!r}: {', '.join(every)}")
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)
        if output is not None:
            output.write_text("\n".join(lines) + "\n")

    def save(rows: Iterable[dict[str, str]]) -> None:
        if file is not None:
            rows = [dict.fromkeys(COLUMNS, "") | row for row in rows]
            write_measurements(file, rows, part=("problem",), packages=PACKAGES)

    torch.set_num_threads(1)
    say(f"{', '.join(map(installed, PACKAGES))}.")
    layers = LAYERS[:2] if quick else LAYERS
    with tempfile.TemporaryDirectory() as folder:
        for name in problem or every:
            if name == SOLUTIONS:
                say("\n## solutions of other solvers\n")
                found = solution_rows(__file__, quick=quick, repeats=repeats or (2 if quick else 5))
                say("\n".join(solution_table(found)))
                save(found)
                say(SOLUTION_LEGEND)
                continue
            by_layers: dict[int, list[Row]] = {}
            for full in [f"layered-{n}" for n in layers] if name == "layered" else [name]:
                path = Path(folder) / full
                try:
                    task = build(full, quick=quick)
                except InputError as error:
                    say(f"\n## {full}\n\nSkipped: {error}")
                    continue
                known = reference(task)
                # The worker processes build the same task, and read its exact gradients from here.
                state = {"problem": full, "quick": quick, "reference": asdict(known)}
                torch.save(state, path)
                rows = rows_of(full, known.sizes, quick=quick)
                measure(path, rows, repeats=repeats or (2 if quick else 5), limit=limit)
                counts: list[Any] = list(known.sizes.items())
                if name == "layered":  # all levels of a layer have the same size
                    by_layers[int(full.removeprefix("layered-"))] = rows
                    counts = sorted(set(known.sizes.values()))
                say(f"\n## {full}\n\nParameters: {counts}; α = {known.step_size:.3g}.\n")
                say("\n".join(table(rows)))
                save(measurements(full, rows))
            if by_layers:
                say("\n## layered: ms per step\n")
                say("\n".join(growth(by_layers)))
    if problem != [SOLUTIONS]:
        say(LEGEND)


@app.command(hidden=True)
def worker(library: str, method: str, steps: int, rounds: int, path: Path) -> None:
    """Measures one row."""
    torch.set_num_threads(1)
    serve(library, method, steps, rounds, path)


@app.command(hidden=True)
def solution(
    problem: str,
    library: str,
    method: str,
    quick: Annotated[bool, typer.Option()] = False,
) -> None:
    """Measures one row of the solutions of other solvers."""
    torch.set_num_threads(1)
    serve_row(problem, library, method, quick=quick)


if __name__ == "__main__":
    app()
