"""Runs of the application in this process, interrupted wherever a test says, on a recipe that takes
a second.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from rich.console import Console

from lfmcw_app.complete_runs import run
from lfmcw_app.data_checks import read_data
from lfmcw_app.recipe_loading import changed_recipe, load_recipe
from lfmcw_app.run_folder import RunFolder

RECIPE = {
    "dataset": "digits",
    "checkpoint_every": 2,
    "data.image_size": 8,
    "data.search_images": 80,
    "data.train_images": 60,
    "data.test_images": 50,
    "search.channels": 4,
    "search.nodes": 2,
    "search.primitives": ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"],
    "search.steps": 6,
    "search.order": "first",
    "search.method": "darts",
    "search.batch_size": 8,
    "evaluation.channels": 2,
    "evaluation.epochs": 3,
    "evaluation.batch_size": 16,
}


class Killed(BaseException):
    """Ends a run as a kill does: nothing of the application catches it."""


def kill_after(patch, lines):
    """Lets a run die behind so many lines of metrics."""
    log, count = RunFolder.log, 0

    def dying(self, entry):
        nonlocal count
        log(self, entry)
        count += 1
        if count == lines:
            raise Killed

    patch.setattr(RunFolder, "log", dying)


class Runs:
    """Starts runs and resumes them."""

    def __init__(self, monkeypatch) -> None:
        self._monkeypatch = monkeypatch
        self.printed = io.StringIO()
        self._datasets = {}

    def recipe(self, **changes):
        return load_recipe("smoke", overrides={**RECIPE, **changes})

    def start(self, path: Path, *, die_after: int | None = None, **changes):
        """Runs in a new folder; dies after so many lines of metrics."""
        return self._run(RunFolder.create(path, self.recipe(**changes)), die_after)

    def resume(self, path: Path, *, die_after: int | None = None, **changes):
        """Resumes the run of a folder, as a new process would, with other settings."""
        folder = RunFolder.open(path)
        wanted = changed_recipe(folder.recipe, overrides=changes)
        folder.change(wanted, searches=True)
        return self._run(folder, die_after)

    def _run(self, folder, die_after):
        # Nothing is left of the process before it.
        torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
        _, dataset = read_data(folder.recipe, folder.path)
        with self._monkeypatch.context() as patch:
            # Drawing takes longer than all else.
            patch.setattr("lfmcw_app.search_space.draw.draw_genotype", lambda *arguments: None)
            if die_after is not None:
                kill_after(patch, die_after)
            try:
                return run(folder, dataset, Console(file=self.printed), torch.device("cpu"))
            except Killed:
                return None


def outcome(folder: Path):
    """What equal runs have equal, byte for byte."""
    names = ("metrics.jsonl", "genotype.json", "result.json", "config.yaml")
    return {name: (folder / name).read_bytes() for name in names}


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cuts a file in half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
