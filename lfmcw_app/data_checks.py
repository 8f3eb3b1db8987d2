"""Reads the data set of a recipe, and refuses what does not fit it before a run folder is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lfmcw_app.blank_data import blank
from lfmcw_app.budget import check_budget
from lfmcw_app.build_modules import build_modules
from lfmcw_app.class_checks import check_classes
from lfmcw_app.conditions import describe_conditions
from lfmcw_app.data import Dataset, subset_places
from lfmcw_app.errors import InputError
from lfmcw_app.image_survey import DecodingOptions
from lfmcw_app.kept_data import reader
from lfmcw_app.memory import enough_memory
from lfmcw_app.names import FOLDER
from lfmcw_app.operation_checks import check_operations
from lfmcw_app.parts import search_part_labels, training_labels
from lfmcw_app.printing import say
from lfmcw_app.problems import search_rounds
from lfmcw_app.processes import main_first
from lfmcw_app.recipe import MOST_ROUNDS, Augmentation, Recipe
from lfmcw_app.recipe_loading import preset_recipe, validate_recipe
from lfmcw_app.search_space.stem import image_divisor
from lfmcw_app.sizes import check_sizes
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import WARMUP, phases_of, search_stages
from lfmcw_app.training import training_rounds
from mlo.randomness import preserved

__all__ = ["adaptations", "describe_parts", "fitted", "read_and_tell", "read_data"]


def read_data(
    recipe: Recipe,
    root: Path,
    *,
    searches: bool = True,
    device: torch.device | None = None,
) -> tuple[Recipe, Dataset]:
    """Reads the data set of a recipe at its image size, and fits the recipe to it.

    Args:
        recipe: the recipe.
        root: folder of data files.
        searches: whether a search is to run, not only the training of a derived network.
        device: where it is to run; by default the CPU.

    Returns:
        The recipe, whose batches may be smaller (`fits_batch`), and the data set.

    Raises:
        InputError: if it cannot be read, or has fewer images than a batch of the recipe; or if an
            operation of another package cannot be used.
    """
    # Arithmetic refuses what cannot fit: once before anything is read, and again when the sizes of
    # the images are known.
    device = device or torch.device("cpu")
    names = space_named(recipe.search.space).operations(recipe.search) if searches else ()
    searches = searches and recipe.search.method != "random"
    check_operations(names, recipe, searches=searches)
    least = (recipe.data.image_size or 8) if recipe.dataset.startswith(FOLDER) else 8
    check_sizes(recipe, image_size=least, device=device, searches=searches)
    how = recipe.data

    def read(in_memory: bool | None) -> Dataset:
        return reader()(
            recipe.dataset,
            root,
            how.image_size,
            in_memory=in_memory,
            groups=how.groups,
            options=DecodingOptions.of(how),
        )

    with enough_memory("data", recipe, device), main_first():
        if device.type == "meta":
            files = partial(read, False)
            dataset = blank(recipe.dataset, how.image_size, in_memory=how.in_memory, read=files)
        else:
            dataset = read(how.in_memory)
    check_sizes(
        recipe,
        image_size=dataset.image_size,
        image_channels=dataset.channels,
        classes=dataset.num_classes,
        device=device,
        searches=searches,
    )

    # Settings that do not fit the data are refused here, before a run folder is made.
    labels = _labels(recipe, dataset, searches=searches)
    counts = {part: len(of_part) for part, of_part in labels.items()}
    recipe = _fitted(recipe, counts)
    for key, batch, images in _batches(recipe, counts):
        if images < 2:
            raise InputError(
                f"{key.partition('.')[0]} has {'no image' if images == 0 else 'a single image'} "
                f"of {dataset.name} to draw from, and a batch needs at least two. Use more images "
                "(data.search_images, data.search_fractions, data.train_images)."
            )
        if images < batch:
            raise InputError(
                f"{key} is {batch}, but the recipe leaves only {images} images of {dataset.name} "
                f"to draw from. Set {key}={images} or less, or use more images "
                "(data.search_images, data.train_images)."
            )
    matched = recipe.search.method == "lfmcw" and recipe.search.validation_batch == "matched"
    check_classes(dataset, labels, matched=matched)
    if searches:
        _check_search(recipe, dataset, counts["D_tr"])
    if recipe.trains:
        _check_training(recipe, dataset)
    return recipe, dataset


def read_and_tell(
    console: Console,
    recipe: Recipe,
    root: Path,
    *,
    searches: bool = True,
    device: torch.device | None = None,
) -> tuple[Recipe, Dataset]:
    """Does what `read_data` does, and says what was read and adapted.

    Args:
        console: where messages are printed.
        recipe: the recipe.
        root: folder of data files.
        searches: whether a search is to run, not only the training of a derived network.
        device: where it is to run; by default the CPU.

    Raises:
        InputError: as `read_data` does.
    """
    fitting, dataset = read_data(recipe, root, searches=searches, device=device)
    parts = describe_parts(fitting, dataset, searches=searches)
    adapted = adaptations(recipe, fitting, dataset, searches=searches)
    for said in (dataset.summary, *parts, *adapted):
        say(console, said)
    return fitting, dataset


def _labels(recipe: Recipe, dataset: Dataset, *, searches: bool) -> dict[str, Tensor]:
    """The labels of the images of every part that a run uses."""
    test = dataset.test.labels
    labels = {
        "training": training_labels(recipe, dataset),
        "test": test[subset_places(test, recipe.data.test_images, recipe.seed)],
    }
    if searches:
        labels["D_tr"], labels["D_val"] = search_part_labels(recipe, dataset)
    return labels


def _batches(recipe: Recipe, counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The key of the batch size, its value and the number of images, for search and training.

    Args:
        recipe: the recipe.
        counts: part → its number of images; D_tr and D_val only where there is a search.
    """
    found = []
    if recipe.trains:
        found += [("evaluation.batch_size", recipe.evaluation.batch_size, counts["training"])]
    if "D_tr" in counts:
        searched = min(counts["D_tr"], counts["D_val"])
        found.insert(0, ("search.batch_size", recipe.search.batch_size, searched))
        batch = recipe.search.generator.warmup_batch_size
        if batch is not None and WARMUP in phases_of(recipe):
            found.append(("search.generator.warmup_batch_size", batch, counts["D_tr"]))
    return found


