"""Shared by the benchmarks: turns of processor time, ratios, and files of measurements.

A file is a CSV in docs/data/benchmarks, from which docs/benchmarks.md is made (`make results`).
Each row says how it was made, so that parts of a file may be measured on different days.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

SOURCES = ("mlo", "lfmcw_app", "benchmarks")
"""Folders on which a measurement depends."""

SETTLED = 4
"""Steps before one whose work is counted.

What is made at first, and the checks of losses at the updates 1, 2, 4, 8, …, are over or far away.
"""

PROVENANCE = ("command", "machine", "load", "date", "commit", "versions")
"""The last columns of every file. `load`: jobs that wanted a core, over the last five minutes."""


# ------------------------------ ratios


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The ratio of two sides' times: median and quartiles over the turns."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], against: Sequence[float]) -> Ratio:
        """From the times of each turn; a disturbance of a turn affects both sides."""
        ratios = [a / b for a, b in zip(times, against, strict=True)]
        low, median, high = quartiles(ratios)
        return cls(median=median, low=low, high=high)

    def cells(self) -> dict[str, str]:
        """The columns of a file."""
        return {
            "ratio": f"{self.median:.4g}",
            "ratio_low": f"{self.low:.4g}",
            "ratio_high": f"{self.high:.4g}",
        }

    def __str__(self) -> str:
        median, low, high = map(two_digits, (self.median, self.low, self.high))
        return median if self.low == self.high else f"{median} ({low}–{high})"


def two_digits(ratio: float) -> str:
    """A ratio with two decimals, or with two digits if it is small."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def turns(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    *,
    uncounted: int = 3,
) -> dict[str, list[float]]:
    """Seconds of single calls of each side, in turns.

    Every side comes first, second and so on equally often.

    Args:
        sides: name → what is measured.
        repeats: turns.
        clock: returns seconds.
        uncounted: turns before them.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    orders: Iterator[Sequence[str]] = itertools.cycle(itertools.permutations(sides))
    for repeat in range(-uncounted, repeats):
        for name in next(orders):
            began = clock()
            sides[name]()
            ended = clock()
            if repeat >= 0:
                times[name].append(ended - began)
    return times


# ------------------------------ processes that measure


class Worker:
    """A process that answers one request at a time: a line in, a line of JSON out."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment},
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


def answers(
    requests: Mapping[str, Callable[[], dict[str, Any]]],
    refusals: tuple[type[Exception], ...] = (),
) -> None:
    """Answers the requests on the standard input, until it ends; a failure is an answer too.

    Args:
        requests: line → what makes its answer.
        refusals: exceptions whose words say enough.
    """
    # Measured code may print anything; only answers may reach the reader.
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = requests[line.strip()]()
        except refusals as refusal:
            answer = {"failed": str(refusal)}
        except Exception as error:  # noqa: BLE001 - whatever it raises is a result
            first = str(error).strip().splitlines()
            answer = {"failed": type(error).__name__ + (f": {first[0][:80]}" if first else "")}
        print(json.dumps(answer), file=out, flush=True)


def asked_in_turns(
    workers: Mapping[str, Worker], repeats: int, limit: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The `seconds` that each worker answers to "time", in turns, and what failed and why.

    Every second turn goes through them in the opposite order. A worker that fails is not asked
    again, and has no times.
    """
    times: dict[str, list[float]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        for name in sorted(workers, key=list(workers).index, reverse=repeat % 2 == 1):
            if name in failed:
                continue
            answer = workers[name].ask("time", limit)
            if "failed" in answer:
                failed[name] = answer["failed"]
                times.pop(name)
            else:
                times[name].append(answer["seconds"])
    return times, failed


# ------------------------------ files


def write_measurements(
    path: Path,
    rows: Iterable[Mapping[str, object]],
    *,
    part: Sequence[str],
    packages: Sequence[str] = ("torch",),
) -> None:
    """Writes measurements into a file; those of other parts stay.

    Args:
        path: of the CSV.
        rows: columns → what was measured. All rows have the same columns.
        part: columns whose values name a part, which is measured at once.
        packages: whose versions matter.

    Raises:
        ValueError: if the file has other columns.
    """
    made = provenance(packages)
    new = [{key: str(value) for key, value in row.items()} | made for row in rows]
    kept = []
    if path.exists():
        measured = {tuple(row[key] for key in part) for row in new}
        with path.open(newline="", encoding="utf-8") as file:
            kept = [
                row
                for row in csv.DictReader(file)
                if tuple(row[key] for key in part) not in measured
            ]
    if kept and list(kept[0]) != list(new[0]):
        raise ValueError(
            f"{path} has the columns {', '.join(kept[0])}, but this measurement has "
            f"{', '.join(new[0])}. Remove the file and measure all of its parts again."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new])


def provenance(packages: Sequence[str]) -> dict[str, str]:
    """How a measurement of this process is made: the columns `PROVENANCE`."""
    script = Path(sys.argv[0]).resolve()
    place = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "command": " ".join(["python", str(place), *_without_file(sys.argv[1:])]),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "load": f"{os.getloadavg()[1]:.1f}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, {', '.join(map(installed, packages))}",
    }


def _without_file(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--csv FILE`, which changes nothing that is measured."""
    kept = list(arguments)
    if "--csv" in kept:
        place = kept.index("--csv")
        del kept[place : place + 2]
    return kept


def _processor() -> str:
    """The name of the processor, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The last commit of files that matter, with a plus if they differ from it."""
    described = _git("log", "-1", "--format=%h", "--abbrev=7", "--", *SOURCES)
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return f"{described}+" if changed else described


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def installed(package: str) -> str:
    """A package with its version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"
