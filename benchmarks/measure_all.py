"""Makes all CPU measurements of docs/benchmarks.md, part by part: about 25 minutes on a quiet core.

    make benchmark                                          # in an environment with the peers
    python benchmarks/measure_all.py [--only WORD ...] [--again] [--before REVISION]

Each part is a command that writes its rows into docs/data/benchmarks. A part that already has rows
of this commit is not run again, so an interrupted measurement resumes.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time

from measuring import ROOT, commit

DATA = ROOT / "docs" / "data" / "benchmarks"

PARTS: tuple[tuple[str, str], ...] = (
    ("overhead", "overhead.py --network small --repeats 400"),
    ("overhead", "overhead.py --network perceptron --repeats 60"),
    ("overhead", "overhead.py --network convolutional --batch-size 32 --repeats 4 --only mixed"),
    ("chain", "chain.py"),
    ("import_times", "import_times.py --repeats 9"),
    ("engines", "engines.py --problem logistic --repeats 7"),
    ("engines", "engines.py --problem reweighting --repeats 7"),
    ("engines", "engines.py --problem diamond --repeats 4"),
    ("engines", "engines.py --problem layered --repeats 3"),
    ("engines", "engines.py --problem solutions --repeats 5"),
    ("search_step", "search_step.py --size small --repeats 7 --only order"),
    ("search_step", "search_step.py --size paper --repeats 3 --only first"),
)
"""Name of the file, and the command that writes into it."""

COMPARED = (
    ("rounds", 15),
    ("steps", 5),
    ("launches", 1),
    ("chain", 1),
)
"""Part of before_after.py, and its turns."""


def is_measured(name: str, command: str, now: str) -> bool:
    """Whether a file has rows of a command, of this commit."""
    path = DATA / f"{name}.csv"
    if not path.exists():
        return False
    with path.open(newline="", encoding="utf-8") as file:
        made = {(row["command"], row["commit"]) for row in csv.DictReader(file)}
    return (f"python benchmarks/{command}", now) in made


def main() -> None:
    """Runs the parts; exits with 1 if one failed or wrote nothing, after the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="only parts whose command contains one of these")
    parser.add_argument(
        "--again", action="store_true", help="also parts that were already measured"
    )
    parser.add_argument(
        "--before", help="a revision to compare with; without it nothing is compared"
    )
    args = parser.parse_args()
    parts = list(PARTS)
    if args.before:
        for part, repeats in COMPARED:
            command = f"before_after.py {args.before} --only {part} --repeats {repeats}"
            parts.append(("before_after", command))
    now, failed = commit(), []
    for name, command in parts:
        if args.only and not any(word in command for word in args.only):
            continue
        if not args.again and not now.endswith("+") and is_measured(name, command, now):
            print(f"{command}: measured already", flush=True)
            continue
        print(f"{time.strftime('%H:%M:%S')} {command}", flush=True)
        script, *options = command.split()
        file = str(DATA / f"{name}.csv")
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / script), *options, "--csv", file],
            cwd=ROOT, check=False,
        )  # fmt: skip
        if done.returncode or not is_measured(name, command, now):
            failed.append(command)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(parts)} parts failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
