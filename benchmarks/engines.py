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

import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from engines_libraries import KEPT, LIBRARIES
from engines_oracle import reference
from engines_problems import PROBLEMS, build
from engines_solutions import SOLUTION_LEGEND, measure_row, solution_tables
from engines_worker import serve

import mlo
from lfmcw_app.errors import InputError

K = 10
"""Products with the Hessian of the iterative methods."""

MANY = 50

ROWS: dict[str, tuple[tuple[str, int], ...]] = {
    "mlo": (
        ("first_order", 0), ("one_step", 0), (KEPT, 0), ("darts", 0), ("neumann", K), ("cg", K),
        ("cg", MANY), ("minres", K), ("gmres", K), ("nystrom", K), ("direct", 0), ("soba", 0),
        ("penalty", 0),
    ),
    "Betty": (("darts", 0), ("neumann", K), ("cg", K), ("cg", MANY)),
    "TorchOpt": (("one_step", 0), ("neumann", K), ("cg", K), ("cg", MANY), ("direct", 0)),
    "BOAT": (("one_step", 0), ("darts", 0), ("neumann", K), ("cg", K), ("cg", MANY)),
    "hypergrad": (("neumann", K), ("cg", K), ("nystrom", K)),
    "higher": (("one_step", 0),),
}  # fmt: skip
"""Library → (method by mlo's name, products). What it does not offer is a row that says so."""

QUICK_METHODS = (KEPT, "darts", "cg")
BILEVEL = ("BOAT", "hypergrad")
"""Libraries that know two levels only."""

LAYERED_METHODS = (
    ("one_step", 0), (KEPT, 0), ("darts", 0), ("neumann", K), ("cg", K), ("direct", 0),
    ("soba", 0), ("penalty", 0),
)  # fmt: skip
STEP_METHODS = ("one_step", KEPT, "darts")
"""Methods that approximate the derivative of one step, not of the solution."""

ROUNDS = {"soba": 100, "penalty": 20}
"""Steps at a fixed upper point before the error is taken, for methods that converge over steps."""

DIRECT_AT_MOST = 1000
"""Dense methods are left out where a lower problem has more parameters."""

READY_LIMIT = 120.0
"""Seconds for a process to import everything."""

FINISH_LIMIT = 300.0
"""Seconds for the steps before the comparison."""

SOLUTIONS = "solutions"
"""The problems of `engines_solutions.py`, with a table of their own."""

LAYERS = (2, 4, 6, 8, 10)
PACKAGES = {"mlo": "mlo", "Betty": "betty-ml", "TorchOpt": "torchopt", "BOAT": "boat-torch"} | {
    name: name for name in ("hypergrad", "higher", "jaxopt", "jax", "torch")
}

ROUNDED = ", ".join(f"`{method}` {count}" for method, count in ROUNDS.items())
LEGEND = f"""
One CPU thread. Every library gets the same losses, data, values and SGD, and one step is: one SGD
step of every lower problem, then the hypergradient and an SGD step of the outermost one. K = {K} or
{MANY} products with each Hessian as the row says; Neumann series have the same α in all libraries
(1 / λmax).

- *error*: ‖found − exact‖ / ‖exact‖ of the outermost gradient in float64, against the implicit
  function theorem at solutions with gradients below 1e-10; *error (1 step)*: against the derivative
  of one SGD step of each lower problem there, which is what `one_step` and `darts` approximate.
  *cosine* and *scale* (ratio of norms) are of the second for these methods, of the first for the
  others. The outermost problem rests. Steps before the error is taken: {ROUNDED}, else 1.
- *ms*: median time of a step in float32 over the repetitions, a process for each row, rows
  interleaved; *range*: least and largest; *÷ mlo*: ratio of the median to that of mlo's same
  method.
- *MB*: peak resident memory of two steps over the resident memory after imports, set-up and a first
  evaluation of the losses.
- *losses*: evaluations of any problem's loss in one step; *passes*: calls of `torch.autograd.grad`
  and `.backward`.
"""


@dataclass(kw_only=True)
class Row:
    """One line of a table: what is measured, and what was found.

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
    def median(self) -> float | None:
        """Median time of a step."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def label(self) -> str:
        """The method and its products."""
        return f"{self.method}, K={self.steps}" if self.steps else self.method


