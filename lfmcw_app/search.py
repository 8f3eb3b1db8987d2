"""The search of a run, stage by stage; what both halves need of their data; both halves in turn."""

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

from lfmcw_app.build_modules import SearchModules, build_modules
from lfmcw_app.collapse import CollapseDetector, observe
from lfmcw_app.data import Dataset, load_dataset, search_counts, search_split, short_name
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.gradient_terms import gradient_terms
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
from lfmcw_app.training import train_derived, training_images, training_rounds
from mlo import Record
from mlo.randomness import preserved

__all__ = [
    "METHOD_LABELS",
    "SPACE_LABELS",
    "evaluate_genotype",
    "read_data",
    "run",
    "search",
]

STAGE_SEEDS = 1_000_003
"""Between the seeds of two stages. With 1, a later stage would have the seed of another run."""

SPACE_LABELS = {"darts": "DARTS", "pdarts": "P-DARTS", "pcdarts": "PC-DARTS"}
METHOD_LABELS = {"lfmcw": "LFM-CW", "darts": "no LFM-CW", "random": "random cells"}


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

    # Whatever does not fit the data is refused here, before a run folder is made.
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
    _check_training(recipe, dataset)
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
    warmups = {
        "architecture": how.architecture.warmup_epochs,
        "weights": how.weights.warmup_epochs,
    }
    for key, warmup in warmups.items():
        if warmup * per_epoch >= rounds:
            raise InputError(
                f"search.{key}.warmup_epochs ({warmup} epochs of {per_epoch} rounds) lasts as long "
                f"as the search ({rounds} rounds{' a stage' if how.space == 'pdarts' else ''}). "
                "Lower it, or search longer."
            )

    # Modules check that their settings fit the images; the random state is left as it was.
    with preserved():
        build_modules(how, dataset, layers=search_stages(how)[0].layers)


def _check_training(recipe: Recipe, dataset: Dataset) -> None:
    """Refuses settings of the training that do not fit the data.

    Raises:
        InputError: naming the key that does not fit.
    """
    how = recipe.evaluation
    divisor = image_divisor(how.stem)
    if dataset.image_size % divisor:
        raise InputError(
            f"evaluation.stem is {how.stem}, which needs images of a multiple of "
            f"{divisor} pixels; those of {dataset.name} have {dataset.image_size}."
        )
    per_epoch = training_images(recipe, dataset) // how.batch_size
    if how.weights.warmup_epochs * per_epoch >= training_rounds(how, per_epoch):
        raise InputError(
            f"evaluation.weights.warmup_epochs ({how.weights.warmup_epochs}, of {per_epoch} "
            "rounds) must be below "
            f"{'evaluation.epochs' if how.steps is None else 'evaluation.steps'} "
            f"({how.epochs or how.steps})."
        )
    cutout = how.augmentation.cutout
    if cutout >= dataset.image_size:
        raise InputError(
            f"evaluation.augmentation.cutout is {cutout}, which would erase images of "
            f"{dataset.image_size} pixels. Lower it."
        )


def run(
    folder: RunFolder, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Runs both phases, from where the folder's checkpoints stand, and returns the result."""

    def both() -> dict[str, Any]:
        genotype = search(folder, dataset, console, device)
        return train_derived(folder, genotype, dataset, console, device)

    return _completed(folder, dataset, both)


def evaluate_genotype(
    folder: RunFolder, genotype: Genotype, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Trains a given genotype's network, from the folder's checkpoint on; returns the result."""
    return _completed(
        folder, dataset, lambda: train_derived(folder, genotype, dataset, console, device)
    )


def _completed(
    folder: RunFolder, dataset: Dataset, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a folder, from `work` where it has none yet."""
    if folder.result is not None:
        return folder.result
    with folder.locked():
        if folder.writes:
            describe_dataset(dataset, folder)
        return work()


# ------------------------------ search


def search(folder: RunFolder, dataset: Dataset, console: Console, device: torch.device) -> Genotype:
    """Searches a cell; writes genotype.json and its pictures.

    The pictures are cells.png and cells.svg and, with a generator, samples.png and samples/.
    """
    how = folder.recipe.search
    genotype, generator = _searched(folder, dataset, console, device)
    folder.write("genotype.json", genotype.to_json())
    title = f"{SPACE_LABELS[how.space]}, {METHOD_LABELS[how.method]}, {short_name(dataset.name)}"
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

    # A stage of P-DARTS begins with the candidates that the one before left, and with new modules.
    candidates = as_candidates(PRIMITIVES, how.nodes)
    for index, stage in enumerate(search_stages(how)):
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
    how, data = recipe.search, recipe.data
    train, validation = search_split(
        dataset, data.search_images, recipe.seed, data.search_fractions
    )
    optimizer = build_search(recipe, dataset, train, validation, modules, device=device)
    rounds = search_rounds(how, len(train))
    per_epoch = len(train) // how.batch_size
    epochs, frozen = math.ceil(rounds / per_epoch), how.architecture.warmup_epochs

    phase = Phase(
        folder,
        stage.name,
        optimizer,
        label=stage.name,
        rounds=rounds,
        save_every=recipe.checkpoint_every,
        phases=phases_of(recipe),
        device=device,
    )
    detector = CollapseDetector(game=how.generator.name) if recipe.detect_collapse else None
    snapshots = snapshot_rounds(rounds) if modules.gan is not None else frozenset()

    def set_skip_dropout() -> None:
        # A function of the epoch alone, so that a resumed run has the same.
        if stage.skip_dropout:
            epoch = optimizer.round // per_epoch
            probability = skip_drop_probability(
                stage.skip_dropout, epoch, epochs=epochs, frozen=frozen
            )
            for module in modules:
                if module is not None:
                    set_skip_drop_probability(module, probability)

    with PhaseProgress(console, stage.name, rounds, optimizer.round) as progress:
        for record in phase.records(set_skip_dropout):
            with_alpha = record.round == 1 or phase.is_due(record.round)
            entry = _search_entry(stage.name, record, modules, with_alpha=with_alpha)
            if how.gradient_terms_every and record.round % how.gradient_terms_every == 0:
                entry["gradient_terms"] = gradient_terms(optimizer)

            # Before the checkpoint: a run that stops after it does not come back to this round.
            if modules.gan is not None and folder.writes and record.round in snapshots:
                path = folder.samples / f"{stage.name}-{record.round:06d}.png"
                with folder.attempting(path.name):
                    save_snapshot(modules.gan.generator, dataset, path, device)
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
    """What is logged of a round; the candidates name the columns of the alphas that follow."""
    entry = {"phase": stage, **entry_of(record)}
    if with_alpha:
        entry["alpha"] = {
            kind: _rounded(weights) for kind, weights in modules.arch()._asdict().items()
        }
    if record.round == 1:
        entry["candidates"] = asdict(as_candidates(modules.arch.primitives, modules.arch.nodes))
    return entry


def _rounded(values: Tensor) -> list[list[float]]:
    def row(of_edge: list[float]) -> list[float]:
        return [round(value, 6) for value in of_edge]

    return list(map(row, values.detach().tolist()))
