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
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

DONE = re.compile(r"Done (\d+) runs|number_of_executed_units: (\d+)|#(\d+)\s")


def fuzz(name: str, corpus: Path, seconds: int) -> None:
    """Fuzzes one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(
        include=[
            "lfmcw_app",
            "mlo.state_checks",
            "mlo.randomness",
            "mlo.checkpoint",
            "yaml",
            "json",
        ]
    ):
        from read_targets import ERRORS, TARGETS, Folder, seeds
    warnings.simplefilter("ignore")
    folder = Folder(corpus)
    for index, seed in enumerate(seeds(folder).get(name, [b"{}"])):
        (corpus / "inputs" / f"seed-{index}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        with contextlib.suppress(*ERRORS), contextlib.redirect_stdout(io.StringIO()):
            TARGETS[name](folder, data)

    options = [
        f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=20000",
        f"-artifact_prefix={corpus}/", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], str(corpus / "inputs"), *options], one_input)
    atheris.Fuzz()


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
