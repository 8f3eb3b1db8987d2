"""The main job on a recipe that takes a second, called in this process.

The judge of generated images has few steps: its usual ones would take most of the time.
"""

from __future__ import annotations

import pytest
from command_calls import call
from interrupted_command import JUDGE_STEPS

from lfmcw_app.commands import run as run_command

TINY = {
    "data.image_size": 8,
    "search.channels": 4,
    "search.nodes": 1,
    "search.primitives": ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"],
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


def outcome(folder):
    names = ["metrics.jsonl", "genotype.json", "result.json", "config.yaml"]
    names += sorted(f"samples/{path.name}" for path in (folder / "samples").iterdir())
    return {name: (folder / name).read_bytes() for name in names}
