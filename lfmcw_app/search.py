"""A run: what it needs of its data, the stages of its search, and then the training of the derived
network.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lfmcw_app.collapse import CollapseDetector, observe
from lfmcw_app.data import (
    Dataset,
    load_dataset,
    search_counts,
    search_split,
    short_name,
)
from lfmcw_app.derived_training import train_derived, training_images, training_rounds
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.gradient_terms import gradient_terms
from lfmcw_app.modules import SearchModules, build_modules
from lfmcw_app.phase import Phase, entry_of
from lfmcw_app.pictures import describe_dataset, save_samples, save_snapshot, snapshot_rounds
from lfmcw_app.problems import build_search, search_rounds
from lfmcw_app.processes import main_first
from lfmcw_app.progress import PhaseProgress
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.candidates import as_candidates
from lfmcw_app.search_space.draw import draw_genotype
from lfmcw_app.search_space.genotype import Genotype, derive_genotype, random_genotype
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.search_space.pdarts import (
    derive_restricted_genotype,
    set_skip_drop_probability,
    skip_drop_probability,
    surviving,
)
from lfmcw_app.search_space.stem import image_divisor
from lfmcw_app.stages import SearchStage, phases_of, search_stages
from lfmcw_app.timings import TIMINGS, Timings
from mlo import Record
from mlo.randomness import preserved

__all__ = [
    "evaluate_genotype",
    "read_data",
    "run",
    "search",
]

STAGE_SEEDS = 1_000_003

SPACES = {"darts": "DARTS", "pdarts": "P-DARTS", "pcdarts": "PC-DARTS"}
METHODS = {"lfmcw": "LFM-CW", "darts": "no LFM-CW", "random": "random cells"}


def read_data(recipe: Recipe, root: Path, *, searches: bool = True) -> Dataset:
    """Reads the data set of a recipe, at its image size.

    Args:
        recipe: the recipe.
        root: folder of data files.
        searches: whether a search is to run, not only the training of a derived network.

    Raises:
        InputError: if it cannot be read, or has fewer images than a batch of the recipe.
    """
    with main_first():
        dataset = load_dataset(recipe.dataset, root, recipe.data.image_size)
    available = len(dataset.train)
    searched = search_counts(
        min(recipe.data.search_images or available, available), recipe.data.search_fractions
    )
    needs = (
        ("search.batch_size", recipe.search.batch_size, min(searched)),
        ("evaluation.batch_size", recipe.evaluation.batch_size, training_images(recipe, dataset)),
    )
    searches = searches and recipe.search.method != "random"
    for key, batch, images in needs if searches else needs[1:]:
        if images < batch:
            raise InputError(
                f"{key} is {batch}, but the recipe leaves only {images} images of {dataset.name} "
                f"to draw from. Lower {key}, or raise data.search_images or data.train_images."
            )
    if searches:
        _check_search(recipe, dataset)
    divisor = image_divisor(recipe.evaluation.stem)
    if dataset.image_size % divisor:
        raise InputError(
            f"evaluation.stem is {recipe.evaluation.stem}, which needs images of a multiple of "
            f"{divisor} pixels; those of {dataset.name} have {dataset.image_size}."
        )
    how = recipe.evaluation
    per_epoch = training_images(recipe, dataset) // how.batch_size
    if how.weights.warmup_epochs * per_epoch >= training_rounds(how, per_epoch):
        raise InputError(
            f"evaluation.weights.warmup_epochs ({how.weights.warmup_epochs}, of {per_epoch} "
            "rounds) must be below "
            f"{'evaluation.epochs' if how.steps is None else 'evaluation.steps'} "
            f"({how.epochs or how.steps})."
        )
    cutout = recipe.evaluation.augmentation.cutout
    if cutout >= dataset.image_size:
        raise InputError(
            f"evaluation.augmentation.cutout is {cutout}, which would erase images of "
            f"{dataset.image_size} pixels. Lower it."
        )
    return dataset


def _check_search(recipe: Recipe, dataset: Dataset) -> None:
    """Builds what the search will need, and refuses a warm-up that lasts as long as the search.

    Raises:
        InputError: naming the key that does not fit.
    """
    how, data = recipe.search, recipe.data
    available = min(data.search_images or len(dataset.train), len(dataset.train))
    images, _ = search_counts(available, data.search_fractions)
    rounds, per_epoch = search_rounds(how, images), images // how.batch_size
    for key, warmup in (
        ("architecture", how.architecture.warmup_epochs),
        ("weights", how.weights.warmup_epochs),
    ):
        if warmup * per_epoch >= rounds:
            raise InputError(
                f"search.{key}.warmup_epochs ({warmup} epochs of {per_epoch} rounds) lasts as long "
                f"as the search ({rounds} rounds{' a stage' if how.space == 'pdarts' else ''}). "
                "Lower it, or search longer."
            )
    with preserved():
        build_modules(how, dataset, layers=search_stages(how)[0].layers)


def run(
    folder: RunFolder, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Runs both phases, from where the folder's checkpoints stand, and returns the result."""

    def both() -> dict[str, Any]:
        return train_derived(
            folder, search(folder, dataset, console, device), dataset, console, device
        )

    return _completed(folder, dataset, both)