class Process:
    """A worker process, which answers one request at a time."""

    def __init__(self, arguments: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def ask(self, request: str, limit: float) -> dict[str, Any]:
        """Returns the answer, or `{"failed": why}`.

        It fails after `limit` seconds, or when the process has died.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{request}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:
            return {"failed": f"the process ended with code {process.wait()}"}
        if not select.select([process.stdout], [], [], limit)[0]:
            return {"failed": f"over {limit:g} s ({request})"}
        line = process.stdout.readline()
        if not line:
            return {"failed": f"the process ended with code {process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def rows_of(problem: str, sizes: dict[str, int], *, quick: bool) -> list[Row]:
    """The rows of a problem's table; a library that is not installed has one."""
    rows = []
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
            if library == "mlo" and method not in (*mlo.available_engines(), KEPT):
                continue
            if method == "direct" and max(list(sizes.values())[:-1]) > DIRECT_AT_MOST:
                continue
            rows.append(Row(library=library, method=method, steps=steps))
    return rows


def measure(path: Path, rows: list[Row], *, repeats: int, limit: float) -> None:
    """Fills the rows: all are set up, then timed in turns, then compared."""
    processes: dict[int, Process] = {}

    def ask(index: int, request: str, seconds: float) -> dict[str, Any]:
        answer = processes[index].ask(request, seconds)
        if "failed" in answer:
            rows[index].failed = answer["failed"]
            processes.pop(index).close()
        return answer

    def set_up(index: int) -> None:
        row = rows[index]
        arguments = (row.library, row.method, row.steps, ROUNDS.get(row.method, 1), path)
        processes[index] = Process([str(argument) for argument in arguments])
        if "failed" not in ask(index, "ready", READY_LIMIT):
            row.answers |= ask(index, "start", limit)

    try:
        # Nothing is timed here, so as many are set up at once as there are cores.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(set_up, [index for index, row in enumerate(rows) if not row.failed]))
        waiting = sorted(processes)
        for _ in range(repeats):
            for index in waiting:
                if index in processes:
                    answer = ask(index, "time", limit)
                    rows[index].seconds += [answer["seconds"]] if "seconds" in answer else []
        for index in waiting:
            if index in processes:
                rows[index].answers |= ask(index, "finish", FINISH_LIMIT)
    finally:
        for process in processes.values():
            process.close()


def cells(row: Row, baseline: Row | None) -> list[str]:
    """The cells of one line."""
    found = row.answers
    if row.failed or row.median is None:
        return [row.library, row.label, row.failed, *[""] * 10]
    near = found["one_step" if row.method in STEP_METHODS else "implicit"]
    ratio = f"{row.median / baseline.median:.2f}" if baseline and baseline.median else ""
    return [
        row.library,
        row.label,
        f"{found['implicit']['error']:.1e}",
        f"{found['one_step']['error']:.1e}",
        f"{near['cosine']:.4f}",
        f"{near['scale']:.3g}",
        f"{1e3 * row.median:.2f}",
        f"{1e3 * min(row.seconds):.2f}-{1e3 * max(row.seconds):.2f}",
        ratio,
        f"{found['memory']:.1f}",
        str(found["evaluations"]),
        str(found["passes"]),
    ]


HEADER = (
    "library", "method", "error", "error (1 step)", "cosine", "scale", "ms", "range", "÷ mlo", "MB",
    "losses", "passes",
)  # fmt: skip


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of a Markdown table."""
    baselines = {(row.method, row.steps): row for row in rows if row.library == "mlo"}
    yield f"| {' | '.join(HEADER)} |"
    yield f"|{'---|' * len(HEADER)}"
    for row in rows:
        yield f"| {' | '.join(cells(row, baselines.get((row.method, row.steps)))[: len(HEADER)])} |"


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


def versions() -> str:
    """The machine and the packages, in one line."""
    found = []
    for package in PACKAGES.values():
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return f"Python {platform.python_version()} on {platform.machine()}; {', '.join(found)}."


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

    torch.set_num_threads(1)
    say(versions())
    layers = LAYERS[:2] if quick else LAYERS
    with tempfile.TemporaryDirectory() as folder:
        for name in problem or every:
            if name == SOLUTIONS:
                say("\n## solutions of other solvers\n")
                for line in solution_tables(
                    __file__, quick=quick, repeats=repeats or (2 if quick else 5)
                ):
                    say(line)
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
                torch.save((task, known), path)

                # The worker processes read the task and its exact gradients from the file.
                rows = rows_of(full, known.sizes, quick=quick)
                measure(path, rows, repeats=repeats or (2 if quick else 5), limit=limit)
                counts: list[Any] = list(known.sizes.items())
                if name == "layered":  # all levels of a layer have the same size
                    by_layers[int(full.removeprefix("layered-"))] = rows
                    counts = sorted(set(known.sizes.values()))
                say(f"\n## {full}\n\nParameters: {counts}; α = {known.step_size:.3g}.\n")
                say("\n".join(table(rows)))
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
    repeats: int,
    quick: Annotated[bool, typer.Option()] = False,
) -> None:
    """Measures one row of the solutions of other solvers."""
    torch.set_num_threads(1)
    measure_row(problem, library, method, quick=quick, repeats=repeats)


if __name__ == "__main__":
    app()
