"""Reads the data set of a recipe, and refuses what does not fit it before a run folder is made."""

from __future__ import annotations

from pathlib import Path

from lfmcw_app.budget import check_budget
from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import Dataset, load_dataset, search_counts
from lfmcw_app.errors import InputError
from lfmcw_app.problems import search_rounds
from lfmcw_app.processes import main_first
from lfmcw_app.recipe import Recipe
from lfmcw_app.search_space.stem import image_divisor
from lfmcw_app.stages import search_stages
from lfmcw_app.training import training_images, training_rounds
from mlo.randomness import preserved

__all__ = ["read_data"]


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
        modules = build_modules(how, dataset, layers=search_stages(how)[0].layers)
        check_budget(recipe, dataset, modules.arch.primitives)


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
