"""Reads whatever a run folder holds, of a complete, an unfinished or an evaluated run.

Only the recipe must be there. Files are read within bounds (bounded_files.py); what cannot be read
is left out and named, since a damaged log is no reason to hide a result. Of very long runs every
k-th round is read, and those that hold more than numbers of a curve.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfmcw_app.bounded_files import check_regular, lines_of, parse_json, parse_object, text_of
from lfmcw_app.errors import InputError, shown
from lfmcw_app.near_paths import near_runs
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import validate_recipe
from lfmcw_app.resuming import numbers_changed
from lfmcw_app.run_files import (
    CONFIG,
    DATASET,
    ENVIRONMENT,
    EVALUATED,
    GENOTYPE,
    METRICS,
    REAL_IMAGES,
    RESULT,
    SEARCH_END,
    TIMINGS,
)
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import TRAINING, WARMUP

__all__ = ["LostNumbers", "Phase", "RunData", "Snapshot", "read_recipe", "read_run"]

OF_METRICS: dict[str, type | tuple[type, ...]] = {
    "phase": str, "round": int, "losses": dict, "metrics": dict,
}  # fmt: skip
OF_TIMINGS: dict[str, type | tuple[type, ...]] = {
    "phase": str, "rounds": list, "seconds": (int, float), "problems": dict,
}  # fmt: skip
"""Keys that each line has → their types."""

MOST_LINES = 20_000
"""Maximum number of lines of metrics.jsonl that are read: a chart has some hundred points."""

MOST_BYTES = 256 * 2**20
"""Maximum size of the lines of a file that are read, together."""

KEPT = (b'"alpha"', b'"candidates"', b'"quality"')
"""Keys of lines that are read in any case."""

PHASE_BYTES = 24
"""How much of a line's beginning tells its phase."""

DIAGNOSIS = re.compile(r"nonfinite-(?P<problem>\w{1,40})-round-(?P<round>\d{1,12})\.pt")
MOST_LOST = 20
MOST_EDGES = 2000
MOST_ROUNDS = 10**12


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
class LostNumbers:
    """A loss or gradient that was not finite.

    Attributes:
        problem: whose it was.
        round: of a phase, in which it was lost.
    """

    problem: str
    round: int


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
        lost: losses and gradients that were not finite; some may have been skipped since.
        changes: settings that were changed on --resume and that numbers can depend on.
        unreadable: what was left out, in words.
        stride: of how many rounds one was read.
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
    lost: Sequence[LostNumbers] = ()
    changes: Sequence[dict[str, Any]] = ()
    unreadable: list[str] = field(default_factory=list)
    stride: int = 1

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name


def read_recipe(path: Path) -> Recipe:
    """Reads the recipe of a run folder, without which there is no run.

    Raises:
        InputError: if there is no run in it.
    """
    try:
        text = text_of(path / CONFIG)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"There is no run in {path} (config.yaml: {why}). Name a run folder, as runs/NAME."
            f"{near_runs(path)}"
        ) from None
    try:
        return validate_recipe(parse_yaml(text))
    except ValueError as error:  # an InputError is one
        why = str(error).rstrip(".")
        raise InputError(f"{path / 'config.yaml'} is damaged: {why}.") from None


def read_run(path: Path) -> RunData:
    """Reads a run folder.

    Raises:
        InputError: if there is no run in it.
    """
    recipe = read_recipe(path)
    unreadable: list[str] = []
    metrics = path / METRICS
    stride = _stride(metrics)
    entries = _lines(metrics, OF_METRICS, unreadable, stride)
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_phase.setdefault(entry["phase"], []).append(entry)
    phases = {name: Phase(name=name, entries=lines) for name, lines in by_phase.items()}

    # A run may have ended anywhere: all files but the recipe may be missing.
    evaluated = (path / EVALUATED).exists()
    cells = path / (EVALUATED if evaluated else GENOTYPE)
    real = path / REAL_IMAGES
    return RunData(
        path=path,
        recipe=recipe,
        environment=_mapping(path / ENVIRONMENT, unreadable),
        dataset=_mapping(path / DATASET, unreadable),
        searched=[phase for name, phase in phases.items() if name not in (WARMUP, TRAINING)],
        warmup=phases.get(WARMUP, Phase(name=WARMUP, entries=[])),
        training=phases.get(TRAINING, Phase(name=TRAINING, entries=[])),
        genotype=_genotype(cells, recipe, unreadable),
        evaluated=evaluated,
        result=_mapping(path / RESULT, unreadable) or None,
        timings=_lines(path / TIMINGS, OF_TIMINGS, unreadable),
        snapshots=_snapshots(path / "samples", list(phases)),
        real=real if real.exists() else None,
        search_end=_mapping(path / SEARCH_END, unreadable),
        lost=_lost(path),
        changes=_changes(path, unreadable),
        unreadable=unreadable,
        stride=stride,
    )