def evaluate_genotype(
    folder: RunFolder, genotype: Genotype, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Trains the derived network of a given genotype, from where the folder's checkpoint stands,
    and returns the result.
    """
    return _completed(
        folder, dataset, lambda: train_derived(folder, genotype, dataset, console, device)
    )


def _completed(
    folder: RunFolder, dataset: Dataset, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a folder, from `work` where it has none yet."""
    if folder.result is not None:
        return folder.result
    with folder.held():
        if folder.writes:
            describe_dataset(dataset, folder)
        return work()


# ------------------------------ search


def search(folder: RunFolder, dataset: Dataset, console: Console, device: torch.device) -> Genotype:
    """Searches a cell; writes genotype.json, cells.png, cells.svg and, with a generator,
    samples.png and samples/.
    """
    how = folder.recipe.search
    genotype, generator = _searched(folder, dataset, console, device)
    folder.write("genotype.json", genotype.to_json())
    title = f"{SPACES[how.space]}, {METHODS[how.method]}, {short_name(dataset.name)}"
    if not folder.writes:
        return genotype
    title = title if how.method == "random" else f"{title}, {how.order} order"
    with folder.writing("The pictures"):
        for name in ("cells.png", "cells.svg"):
            draw_genotype(genotype, folder.path / name, title)
        if generator is not None:
            save_samples(generator, dataset, folder.path / "samples.png", device)
    return genotype


def _searched(
    folder: RunFolder, dataset: Dataset, console: Console, device: torch.device
) -> tuple[Genotype, ImageGenerator | None]:
    """Runs all stages; returns the genotype, and the generator that was learned with it."""
    how = folder.recipe.search
    if how.method == "random":
        return random_genotype(how.nodes, folder.recipe.seed), None
    candidates = as_candidates(PRIMITIVES, how.nodes)
    for index, stage in enumerate(search_stages(how)):
        # Of a later stage not seed + 1, which is another run's.
        torch.manual_seed(folder.recipe.seed + index * STAGE_SEEDS)
        primitives = candidates if how.space == "pdarts" else PRIMITIVES
        modules = build_modules(
            how, dataset, primitives=primitives, layers=stage.layers, device=device
        )
        _run_stage(stage, modules, folder, dataset, console, device)
        if stage.drops is not None:
            candidates = surviving(modules.arch(), candidates, stage.drops)
    if how.space == "pdarts":
        genotype = derive_restricted_genotype(modules.arch(), candidates, how.progressive.max_skips)
    else:
        genotype = derive_genotype(modules.arch(), modules.arch.primitives)
    return genotype, modules.gan.generator if modules.gan is not None else None


def _run_stage(
    stage: SearchStage,
    modules: SearchModules,
    folder: RunFolder,
    dataset: Dataset,
    console: Console,
    device: torch.device,
) -> None:
    """Runs the rounds of a stage, from where its checkpoint stands."""
    recipe = folder.recipe
    data = recipe.data
    train, validation = search_split(
        dataset, data.search_images, recipe.seed, data.search_fractions
    )
    optimizer = build_search(recipe, dataset, train, validation, modules, device=device)
    rounds = search_rounds(recipe.search, len(train))
    per_epoch = len(train) // recipe.search.batch_size
    epochs, frozen = math.ceil(rounds / per_epoch), recipe.search.architecture.warmup_epochs
    every = recipe.search.gradient_terms_every
    detector = (
        CollapseDetector(game=recipe.search.generator.name) if recipe.detect_collapse else None
    )
    phase = Phase(
        folder,
        stage.name,
        optimizer,
        rounds=rounds,
        save_every=recipe.checkpoint_every,
        phases=phases_of(recipe),
    )
    snapshots = snapshot_rounds(rounds) if modules.gan is not None else frozenset()
    timings = Timings(folder.path, stage.name, optimizer, device)
    with PhaseProgress(console, stage.name, rounds, optimizer.round) as progress:
        while optimizer.round < rounds:
            if stage.skip_dropout:
                probability = skip_drop_probability(
                    stage.skip_dropout, optimizer.round // per_epoch, epochs=epochs, frozen=frozen
                )
                for module in modules:
                    if module is not None:
                        set_skip_drop_probability(module, probability)
            record = phase.step()
            if record is None:
                continue
            entry = _search_entry(
                stage.name,
                record,
                modules,
                with_alpha=record.round == 1 or phase.is_due(record.round),
            )
            if every and record.round % every == 0:
                entry["gradient_terms"] = gradient_terms(optimizer)
            if modules.gan is not None and folder.writes and record.round in snapshots:
                path = folder.samples / f"{stage.name}-{record.round:06d}.png"
                with folder.attempting(path.name):
                    save_snapshot(modules.gan.generator, dataset, path, device)
            if folder.writes and phase.is_due(record.round):
                with folder.attempting(TIMINGS):
                    timings.write()
            phase.finish_round(record, entry, loss=record.losses.get("arch"))
            if detector is not None:
                _warn_of_collapse(detector, record, modules)
            shown = {}
            if "arch" in record.losses:  # the architecture may rest in the first epochs
                shown["validation error %"] = 100.0 * (1.0 - record.metrics["arch"]["accuracy"])
            progress.update(
                record.round,
                record.losses,
                shown,
                cells=lambda: derive_genotype(modules.arch(), modules.arch.primitives),
            )


def _warn_of_collapse(detector: CollapseDetector, record: Record, modules: SearchModules) -> None:
    genotype = derive_genotype(modules.arch(), modules.arch.primitives)
    for text in detector.update(observe(record, genotype)):
        warnings.warn(f"Round {record.round}: {text}", NumbersWarning, stacklevel=2)


def _search_entry(
    stage: str, record: Record, modules: SearchModules, *, with_alpha: bool
) -> dict[str, Any]:
    entry = {"phase": stage, **entry_of(record)}
    if with_alpha:
        entry["alpha"] = {
            kind: _rounded(weights) for kind, weights in modules.arch()._asdict().items()
        }
    if record.round == 1:
        entry["candidates"] = asdict(as_candidates(modules.arch.primitives, modules.arch.nodes))
    return entry


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in values.detach().tolist()]
