"""The main job on a recipe that takes seconds, as a command of its own."""

from __future__ import annotations

import subprocess
import sys

TINY = {
    "search.channels": 4,
    "search.nodes": 1,
    "search.steps": 6,
    "search.batch_size": 8,
    "search.generator.channels": 2,
    "search.generator.noise_dim": 4,
    "checkpoint_every": 2,
    "data.search_images": 80,
    "data.train_images": 60,
    "data.test_images": 50,
    "evaluation.channels": 2,
    "evaluation.epochs": 4,
    "evaluation.batch_size": 16,
}


def command(*arguments, **changes):
    settings = [f"--set={key}={value}" for key, value in {**TINY, **changes}.items()]
    return [
        sys.executable,
        "-m",
        "lfmcw_app.run",
        "digits",
        "--threads=1",
        *settings,
        *map(str, arguments),
    ]


def run(*arguments, **changes):
    return subprocess.run(
        command(*arguments, **changes), capture_output=True, text=True, timeout=300
    )


def resume(folder):
    arguments = [sys.executable, "-m", "lfmcw_app.run", "--threads=1", "--resume", str(folder)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


def outcome(folder):
    names = ["metrics.jsonl", "genotype.json", "result.json", "config.yaml"]
    names += sorted(f"samples/{path.name}" for path in (folder / "samples").iterdir())
    return {name: (folder / name).read_bytes() for name in names}