def _mapping(path: Path, unreadable: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return parse_object(text_of(path), printable=True)
    except (OSError, ValueError) as error:
        unreadable.append(f"{path.name} ({error})")
        return {}


def _genotype(path: Path, recipe: Recipe, unreadable: list[str]) -> Cells | None:
    if not path.exists():
        return None
    try:
        cells = space_named(recipe.search.space).genotype.load(path)
        edges = sum(len(edges) for nodes in cells.to_data().values() for edges in nodes)
        if edges > MOST_EDGES:
            raise InputError(f"it has {edges:,} edges")
    except InputError as error:
        unreadable.append(f"{path.name} ({error})")
        return None
    return cells


def _changes(path: Path, unreadable: list[str]) -> Sequence[dict[str, Any]]:
    try:
        return numbers_changed(path)
    except (InputError, LookupError, TypeError) as error:
        unreadable.append(f"changes.jsonl ({error})")
        return []


def _lost(folder: Path) -> list[LostNumbers]:
    """What the names of the diagnostic files say; the files stay closed."""
    matches = [DIAGNOSIS.fullmatch(path.name) for path in sorted(folder.glob("nonfinite-*.pt"))]
    found = [
        LostNumbers(problem=match["problem"], round=int(match["round"]))
        for match in matches
        if match
    ]
    return found[:MOST_LOST]


def _stride(path: Path) -> int:
    """Distance between lines that are read, such that at most `MOST_LINES` are."""
    if not path.is_file():
        return 1
    with path.open("rb") as file:
        count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return 1 + (count - 1) // MOST_LINES if count else 1


def _lines(
    path: Path, keys: dict[str, type | tuple[type, ...]], unreadable: list[str], stride: int = 1
) -> list[dict[str, Any]]:
    """The objects of a file with one per line.

    A last line without its end, of a run that was killed there, is left out.
    """
    if not path.exists():
        return []
    entries, bad, why, left = [], [], "", MOST_BYTES
    try:
        check_regular(path)
        for number, line in _some_lines(path, stride):
            left -= len(line)
            if left < 0:
                unreadable.append(f"{path.name} from line {number:,} on (it is too long)")
                break
            try:
                entries.append(_entry(line, keys))
            except ValueError as error:
                bad.append(number)
                why = why or str(error)
    except (OSError, ValueError) as error:
        unreadable.append(f"{path.name} ({error})")
    if bad:
        lines = ", ".join(map(str, bad[:3])) + (", …" if len(bad) > 3 else "")
        unreadable.append(f"{len(bad):,} lines of {path.name} ({lines}; the first: {why})")
    return entries


def _some_lines(path: Path, stride: int) -> Iterator[tuple[int, bytes]]:
    """Number and content of the lines that are read: each stride-th, and what must not be missed.

    These are lines with α, candidates or measures, and the last of each phase.
    """
    before: tuple[int, bytes] | None = None
    with path.open("rb") as file:
        for number, line in enumerate(lines_of(file), start=1):
            if stride > 1 and before is not None and line[:PHASE_BYTES] != before[1][:PHASE_BYTES]:
                yield before
            if number % stride == 0 or any(key in line for key in KEPT):
                before = None
                yield number, line
            else:
                before = number, line
    if before is not None:
        yield before


def _entry(line: bytes, keys: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """The object of a line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    entry = parse_json(line.decode("utf-8"), printable=True)
    found = entry if isinstance(entry, dict) else {}
    wrong = [
        f"{key} is {shown(found[key])}" if key in found else f"it lacks {key}"
        for key, kind in keys.items()
        if not isinstance(found.get(key), kind) or isinstance(found[key], bool)
    ]
    if not wrong and not 0 <= found.get("round", 0) <= MOST_ROUNDS:
        wrong.append(f"round is {shown(found['round'])}")
    if wrong:
        raise ValueError(wrong[0])
    return found


def _snapshots(folder: Path, phases: Sequence[str]) -> list[Snapshot]:
    found = []
    for phase in phases:
        for path in sorted(folder.glob(f"{phase}-*.png")):
            number = path.stem.removeprefix(f"{phase}-")
            if number.isdecimal():  # not the file of search-1 for search
                found.append(Snapshot(phase=phase, round=int(number), path=path))
    return found
