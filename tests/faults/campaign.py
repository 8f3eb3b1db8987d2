"""Kills runs at random moments, damages what they left, resumes them, and compares each end with
an undisturbed run.

    python tests/faults/campaign.py --kills 100

Every run is a child that is forked from this process, after the imports, and that calls the command
line's own function. One chain of runs continues in one folder until it is complete: between two
runs there is a SIGKILL (or a SIGTERM) at a random moment, and then, one time in three, a fault: a
checkpoint that is cut, has a flipped bit or is gone, half a line at the end of metrics.jsonl, a
leftover of a writer. It counts as a failure if a run ends with an error, if SIGTERM is not answered
by exit code 0 within 10 seconds, or if the chain ends in other bytes than the undisturbed run. Exit
code 1 if there was one.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import typer

from lfmcw_app.commands.run import run
from lfmcw_app.data import load_dataset
from lfmcw_app.search_space import draw

RECIPE = {
    "search.channels": 4,
    "search.nodes": 2,
    "search.steps": 4,
    "search.order": "first",
    "search.method": "darts",
    "search.batch_size": 8,
    "checkpoint_every": 1,
    "data.search_images": 80,
    "data.train_images": 60,
    "data.test_images": 50,
    "evaluation.channels": 2,
    "evaluation.epochs": 2,
    "evaluation.batch_size": 16,
}
COMPARED = ("metrics.jsonl", "genotype.json", "result.json", "config.yaml")
ANSWER = 10.0
"""Seconds that SIGTERM may take."""


def child(folder: Path, log: Path) -> int:
    """Starts or resumes the run in `folder` in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if (folder / "config.yaml").exists():
            run(resume=folder, threads=1)
        else:
            settings = [f"{key}={value}" for key, value in RECIPE.items()]
            run("digits", preset="smoke", assign=settings, out=folder, threads=1)
        code = 0
    except typer.Exit as end:
        code = end.exit_code
    except BaseException:  # noqa: BLE001  # told, and must not reach the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a child that ends within so many seconds (minus the signal that ended it);
    None if it does not.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


# ------------------------------ faults between two runs


def damage(folder: Path, rng: random.Random) -> str:
    """Does one thing to a folder that a run must survive; returns what."""
    checkpoints = [
        path for name in ("search", "training") if (path := folder / f"{name}.pt").exists()
    ]
    # One that has another before it: where the only one is lost, the error is the right end.
    checkpoints = [path for path in checkpoints if path.with_suffix(".previous.pt").exists()]
    kind = rng.choice(["cut", "flipped", "gone", "half a line", "leftover"])
    if kind == "half a line":
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b'{"phase": "sea')
    elif kind == "leftover":
        (folder / f".search.pt.{rng.randrange(10**6)}.part").write_bytes(b"PK half a checkpoint")
    elif not checkpoints:
        return "nothing"
    else:
        path = rng.choice(checkpoints)
        content = bytearray(path.read_bytes())
        if kind == "gone":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(content[: rng.randrange(len(content))])
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
    return kind


def checkpointed(folder: Path) -> int:
    """When the last checkpoint was written."""
    found = [
        path.stat().st_mtime_ns
        for name in ("search", "training")
        if (path := folder / f"{name}.pt").exists()
    ]
    return max(found, default=0)


def where(folder: Path) -> str:
    """Where a run stands."""
    if (folder / "result.json").exists():
        return "complete"
    for name in ("training", "search"):
        if (folder / f"{name}.pt").exists():
            return f"in the {name}"
    return "before the first checkpoint"


# ------------------------------ the campaign


def campaign(kills: int, seed: int, folder: Path, minutes: float, terminations: float = 0.2) -> int:
    """Runs chains until there were so many kills, or no time is left; prints what happened; returns
    the number of failures.
    """
    rng = random.Random(seed)
    log = folder / "log.txt"
    began = time.monotonic()
    if ended(child(folder / "whole", log), 600) != 0:
        sys.exit(f"The undisturbed run failed:\n{log.read_text()}")
    duration = time.monotonic() - began
    whole = {name: (folder / "whole" / name).read_bytes() for name in COMPARED}
    counts: collections.Counter[str] = collections.Counter()
    answers: list[float] = []
    chains = failures = 0

    def more() -> bool:
        return counts["SIGKILL"] < kills and time.monotonic() - began < 60.0 * minutes

    while more():
        chains += 1
        path = folder / f"chain-{chains}"
        trace: list[str] = []
        window, stood = duration / 2, 0
        while True:
            pid = child(path, log)
            code = ended(pid, rng.uniform(0.0, window) if more() else 600.0)
            if code is None and rng.random() < terminations:
                os.kill(pid, signal.SIGTERM)
                asked = time.monotonic()
                code = ended(pid, ANSWER)
                answers.append(time.monotonic() - asked)
                trace.append("SIGTERM")
                if code is None:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    trace.append("no answer")
                    break
                if code == -signal.SIGTERM:  # before the run had begun
                    code = 0
                if code == 0 and not (path / "result.json").exists():
                    code = None  # stopped
            elif code is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                trace.append("SIGKILL")
                counts[f"killed {where(path)}"] += 1
            if code is not None:
                break
            counts[trace[-1]] += 1
            # On a machine that became busier since it was measured, a run may need longer than the
            # window to get anywhere.
            stands = checkpointed(path)
            window, stood = (duration / 2 if stands > stood else 1.2 * window), max(stands, stood)
            if not (path / "config.yaml").exists():
                shutil.rmtree(path, ignore_errors=True)
            elif rng.random() < 1 / 3:
                trace.append(damage(path, rng))
                counts[trace[-1]] += 1
        same = code == 0 and {name: (path / name).read_bytes() for name in COMPARED} == whole
        left = [entry.name for entry in path.glob(".*.part")] if same else []
        if not same or left:
            failures += 1
            print(
                f"FAILED chain {chains} (exit code {code}, leftovers {left}): {', '.join(trace)}; "
                f"see {path}",
                flush=True,
            )
        else:
            shutil.rmtree(path)
        print(
            f"chain {chains}: {counts['SIGKILL']} kills so far, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(
        f"{chains} chains, {failures} failed; an undisturbed run took {duration:.1f} s, all "
        f"{time.monotonic() - began:.0f} s"
    )
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    if answers:
        print(
            f"  seconds to answer SIGTERM: median {statistics.median(answers):.2f}, longest "
            f"{max(answers):.2f}"
        )
    return failures


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, at least")
    parser.add_argument("--minutes", type=float, default=1e6, help="no more kills after so long")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the runs; by default a temporary one, removed if all went well",
    )
    parser.add_argument(
        "--pictures", action="store_true", help="draw the cells too, which takes most of the time"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_dataset("digits")  # imports what the children would each import
    if not arguments.pictures:
        draw.draw_genotype = lambda *arguments: None
    RECIPE.update(assignment.split("=", 1) for assignment in arguments.set)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="fault-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    failures = campaign(arguments.kills, arguments.seed, folder, arguments.minutes)
    if not failures and arguments.out is None:
        shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
