"""`Run`: a run folder as an object, for scripts and notebooks."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from lfmcw_app.bounded_files import check_regular, lines_of, parse_object
from lfmcw_app.classifier import Classifier, Preprocess, load_network
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe
from lfmcw_app.report.reading import read_recipe
from lfmcw_app.result_file import read_result, worst_classes
from lfmcw_app.run_files import EVALUATED, METRICS, RESULT
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.spaces import space_named
from lfmcw_app.usual_torch import usual_torch

__all__ = ["Run"]

FACTS = (
    ("test_error_percent", "test error", "{:.2f}%"),
    ("test_images", "test images", "{:,}"),
    ("parameters", "parameters", "{:,}"),
    ("multiply_adds_millions", "multiply-adds", "{:,.1f} M"),
)
"""Key of the result, what it is called, and how it is written."""

TAIL = 2**20
"""Bytes of metrics.jsonl in which the last line is looked for."""


class Run:
    """A run folder of a search or an evaluation, complete or not.

    It reads; it changes nothing. Each property is read anew, so that it follows a run that is still
    running. In a notebook it shows what the run is, how it ended, and its cells.

    Args:
        path: the folder, such as "runs/NAME".

    Attributes:
        path: the folder.

    Raises:
        InputError: if there is no run in it.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self._dataset = read_recipe(self.path).dataset

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe: data set, seed, and all settings."""
        return read_recipe(self.path)

    @property
    def genotype(self) -> Cells:
        """The cells that the search found, or that were given to `lfmcw_app.evaluate`.

        Raises:
            InputError: if the search has not ended.
        """
        return space_named(self.recipe.search.space).genotype.load(self.path)

    @property
    def is_complete(self) -> bool:
        """Whether the run has a result."""
        return (self.path / RESULT).is_file()

    @property
    def result(self) -> dict[str, Any]:
        """What is in result.json: the test error, errors by class, the genotype, and more.

        Raises:
            InputError: if the run is not complete, or the file is damaged.
        """
        if not self.is_complete:
            command = "evaluate" if (self.path / EVALUATED).exists() else "run"
            raise InputError(
                f"The run in {self.path} has no result yet. Wait for it, or resume it: python -m "
                f"lfmcw_app.{command} --resume {shlex.quote(str(self.path))}"
            )
        path = self.path / RESULT
        with _damaged(path, "it"):
            return read_result(path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one per round of each phase: losses, metrics, solves, α.

        A last line that is still being written is left out.

        Raises:
            InputError: naming a line that is damaged.
        """
        path = self.path / METRICS
        if not path.exists():
            return []
        entries = []
        with _damaged(path, "it"):
            check_regular(path)
            with path.open("rb") as file:
                for number, line in enumerate(lines_of(file), start=1):
                    with _damaged(path, f"line {number}"):
                        entries.append(_object(line))
        return entries

    def network(
        self, *, device: torch.device | str = "cpu"
    ) -> tuple[Classifier, Preprocess, tuple[str, ...]]:
        """Loads the trained network; see `lfmcw_app.load_network`.

        Raises:
            InputError: if the run has none yet.
        """
        return load_network(self.path, device=device)

    @usual_torch()
    def predict(self, *images: Any) -> Tensor:
        """Returns the probabilities of the classes, [images, classes], on the CPU.

        Args:
            images: each a path, a Pillow image, or an array or tensor of its pixels.

        Raises:
            InputError: if there is no image or no network, or an image cannot be read.
        """
        if not images:
            raise InputError('Name at least one image: run.predict("photo.png").')
        network, preprocess, _ = self.network()
        with torch.no_grad():
            logits: Tensor = network(torch.stack([preprocess(image) for image in images]))
        return logits.softmax(1)

    # ------------------------------ shown

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self._dataset}, {self._state()})"

    def _state(self) -> str:
        """How far the run is, in words."""
        if self.is_complete:
            return "complete"
        last = _last_line(self.path / METRICS)
        if not last:
            return "no round yet"
        try:
            entry = _object(last)
        except ValueError:
            return f"{METRICS} is damaged"
        return f"{entry.get('phase')} after round {entry.get('round')}"

    def _facts(self) -> list[tuple[str, Any]]:
        """The figures of the result, for people; those that it lacks are left out."""
        try:
            result = self.result
            found: list[tuple[str, Any]] = [
                (label, pattern.format(result[key]))
                for key, label, pattern in FACTS
                if key in result
            ]
            if worst := _worst(result.get("classes", [])):
                found.append(("largest errors by class", worst))
        except (InputError, LookupError, TypeError, ValueError) as error:
            return [(RESULT, f"cannot be shown: {error}")]
        if "doubt" in result:
            found.append(("doubtful", result["doubt"]))
        return found

    def _repr_html_(self) -> str:
        """What a notebook shows: the run, its result, and its cells."""
        how = self.recipe
        rows = [
            ("data set", how.dataset),
            ("recipe", f"{how.search.method}, space {how.search.space}, preset {how.preset}"),
            ("seed", how.seed),
            ("state", self._state()),
        ]
        if self.is_complete:
            rows += self._facts()
        row = Markup(
            '<tr><th style="text-align:left">{}</th><td style="text-align:left">{}</td></tr>'
        )
        table = Markup("<table><caption>{}</caption>{}</table>").format(
            self.path, Markup("").join([row.format(name, value) for name, value in rows])
        )
        try:
            cells = self.genotype._repr_html_()
        except InputError:  # of a search that has not ended
            cells = ""
        return f"<div>{table}{cells}</div>"


@contextmanager
def _damaged(path: Path, what: str) -> Iterator[None]:
    """Turns a failure to read into a user's error that names the file.

    Args:
        path: of the file.
        what: which part of it is read in the body.

    Raises:
        InputError: if the body cannot read it.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: {what} cannot be read ({error}). Take the file from a copy of "
            "the run, or look at what stands there."
        ) from None


def _object(text: bytes) -> dict[str, Any]:
    """Parses a line.

    Raises:
        ValueError: if it is no JSON object.
    """
    return parse_object(text.decode("utf-8"), printable=True)


def _last_line(path: Path) -> bytes:
    """The last whole line of a file; empty if there is none."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        return file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]


def _worst(classes: Any) -> str:
    """The classes with the largest errors, in words; empty where two classes say the same.

    Raises:
        LookupError, TypeError, ValueError: if these are no classes of a result.
    """
    if len(classes) <= 2:
        return ""
    worst = worst_classes(classes)
    return ", ".join([f"{entry['name']} {entry['error_percent']:.1f}%" for entry in worst])
