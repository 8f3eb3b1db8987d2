"""Measures how long `import mlo` and `python -m lfmcw_app.run --help` take, beside `import torch`.

    python benchmarks/import_times.py [--repeats 15] [--csv FILE]

It measures the processor time of whole processes, in turns. Bytecode goes to a separate folder and
exists when the turns begin, as for an installed package.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from measuring import ROOT, Ratio, turns, write_measurements

COMMANDS = {
    "import torch": ("-c", "import torch"),
    "import mlo": ("-c", "import mlo"),
    "python -m lfmcw_app.run --help": ("-m", "lfmcw_app.run", "--help"),
}
"""What is measured → the arguments; the others are compared with the first."""


def children() -> float:
    """Seconds of processor time of the processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=15, help="turns, after one that is not counted"
    )
    parser.add_argument("--csv", type=Path, help="also writes the measurements into this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        run = partial(
            subprocess.run, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        sides = {name: partial(run, [sys.executable, *rest]) for name, rest in COMMANDS.items()}
        times = turns(sides, args.repeats, children, uncounted=1)
    base = next(iter(times.values()))
    print("| what | s | ÷ import torch (quartiles) |\n|---|---|---|")
    measured = []
    for name, found in times.items():
        ratio, seconds = Ratio.of(found, base), statistics.median(found)
        print(f"| {name} | {seconds:.2f} | {ratio} |")
        measured.append({"what": name, "seconds": f"{seconds:.3g}", **ratio.cells()})
    if args.csv:
        write_measurements(args.csv, measured, part=("what",))


if __name__ == "__main__":
    main()
