"""Draws more images from a run's generator, as a sheet or as one file per image."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.bounded_files import read_object
from lfmcw_app.build_modules import make_generator
from lfmcw_app.collapse import advised, last_quality
from lfmcw_app.errors import InputError, shown
from lfmcw_app.generator_quality import Quality
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.near_paths import near_runs
from lfmcw_app.output_files import new_file
from lfmcw_app.pictures import as_sheet, with_settled_statistics
from lfmcw_app.report.reading import read_run
from lfmcw_app.run_files import CONFIG, DATASET, EVALUATED
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.stages import WARMUP, phases_of
from lfmcw_app.starting_weights import averaged_generator, load_into_generator
from mlo.errors import nearest
from mlo.randomness import preserved

__all__ = [
    "MOST_ON_A_SHEET", "TrainedGenerator", "draw_sheet", "load_generator", "measured_quality",
    "save_images",
]  # fmt: skip

CHUNK = 64
"""Images that are drawn at once, whatever their number: so image k of a class is always the same,
for a seed."""

COLUMNS = 16
MOST_ON_A_SHEET = 4000


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedGenerator:
    """A run's generator.

    Attributes:
        generator: with settled statistics, in evaluation mode.
        class_names: one name per class.
        stage: the search stage that it is from; "generator" for the warm-up.
        rounds: rounds of that stage after which it was saved.
    """

    generator: ImageGenerator
    class_names: tuple[str, ...]
    stage: str
    rounds: int

    @torch.no_grad()
    def images(self, label: int, count: int, seed: int) -> Tensor:
        """Draws images of a class, [count, C, S, S], uint8, on the CPU.

        The images of a smaller count are the first ones of a larger count, and do not depend on
        other classes. The random state does not change.
        """
        device = self.generator.mean.device
        labels = torch.full((CHUNK,), label, device=device)
        chunks = []
        with preserved():
            torch.manual_seed(seed * len(self.class_names) + label)
            for _ in range(math.ceil(count / CHUNK)):
                images = self.generator.show(labels) * self.generator.std + self.generator.mean
                chunks.append((images.clamp(0, 1) * 255.0).round().to(torch.uint8).cpu())
        return torch.cat(chunks)[:count]

    def label(self, name: str) -> int:
        """The class of a name.

        Raises:
            InputError: if there is none.
        """
        if name not in self.class_names:
            raise InputError(f"Unknown class {name!r}. {nearest(name, self.class_names)}")
        return self.class_names.index(name)


class _Described(BaseModel):
    """The needed entries of dataset.json."""

    model_config = ConfigDict(strict=True, extra="ignore")

    class_names: list[str] = Field(min_length=1)
    image_size: int = Field(ge=1, le=2**14)
    channels: int = Field(ge=1, le=2**8)


def load_generator(run: Path, device: torch.device | str = "cpu") -> TrainedGenerator:
    """Loads the generator from the last checkpoint of a run's search, which may still run.

    Args:
        run: the run folder.
        device: where it goes.

    Raises:
        InputError: if the run has no generator, or not yet.
        CheckpointError: if the checkpoint is damaged.
    """
    if not (run / CONFIG).exists():
        why = "it has no config.yaml" if run.exists() else "there is nothing of this name"
        raise InputError(f"{run} is not a run folder: {why}.{near_runs(run)}")
    if (run / EVALUATED).exists():
        raise InputError(
            f"{run} holds the evaluation of a given genotype, which has no generator. Name the "
            "folder of a search."
        )
    folder = RunFolder.open(run)
    how = folder.recipe.search
    if how.method != "lfmcw":
        raise InputError(
            f"The run in {run} has no generator: its method is {how.method}. Only lfmcw learns one."
        )
    if how.draws_real:
        raise InputError(
            f"The run in {run} has no generator: its search.generator.name is real, so images of "
            f"{folder.recipe.dataset} were drawn instead. Some of them are in its samples.png."
        )
    for phase in reversed(phases_of(folder.recipe)[:-1]):
        state = folder.checkpoints(phase).load()
        if state is not None:
            break
    else:
        raise InputError(
            f"The search in {run} has no checkpoint: there is none yet, or they were removed. It "
            f"writes one every {folder.recipe.checkpoint_every} rounds. Wait for it, or resume it."
        )
    described = _described(run / DATASET)
    weights, rounds = _weights(state, run, phase)
    shape = (1, described.channels, 1, 1)
    if any(weights[name].shape != shape for name in ("mean", "std")):
        raise _unfit(run, phase, "mean and std do not have the channels of dataset.json")
    classes = len(described.class_names)
    with preserved():
        generator = make_generator(
            how.generator,
            num_classes=classes,
            image_size=described.image_size,
            image_channels=described.channels,
            mean=tuple(weights["mean"].flatten().tolist()),
            std=tuple(weights["std"].flatten().tolist()),
        )
        if _shapes(generator.state_dict()) != _shapes(weights):
            raise _unfit(run, phase, "its weights have other names or shapes")
        if phase == WARMUP:
            load_into_generator(generator, weights, str(run))
        else:
            generator.load_state_dict(weights)
        torch.manual_seed(0)
        settled = with_settled_statistics(generator.to(device), classes, torch.device(device))
    return TrainedGenerator(
        generator=settled,
        class_names=tuple(described.class_names),
        stage=phase,
        rounds=rounds,
    )


def measured_quality(run: Path, trained: TrainedGenerator) -> tuple[int, Quality, list[str]] | None:
    """The run's own last measurement of its generator before it was saved; see `last_quality`.

    Raises:
        InputError: if the run's metrics are damaged.
    """
    read = read_run(run)
    entries = [
        entry
        for phase in (read.warmup, *read.searched)
        for entry in phase.entries
        if phase.name == trained.stage
    ]
    try:
        last = last_quality(entries, trained.rounds)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"What the run in {run} measured of its generator cannot be used ({error}): its "
            "metrics.jsonl was edited. Put it back, or delete it."
        ) from None
    if last is None:
        return None
    number, quality, doubts = last
    return number, quality, advised(doubts, read.recipe)


def _described(path: Path) -> _Described:
    try:
        return _Described.model_validate(read_object(path))
    except (OSError, ValueError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(
            f"{path}, which describes the run's images, cannot be used ({why}). Resume the run, "
            "which writes it again."
        ) from None


def _weights(state: Mapping[str, Any], run: Path, stage: str) -> tuple[dict[str, Tensor], int]:
    """The generator's entries in a checkpoint, and the number of rounds."""
    try:
        optimizer = state["optimizer"]
        module, rounds = optimizer["problems"]["gan"]["module"], int(optimizer["round"])
        # After a warm-up they are averages; a search has only the generator's own averages.
        weights = averaged_generator(module)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _unfit(run, stage, "it has no generator") from None
    if not {"mean", "std"} <= set(weights):
        raise _unfit(run, stage, "it has no generator")
    return weights, rounds


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def _unfit(run: Path, stage: str, why: str) -> InputError:
    return InputError(
        f"The checkpoint of {stage!r} in {run} does not fit the run's config.yaml ({why}). One of "
        "them is from another run."
    )


