"""A run folder: what a run writes, where, and how an interrupted run finds its place again.

config.yaml        the resolved recipe
environment.json   versions and hardware
metrics.jsonl      one line a round of the search and of the training: a function of recipe and seed alone
search.pt          checkpoint of the search; evaluation.pt: of the derived network's training
genotype.json      the derived cells; cells.png, cells.svg: their picture
evaluated.json     in a folder of lfmcw_app.evaluate, the genotype that was given
    samples.png        generated images, a row a class
result.json        the test error; written last, so its presence means that the run is complete
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

import mlo
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe, validate_recipe

__all__ = ["EVALUATED", "RunFolder"]

EVALUATED = "evaluated.json"
"""Marks a folder of `lfmcw_app.evaluate`: the genotype that was given, which no search of this folder found."""


class RunFolder:
    """The folder of one run.

    Args:
        path: an existing folder with a `config.yaml`; see `create` and `open`.
        recipe: the recipe in it.
    """

    writes = True
    """Whether this process writes pictures and files into it."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunFolder:
        """Makes a new run folder.

        Raises:
            InputError: if the folder holds something already, or cannot be written.
        """
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                what = "another run" if (path / "config.yaml").exists() else "something else"
                raise InputError(
                    f"--out {path} holds {what} already, and nothing there is overwritten. Name a new folder, or go "
                    f"on with that run by --resume {path}."
                )
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, recipe)
            folder.write("config.yaml", recipe.to_yaml())
            folder.write("environment.json", json.dumps(_environment(), indent=1))
        except OSError as error:
            raise InputError(f"The run folder {path} cannot be written ({error}). Name another with --out.") from None
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens an existing run folder.

        Raises:
            InputError: if there is no run in it.
        """
        config = path / "config.yaml"
        try:
            tree = yaml.safe_load(config.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--resume {path}: there is no run in it ({error}).") from None
        except yaml.YAMLError:
            raise InputError(f"--resume {path}: its config.yaml is damaged.") from None
        return cls(path, validate_recipe(tree))

    def write(self, name: str, text: str) -> None:
        """Writes a file so that it is there whole or not at all."""
        temporary = self.path / f".{name}.part"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @property
    def metrics(self) -> Path:
        """The file of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, if the run is complete."""
        try:
            result: dict[str, Any] = json.loads((self.path / "result.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / 'result.json'} is damaged ({error}). Delete it and resume: the result is computed again."
            ) from None
        return result

    def save(self, phase: str, optimizer: mlo.MultilevelOptimizer) -> None:
        """Writes the checkpoint of a phase, with the length that metrics.jsonl has now."""
        length = self.metrics.stat().st_size if self.metrics.exists() else 0
        state = {
            "recipe": self.recipe.to_yaml(),
            "phase": phase,
            "metrics_bytes": length,
            "optimizer": optimizer.state_dict(),
        }
        mlo.save_checkpoint(state, self.path / f"{phase}.pt")

    def has_checkpoint(self, phase: str) -> bool:
        """Whether a phase has been checkpointed."""
        return (self.path / f"{phase}.pt").exists()

    def restore(self, phase: str, optimizer: mlo.MultilevelOptimizer, phases: Sequence[str]) -> None:
        """Loads the checkpoint of a phase, if there is one; metrics written since the latest checkpoint are dropped.

        Args:
            phase: which.
            optimizer: what is restored.
            phases: all phases of the run, in their order.

        Raises:
            CheckpointError: if it is damaged or belongs to another run.
        """
        path = self.path / f"{phase}.pt"
        later = [other for other in phases[phases.index(phase) + 1 :] if self.has_checkpoint(other)]
        if not path.exists():
            if later:
                raise mlo.CheckpointError(
                    f"{self.path} has a checkpoint of {later[0]!r} but none of {phase!r} before it ({phase}.pt). Put it back, "
                    "or start again in a new folder."
                )
            if phase == phases[0]:
                self._cut_metrics(0)
            return
        state = mlo.load_checkpoint(path)
        if not isinstance(state.get("metrics_bytes"), int) or "optimizer" not in state:
            raise mlo.CheckpointError(
                f"The checkpoint {path} is not one of a run: it lacks entries. Use another folder."
            )
        if state.get("phase") != phase or state.get("recipe") != self.recipe.to_yaml():
            raise mlo.CheckpointError(
                f"The checkpoint {path} is from another recipe than the config.yaml beside it. Resume the run that it "
                "belongs to, or start again in a new folder."
            )
        length = self.metrics.stat().st_size if self.metrics.exists() else 0
        if length < state["metrics_bytes"]:
            raise mlo.CheckpointError(
                f"{self.metrics} is shorter ({length} bytes) than when the checkpoint was written "
                f"({state['metrics_bytes']} bytes): it was cut or replaced. Start again in a new folder."
            )
        optimizer.load_state_dict(state["optimizer"])
        if not later:
            self._cut_metrics(state["metrics_bytes"])

    def _cut_metrics(self, length: int) -> None:
        if self.metrics.exists():
            os.truncate(self.metrics, length)


def _environment() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "mlo": mlo.__version__,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