def fitted(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with batches shrunk to the number of images, if it lets them shrink.

    Processes share a batch equally.
    """
    searches = recipe.search.method != "random"
    labels = _labels(recipe, dataset, searches=searches)
    return _fitted(recipe, {part: len(of_part) for part, of_part in labels.items()})


def _fitted(recipe: Recipe, counts: Mapping[str, int]) -> Recipe:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    tree = recipe.model_dump(mode="json", by_alias=True)
    for key, batch, images in _batches(recipe, counts):
        phase, *within, name = key.split(".")
        section = tree[phase]
        for part in within:
            section = section[part]
        fitting = images // size * size
        if tree[phase]["fits_batch"] and 2 <= fitting < batch:
            section[name] = fitting
    return validate_recipe(tree)


def describe_parts(recipe: Recipe, dataset: Dataset, *, searches: bool = True) -> list[str]:
    """Says how many images each part of a run uses, and for what.

    Args:
        recipe: fitted to the data.
        dataset: whose images they are.
        searches: whether a search is to run.
    """
    searches = searches and recipe.search.method != "random"
    labels = _labels(recipe, dataset, searches=searches)
    counts = {part: f"{len(of_part):,}" for part, of_part in labels.items()}
    said = []
    if searches:
        said.append(
            f"The search learns from {counts['D_tr']} images (D_tr), and {counts['D_val']} others "
            "(D_val) decide which cell it chooses."
        )
    if recipe.trains:
        sizes = {part: len(of_part) for part, of_part in labels.items()}
        whole = searches and sizes["training"] == sizes["D_tr"] + sizes["D_val"]
        images = f"{counts['training']} images"
        said.append(
            f"The network {'of that cell ' if searches else ''}is trained on "
            f"{f'both parts together ({images})' if whole else images} and tested on "
            f"{counts['test']} others."
        )
    return [" ".join(said)] if said else []


def adaptations(
    asked: Recipe, recipe: Recipe, dataset: Dataset, *, searches: bool = True
) -> list[str]:
    """Says what was adapted to the number of images.

    Args:
        asked: the recipe as requested.
        recipe: what `read_data` made of it.
        dataset: whose images they are.
        searches: whether a search is to run.
    """
    searches = searches and recipe.search.method != "random"
    labels = _labels(recipe, dataset, searches=searches)
    counts = {part: len(of_part) for part, of_part in labels.items()}
    said = [
        f"{key} is {now} instead of {before}: there are only {images} images to draw from."
        for (key, before, _), (_, now, images) in zip(
            _batches(asked, counts), _batches(recipe, counts), strict=True
        )
        if now != before
    ]
    used = {"training": len(dataset.train), "test": len(dataset.test)}
    fewer = [
        f"{counts[part]:,} of {there:,} {part} images"
        for part, there in used.items()
        if counts[part] < there
    ]
    if searches and counts["D_tr"] + counts["D_val"] < used["training"]:
        fewer.append(f"{counts['D_tr'] + counts['D_val']:,} for the search")
    said += _beyond_the_data(recipe, dataset, searches=searches)
    if conditions := describe_conditions(recipe, dataset):
        said.append(conditions)
    if fewer:
        said.append(f"The recipe does not use all images: {', '.join(fewer)}.")
    if not recipe.trains:
        return said
    how = recipe.evaluation
    per_epoch = counts["training"] // how.batch_size
    rounds = training_rounds(how, per_epoch)
    if how.epochs is not None and how.steps is None and rounds > how.epochs * per_epoch:
        said.append(
            f"The training has {rounds // per_epoch:,} epochs instead of the recipe's "
            f"{how.epochs:,}: the images are few, so {how.epochs:,} epochs are only "
            f"{how.epochs * per_epoch:,} rounds of a batch each, and evaluation.min_steps is "
            f"{how.min_steps:,}. To keep {how.epochs:,} epochs, give --set evaluation.min_steps=0."
        )
    return said


def _beyond_the_data(recipe: Recipe, dataset: Dataset, *, searches: bool) -> list[str]:
    """Says what was asked for and the data do not have; presets ask for as much as they can use."""
    how, usual = recipe.data, preset_recipe(recipe)
    there = {
        "image_size": dataset.image_size,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        **({"search_images": len(dataset.train)} if searches else {}),
    }
    said = []
    for name, most in there.items():
        asked = getattr(how, name)
        if asked is None or asked <= most or (usual and asked == getattr(usual.data, name)):
            continue
        enlarged = "the images have {:,} pixels: none is enlarged"
        has = enlarged if name == "image_size" else "there are only {:,}"
        said.append(f"data.{name} is {asked:,}, and {has.format(most)}.")
    return said


def _check_rounds(key: str, rounds: int) -> None:
    """Refuses what would never end; the keys alone are bounded in the recipe."""
    if rounds > MOST_ROUNDS:
        raise InputError(
            f"{key}.epochs asks for {rounds:,} rounds, and a phase has {MOST_ROUNDS:,} at most. "
            "Lower it."
        )


def _check_augmentation(key: str, how: Augmentation, dataset: Dataset) -> None:
    """Refuses changes that could leave nothing of an image."""
    size = dataset.image_size
    if how.cutout >= size:
        raise InputError(
            f"{key}.augmentation.cutout is {how.cutout}, which would erase images of {size} "
            "pixels. Lower it."
        )
    if how.crop_padding >= size:
        raise InputError(
            f"{key}.augmentation.crop_padding is {how.crop_padding}, with which a crop could miss "
            f"images of {size} pixels. Lower it."
        )


def _check_search(recipe: Recipe, dataset: Dataset, images: int) -> None:
    """Builds what the search will need, and refuses a warm-up that lasts as long as the search.

    Args:
        recipe: the recipe.
        dataset: what is searched on.
        images: number of images of D_tr.

    Raises:
        InputError: naming the key that does not fit.
    """
    how = recipe.search
    rounds, per_epoch = search_rounds(how, images), images // how.batch_size
    _check_rounds("search", rounds)
    _check_augmentation("search", how.augmentation, dataset)
    warmups = {
        "architecture": how.architecture.warmup_epochs,
        "weights": how.weights.warmup_epochs,
    }
    each = " per stage" if len(search_stages(how)) > 1 else ""
    for key, warmup in warmups.items():
        if warmup * per_epoch >= rounds:
            raise InputError(
                f"search.{key}.warmup_epochs ({warmup} epochs of {per_epoch} rounds) lasts as long "
                f"as the search ({rounds} rounds{each}). "
                "Lower it, or search longer."
            )

    # Modules check that their settings fit the images; the random state is left as it was.
    with preserved(), enough_memory("search", recipe, torch.device("cpu")):
        build_modules(how, dataset, layers=search_stages(how)[0].layers)
    check_budget(recipe, dataset, space_named(how.space).candidates(how))


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
    per_epoch = len(training_labels(recipe, dataset)) // how.batch_size
    _check_rounds("evaluation", training_rounds(how, per_epoch))
    _check_augmentation("evaluation", how.augmentation, dataset)
    if how.weights.warmup_epochs * per_epoch >= training_rounds(how, per_epoch):
        raise InputError(
            f"evaluation.weights.warmup_epochs ({how.weights.warmup_epochs}, of {per_epoch} "
            "rounds) must be below "
            f"{'evaluation.epochs' if how.steps is None else 'evaluation.steps'} "
            f"({how.epochs or how.steps})."
        )
