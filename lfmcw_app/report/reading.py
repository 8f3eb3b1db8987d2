"""Reads whatever a run folder holds, of a complete, an unfinished or an evaluated run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmcw_app.errors import InputError
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.recipe import Recipe, validate_recipe
from lfmcw_app.resuming import numbers_changed
from lfmcw_app.run_folder import EVALUATED
from lfmcw_app.search_end import SEARCH_END
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import TRAINING, WARMUP
from lfmcw_app.timings import TIMINGS

__all__ = ["Phase", "RunData", "Snapshot", "read_run"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The rounds of a stage of the search, of the training, or of the generator's warm-up.

    Attributes:
        name: "search", "search-1", ..., "training", or "generator".
        entries: its lines of metrics.jsonl, one per round.
    """

    name: str
    entries: Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A sheet of generated images."""

    phase: str
    round: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run folder holds; what is missing is None or empty.

    Attributes:
        searched: the stages of the search, in their order; empty for an evaluated genotype.
        warmup: of the generator, before the search.
        training: of the derived network.
        genotype: the cells that the search found, or that were given.
        evaluated: whether the genotype was given.
        dataset: dataset.json.
        timings: the lines of timings.jsonl.
        search_end: search.json: what generator and W1 are worth at the end of the search.
        real: a sheet of real images, as the snapshots have them.
        changes: settings that were changed on --resume and that numbers can depend on.
    """

    path: Path
    recipe: Recipe
    environment: dict[str, Any]
    dataset: dict[str, Any]
    searched: Sequence[Phase]
    warmup: Phase
    training: Phase
    genotype: Cells | None
    evaluated: bool
    result: dict[str, Any] | None
    timings: Sequence[dict[str, Any]]
    snapshots: Sequence[Snapshot]
    real: Path | None
    search_end: dict[str, Any]
    changes: Sequence[dict[str, Any]] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name


def read_run(path: Path) -> RunData:
    """Reads a run folder.

    Raises:
        InputError: if there is no run in it, or one of its files is damaged.
    """
    try:
        tree = parse_yaml((path / "config.yaml").read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"There is no run in {path} ({error}). Name a run folder, as runs/NAME."
        ) from None
    except ValueError as error:
        raise InputError(f"{path / 'config.yaml'} is damaged: {error}.") from None
    recipe = validate_recipe(tree)
    entries = _lines(path / "metrics.jsonl", ("phase", "round", "losses", "metrics"))
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_phase.setdefault(entry["phase"], []).append(entry)
    phases = {name: Phase(name=name, entries=lines) for name, lines in by_phase.items()}

    # A run may have ended anywhere: all files but the recipe may be missing.
    evaluated = (path / EVALUATED).exists()
    cells = path / (EVALUATED if evaluated else "genotype.json")
    real = path / "samples" / "real.png"
    return RunData(
        path=path,
        recipe=recipe,
        environment=_mapping(path / "environment.json"),
        dataset=_mapping(path / "dataset.json"),
        searched=[phase for name, phase in phases.items() if name not in (WARMUP, TRAINING)],
        warmup=phases.get(WARMUP, Phase(name=WARMUP, entries=[])),
        training=phases.get(TRAINING, Phase(name=TRAINING, entries=[])),
        genotype=space_named(recipe.search.space).genotype.load(cells) if cells.exists() else None,
        evaluated=evaluated,
        result=_mapping(path / "result.json") or None,
        timings=_lines(path / TIMINGS, ("phase", "rounds", "seconds", "problems")),
        snapshots=_snapshots(path / "samples", list(phases)),
        real=real if real.exists() else None,
        search_end=_mapping(path / SEARCH_END),
        changes=numbers_changed(path),
    )


def _mapping(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds a {type(value).__name__}, not an object.")
    return value


def _lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file with one per line.

    A last line without its end, of a run that was killed there, is left out.
    """
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}).") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            raise InputError(f"{path} is damaged: line {number} is not JSON.") from None
        if not isinstance(entry, dict) or not set(keys) <= set(entry):
            raise InputError(f"{path} is damaged: line {number} lacks one of {', '.join(keys)}.")
        entries.append(entry)
    return entries


def _snapshots(folder: Path, phases: Sequence[str]) -> list[Snapshot]:
    found = []
    for phase in phases:
        for path in sorted(folder.glob(f"{phase}-*.png")):
            number = path.stem.removeprefix(f"{phase}-")
            if number.isdecimal():  # not the file of search-1 for search
                found.append(Snapshot(phase=phase, round=int(number), path=path))
    return found
