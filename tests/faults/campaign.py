"""Strikes runs with faults of many kinds, resumes them, and compares each end with an undisturbed
run.

    python tests/faults/campaign.py                       # everything: about an hour of one core
    python tests/faults/campaign.py --kinds disk --most 5 # a part, and at most five of each kind

Every run is a child that is forked from this process, after the imports, and that calls the command
line's own function. A fault is *lost* if the run does not resume to the bytes of the undisturbed
one, and *unclear* if a child ends in a traceback, or in an exit code that says something else than
what happened. A table of both is printed; the exit code is 1 if there was one. `fault_kinds.py`
has the kinds.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402 - after the path
from fault_kinds import KINDS, Trial  # noqa: E402
from forked_runs import SMALL, WITH_GENERATOR, Runs  # noqa: E402
from run_of_campaign import be_quick  # noqa: E402

from lfmcw_app.data import load_dataset  # noqa: E402
from lfmcw_app.report import page  # noqa: E402, F401 - not in each child

RECIPES = {"darts": SMALL, "lfmcw": WITH_GENERATOR}


@dataclass
class Count:
    """What became of the faults of one kind."""

    tried: int = 0
    lost: int = 0
    unclear: int = 0
    told: list[str] = field(default_factory=list)

    def add(self, trial: Trial) -> None:
        """Takes up one."""
        self.tried += 1
        self.lost += bool(trial.lost)
        self.unclear += bool(trial.unclear)
        if trial.lost or trial.unclear:
            self.told.append(f"{trial.what}: {trial.lost or trial.unclear}")


def campaign(
    folder: Path, kinds: list[str], recipes: list[str], most: int, seed: int
) -> dict[str, Count]:
    """Tries all kinds of faults; returns kind → what became of them.

    Args:
        folder: of the runs; those that end well are removed.
        kinds: names in `KINDS`.
        recipes: names in `RECIPES`.
        most: faults per kind and recipe, at most.
        seed: of what is drawn.
    """
    counts: dict[str, Count] = {}
    for recipe in recipes:
        runs = Runs(folder=folder / recipe, settings=RECIPES[recipe])
        runs.folder.mkdir(parents=True)
        began = time.monotonic()
        changes = runs.changes()
        seconds = time.monotonic() - began
        print(f"{recipe}: {changes} changes of files, {seconds:.1f} s", flush=True)
        for kind in kinds:
            count = counts.setdefault(kind, Count())
            rng = random.Random(f"{seed} {recipe} {kind}")
            for trial in KINDS[kind](runs, changes, seconds, most, rng):
                count.add(trial)
                if trial.lost or trial.unclear:
                    print(f"{recipe}, {kind}, {count.told[-1]}; see {trial.path}", flush=True)
                elif trial.path is not None:
                    shutil.rmtree(trial.path, ignore_errors=True)
            print(f"{recipe}, {kind}: {count.tried} so far", flush=True)
    return counts


def table(counts: dict[str, Count]) -> str:
    """The counts as a table in Markdown."""
    rows = ["| fault | tried | lost | unclear |", "|---|---|---|---|"]
    rows += [f"| {kind} | {c.tried} | {c.lost} | {c.unclear} |" for kind, c in counts.items()]
    sums = [sum(getattr(c, name) for c in counts.values()) for name in ("tried", "lost", "unclear")]
    return "\n".join([*rows, f"| **all** | {sums[0]} | {sums[1]} | {sums[2]} |"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--most", type=int, default=10**6, help="faults per kind and recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="an empty folder, which stays; else a temporary one"
    )
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if any(word in kind for word in arguments.kinds)]
    torch.set_num_threads(1)
    # What the children would each import, which takes longer than a run.
    load_dataset("digits")
    torch.use_deterministic_algorithms(False)
    be_quick()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="fault-campaign-"))
    began = time.monotonic()
    counts = campaign(folder, kinds, arguments.recipes, arguments.most, arguments.seed)
    print(f"\nSeed {arguments.seed}, {time.monotonic() - began:.0f} s.\n\n{table(counts)}")
    failed = any(count.lost or count.unclear for count in counts.values())
    if not failed and arguments.out is None:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
