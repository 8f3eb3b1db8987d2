"""Compares an older revision with this checkout: the same work in both, in turns.

    python benchmarks/before_after.py 30a9f47                    # rounds and search steps
    python benchmarks/before_after.py 30a9f47 --only chain launches
    python benchmarks/before_after.py 30a9f47 --only tests       # `make test` of both; an hour

The revision is unpacked into a temporary folder. Both sides run the programs of this folder, each
with its own `mlo` and `lfmcw_app`. Each side and work has its own process, and the processes take
turns.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import (
    ROOT,
    SETTLED,
    Ratio,
    Worker,
    answers,
    asked_in_turns,
    write_measurements,
)

SIDES = ("before", "after")
LIMIT = 900.0
"""Seconds in which a process must answer."""

NETWORKS = ("small", "perceptron")
ENGINES = ("first_order", "one_step", "one_step, recomputed", "darts")
STEPS = ("DARTS, first order", "DARTS, second order (darts)", "LFM-CW, first order")
CHAINS = (2, 5, 9)

CELLS = {
    "channels": 4, "layers": 8, "nodes": 4, "image_size": 8, "image_channels": 3, "batch_size": 2,
}  # fmt: skip
"""A search with the paper's cells; fewer channels and images take as many launches."""

WORKS: dict[str, tuple[str, ...]] = {
    "rounds": tuple(f"{network}: {engine}" for network in NETWORKS for engine in ENGINES),
    "steps": STEPS,
    "launches": STEPS,
    "chain": tuple(f"{length} problems, both ways" for length in CHAINS),
    "tests": ("make test",),
}
"""Part → what is measured in it."""

UNITS = {
    "rounds": "ms", "steps": "ms", "launches": "launches", "chain": "operators", "tests": "s",
}  # fmt: skip
BY_DEFAULT = ("rounds", "steps", "launches", "chain")
COUNTED = ("launches", "chain")

LEAST = 0.05
"""Seconds of a turn; shorter work is repeated."""


# ------------------------------ the work, in a process of one side


def action(part: str, what: str) -> Callable[[], object]:
    """What is timed or counted; imports are those of the side whose process this is."""
    import torch

    torch.set_num_threads(1)
    if part == "rounds":
        import overhead

        name, _, engine = what.partition(": ")
        make, width, _, inputs = overhead.NETWORKS[name]
        setting = overhead.SETTINGS["mixed activations"]
        begin = overhead.start(
            setting, lambda: make(width), (128, inputs), torch.device("cpu"), torch.float32
        )
        return overhead.WithMlo(setting, engine, begin, "stop").step
    if part == "chain":
        import chain

        return chain.chain(int(what.split()[0]), both_ways=True, engine="one_step").step
    import search_step

    size = CELLS if part == "launches" else search_step.SIZES["small"]
    optimizer = search_step.search(size, search_step.STEPS[what])
    if part == "launches":
        from launches import launches_of_step

        return lambda: launches_of_step(optimizer).total()
    return optimizer.step


def serve(part: str, what: str) -> None:
    """Answers `start`, and `time` by seconds or by a number of operators."""
    made: list[Callable[[], object]] = []
    block = 1

    def start() -> dict[str, Any]:
        nonlocal block
        made.append(action(part, what))
        for _ in range(SETTLED):
            began = time.process_time()
            made[0]()
        block = max(1, round(LEAST / (time.process_time() - began)))
        return {}

    def timed() -> dict[str, Any]:
        began = time.process_time()
        for _ in range(block):
            made[0]()
        return {"seconds": (time.process_time() - began) / block}

    def launched() -> dict[str, Any]:
        return {"seconds": made[0]()}

    def counted() -> dict[str, Any]:
        from chain import Operators

        with Operators() as found:
            made[0]()
        return {"seconds": found.count}

    measure = {"launches": launched, "chain": counted}.get(part, timed)
    answers({"start": start, "time": measure})


# ------------------------------ both sides


def unpacked(revision: str, folder: Path) -> str:
    """Writes the files of a revision into a folder; returns its short name.

    Raises:
        SystemExit: if there is no such revision.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--short=7", f"{revision}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        sys.exit(f"error: {revision} is not a revision of this repository. Name a commit or a tag.")
    archive = subprocess.run(
        ["git", "archive", found.stdout.strip()], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return found.stdout.strip()


def measured(
    part: str, what: str, roots: dict[str, Path], repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The times or counts of both sides, in turns, or why one has none."""
    workers = {
        side: Worker([__file__, "--serve", part, what], PYTHONPATH=str(root))
        for side, root in roots.items()
    }
    try:
        for side, worker in workers.items():
            if "failed" in (answer := worker.ask("start", LIMIT)):
                return {}, {side: answer["failed"]}
        return asked_in_turns(workers, 1 if part in COUNTED else repeats, LIMIT)
    finally:
        for worker in workers.values():
            worker.close()


def test_times(roots: dict[str, Path]) -> dict[str, list[float]]:
    """Seconds of processor time of each side's `make test`, with the options of its Makefile."""
    found = {}
    for side, root in roots.items():
        commands = subprocess.run(
            ["make", "--dry-run", "test"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        options = re.findall(r"-m pytest(.*)$", commands, re.MULTILINE)[-1]
        began = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *shlex.split(options)],
            cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False,
        )  # fmt: skip
        ended = os.times()
        if done.returncode not in (0, 1):  # 1: all were run, and some failed
            raise SystemExit(f"pytest ended with exit code {done.returncode} in {root}")
        user = ended.children_user - began.children_user
        found[side] = [user + ended.children_system - began.children_system]
    return found


def rows(part: str, roots: dict[str, Path], repeats: int, before: str) -> Iterator[dict[str, str]]:
    """Measures a part, work by work."""
    scale = 1e3 if UNITS[part] == "ms" else 1.0
    for what in WORKS[part]:
        times, failed = (
            (test_times(roots), {}) if part == "tests" else measured(part, what, roots, repeats)
        )
        cells = {"part": part, "what": what, "unit": UNITS[part], "revision": before}
        if failed:
            why = "; ".join(f"{side}: {reason}" for side, reason in failed.items())
            empty = dict.fromkeys((*SIDES, "ratio", "ratio_low", "ratio_high"), "")
            yield {**cells, **empty, "failed": why}
            continue
        medians = {side: f"{scale * statistics.median(times[side]):.5g}" for side in SIDES}
        ratio = Ratio.of(times["after"], times["before"])
        yield {**cells, **medians, **ratio.cells(), "failed": ""}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", nargs="?", help="the revision before")
    parser.add_argument("--only", nargs="+", choices=tuple(WORKS), default=BY_DEFAULT, help="parts")
    parser.add_argument("--repeats", type=int, default=15, help="turns of what is timed")
    parser.add_argument("--csv", type=Path, help="also writes the measurements into this file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    if args.revision is None:
        parser.error("name the revision before, for example the one that you started from")
    print("| part | what | unit | before | after | after ÷ before (quartiles) |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        before = unpacked(args.revision, Path(folder))
        roots = {"before": Path(folder), "after": ROOT}
        for part in args.only:
            found = []
            for row in rows(part, roots, args.repeats, before):
                found.append(row)
                ratio = row["failed"] or f"{row['ratio']} ({row['ratio_low']}–{row['ratio_high']})"
                cells = (part, row["what"], row["unit"], row["before"], row["after"], ratio)
                print(f"| {' | '.join(cells)} |", flush=True)
            if args.csv:
                write_measurements(args.csv, found, part=("part", "what"))


if __name__ == "__main__":
    main()
