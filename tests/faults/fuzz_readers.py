"""Coverage-guided fuzzing of every reader of files with atheris (`pip install atheris`; not in CI).

    python tests/faults/fuzz_readers.py [--seconds 60] [TARGET ...]

Each target of tests/read_targets.py is fuzzed in a process of its own, from files that are right.
The table has its executions and findings; a finding is an exception that is no error for a user,
an input that takes 10 s, or 2 GB of memory, and its traceback is printed. The short version with
Hypothesis is tests/property/test_readers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MODULES = [
    "lfmcw_app.bounded_files", "lfmcw_app.plain_yaml", "lfmcw_app.report.reading",
    "lfmcw_app.result_file", "lfmcw_app.results_file", "lfmcw_app.result_rows",
    "lfmcw_app.resuming", "lfmcw_app.search_space.genotype", "lfmcw_app.search_space.nasbench201",
    "lfmcw_app.search_space.darts_notation", "lfmcw_app.cell_table_file", "lfmcw_app.groups",
    "lfmcw_app.network_file", "lfmcw_app.fingerprint", "lfmcw_app.runs",
    "lfmcw_app.recipe_loading",
    "mlo.state_checks", "mlo.randomness", "mlo.checkpoint",
]  # fmt: skip
"""Modules whose branches lead atheris."""

DONE = re.compile(r"Done (\d+) runs|number_of_executed_units: (\d+)|#(\d+)\s")


def fuzz(name: str, corpus: Path, seconds: int) -> None:
    """Fuzzes one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=MODULES):
        from read_targets import ERRORS, TARGETS, Folder, edited, places, seeds
    warnings.simplefilter("ignore")
    folder = Folder(corpus)
    for index, seed in enumerate(seeds(folder).get(name, [b"{}"])):
        (corpus / "inputs" / f"seed-{index}").write_bytes(seed)

    trees = [tree for seed in seeds(folder).get(name, []) if (tree := first_object(seed))]

    def one_input(data: bytes) -> None:
        # Every other input is a right object with an entry or two replaced, not any bytes.
        given = atheris.FuzzedDataProvider(data)
        if trees and given.ConsumeBool():
            tree = given.PickValueInList(trees)
            for _ in range(given.ConsumeIntInRange(1, 2)):
                path = given.PickValueInList(list(places(tree)))
                tree = edited(tree, path, any_value(given, 0))
            data = json.dumps(tree).encode() + b"\n"
        with contextlib.suppress(*ERRORS), contextlib.redirect_stdout(io.StringIO()):
            TARGETS[name](folder, data)

    options = [
        f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=20000",
        f"-artifact_prefix={corpus}/", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], str(corpus / "inputs"), *options], one_input)
    atheris.Fuzz()


def first_object(seed: bytes) -> Any:
    """The JSON object of a file or of its first line; None where there is none."""
    for text in (seed, seed.partition(b"\n")[0]):
        with contextlib.suppress(ValueError):
            tree = json.loads(text)
            return tree if isinstance(tree, dict) else None
    return None


def any_value(given: Any, depth: int) -> Any:
    """Plain data, of what atheris provides."""
    kind = given.ConsumeIntInRange(0, 9 if depth < 4 else 7)
    if kind == 8:
        return [any_value(given, depth + 1) for _ in range(given.ConsumeIntInRange(0, 3))]
    if kind == 9:
        count = given.ConsumeIntInRange(0, 3)
        return {given.ConsumeUnicode(6): any_value(given, depth + 1) for _ in range(count)}
    simple: tuple[Callable[[], Any], ...] = (
        lambda: None,
        given.ConsumeBool,
        lambda: given.ConsumeIntInRange(-3, 100),
        lambda: given.ConsumeInt(16),
        given.ConsumeFloat,
        lambda: given.ConsumeUnicode(12),
        lambda: 10 ** given.ConsumeIntInRange(0, 500),
        lambda: "x" * given.ConsumeIntInRange(0, 10**5),
    )
    return simple[kind]()


def main() -> int:
    """Fuzzes the named targets one after the other; returns the number of findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=60, help="per target")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed (pip install atheris): nothing is fuzzed.")
        return 0
    if given.in_process:
        fuzz(given.targets[0], Path(given.in_process), given.seconds)
        return 0
    from read_targets import TARGETS

    if unknown := set(given.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    found = 0
    print("| reader | executions | findings |\n|---|---|---|")
    for name in given.targets or TARGETS:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "inputs").mkdir()
            made = subprocess.run(
                [sys.executable, __file__, name, "--in-process", place,
                 "--seconds", str(given.seconds)],
                capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
        said = made.stdout + made.stderr
        counts = [int(next(filter(None, groups))) for groups in DONE.findall(said)]
        print(f"| {name} | {max(counts, default=0):,} | {int(made.returncode != 0)} |", flush=True)
        if made.returncode:
            found += 1
            print(said[-3000:], file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(min(main(), 1))
