"""The main job on a recipe that takes a second: called in this process, or as a command of its own.

The judge of generated images has a constant number of steps, which would take most of the time.
"""

from __future__ import annotations

import sys

import pytest
from command_calls import call

from lfmcw_app.commands import run as run_command

TINY = {
    "data.image_size": 8,
    "search.channels": 4,
    "search.nodes": 1,
    "search.primitives": "[none, max_pool_3x3, skip_connect, sep_conv_3x3]",
    "search.steps": 4,
    "search.batch_size": 8,
    "search.generator.channels": 2,
    "search.generator.noise_dim": 4,
    "checkpoint_every": 2,
    "data.search_images": 80,
    "data.train_images": 60,
    "data.test_images": 50,
    "evaluation.channels": 2,
    "evaluation.epochs": 2,
    "evaluation.batch_size": 16,
}

JUDGE_STEPS = 10


def settings(**changes):
    """Options of the tiny recipe with changes; None leaves a setting as the preset has it."""
    values = {**TINY, **changes}
    return [f"--set={key}={value}" for key, value in values.items() if value is not None]


def arguments(*given, **changes):
    return ["digits", "--threads=1", *settings(**changes), *map(str, given)]


def called(command, *given):
    """A command in this process, with a judge of few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lfmcw_app.generator_quality.STEPS", JUDGE_STEPS)
        return call(command, *given)


def run(*given, **changes):
    return called(run_command.run, *arguments(*given, **changes))


def resume(folder):
    return called(run_command.run, "--threads=1", "--resume", folder)


# ------------------------------ in processes of their own

PROGRAM = f"""
from lfmcw_app import generator_quality
from lfmcw_app.commands.run import main
generator_quality.STEPS = {JUDGE_STEPS}
main()
"""


def command(*given, **changes):
    """The same run as of `run`, as a command."""
    return [sys.executable, "-c", PROGRAM, *arguments(*given, **changes)]


def outcome(folder):
    names = ["metrics.jsonl", "genotype.json", "result.json", "config.yaml"]
    names += sorted(f"samples/{path.name}" for path in (folder / "samples").iterdir())
    return {name: (folder / name).read_bytes() for name in names}