# ------------------------------ pictures


def save_images(images: Mapping[str, Tensor], folder: Path) -> None:
    """Saves each image as a PNG file of its pixels: folder/CLASS/0000.png; all of them or none.

    Args:
        images: class name → [N, C, S, S], uint8.
        folder: a new one; it is then a folder of images that `folder:` reads.

    Raises:
        InputError: if it exists, cannot be written, or two classes have one name as a folder.
    """
    places: dict[str, str] = {}
    for name in images:
        # Many file systems take names of other case or spelling for the same.
        same = unicodedata.normalize("NFC", _file_name(name)).casefold()
        other = places.setdefault(same, name)
        if other != name:
            raise InputError(
                f"The classes {shown(other)} and {shown(name)} would be one folder, "
                f"{_file_name(name)}. Draw them one after the other with --class, into two folders."
            )
    with new_file(folder) as unfinished:
        for name, members in images.items():
            place = unfinished / _file_name(name)
            place.mkdir(parents=True)
            for index, image in enumerate(members):
                _picture(image).save(place / f"{index:04d}.png")


def _file_name(name: str) -> str:
    """A class name as the name of a folder: T-shirt/top → T-shirt-top."""
    for letter in {"/", os.sep, "\0"}:
        name = name.replace(letter, "-")
    if name in ("", ".", ".."):
        raise InputError(f"The class {shown(name)} cannot be the name of a folder.")
    return name


def _picture(image: Tensor) -> Image.Image:
    """[C, H, W], uint8 → a Pillow image."""
    return Image.fromarray(image.movedim(0, -1).squeeze(-1).contiguous().numpy())


def draw_sheet(images: Mapping[str, Tensor], path: Path) -> None:
    """Draws images in rows of `COLUMNS`, with the classes' names beside their first rows.

    Args:
        images: class name → [N, C, S, S], uint8.
        path: of the picture, a PNG file.
    """
    # Slow to import, and not needed for single files.
    from matplotlib.figure import Figure

    from lfmcw_app.drawing import drawing, set_row_names

    columns = min(COLUMNS, max(map(len, images.values())))
    rows_of_classes = [_rows(members, columns) for members in images.values()]
    sheet = torch.cat(rows_of_classes)
    height = sheet.shape[-2]
    ticks = []
    first = 0
    for rows in rows_of_classes:
        ticks.append((first + 0.5) * height)
        first += len(rows)
    with drawing():
        figure = Figure(figsize=(1.4 + 0.6 * columns, 0.3 + 0.6 * len(sheet)), layout="constrained")
        ax = figure.subplots()
        ax.imshow(as_sheet(sheet).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        set_row_names(ax, ticks, tuple(images))
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        figure.savefig(path, dpi=110, format="png")


def _rows(images: Tensor, columns: int) -> Tensor:
    """[N, C, S, S] → [rows, columns, C, S + 1, S + 1], with white lines between and at the end."""
    missing = -len(images) % columns
    framed = F.pad(images, (0, 1, 0, 1, 0, 0, 0, missing), value=255)
    return framed.view(-1, columns, *framed.shape[1:])
