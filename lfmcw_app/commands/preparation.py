"""What `run` and `evaluate` do between their options and their work: read data, check, project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from lfmcw_app.compilation import compile_options
from lfmcw_app.data import Dataset
from lfmcw_app.data_checks import read_and_tell
from lfmcw_app.memory_projection import count_memory, print_memory
from lfmcw_app.printing import say
from lfmcw_app.projection import after_projection, print_choice, project
from lfmcw_app.recipe import Recipe
from lfmcw_app.search_space.genotype import Cells

__all__ = ["Check", "prepared"]

Check = Callable[[Recipe, Dataset], str]
"""Refuses a run on these images, or returns what is to be said of it; empty: nothing."""


def prepared(
    recipe: Recipe,
    data: Path,
    target: torch.device,
    console: Console,
    *,
    preset_chosen: bool,
    dry_run: bool,
    max_steps: int | None,
    checks: Sequence[Check] = (),
    genotype: Cells | None = None,
) -> tuple[Recipe, Dataset] | None:
    """Reads a run's images, checks that they fit, and projects the run if that is wanted.

    Args:
        recipe: of the run.
        data: folder of the data sets.
        target: where it is computed; "meta" counts the memory instead.
        console: where messages are printed.
        preset_chosen: whether the preset was found for the data, so that the choice is explained.
        dry_run: whether to stop after the projection.
        max_steps: rounds of each phase of a trial; None: the whole run.
        checks: are made once the images are read, before anything is written.
        genotype: the cells of a training alone; None: a run with its search.

    Returns:
        The recipe to run, and its images; None if there is nothing to run.

    Raises:
        InputError: if data or recipe cannot be used.
    """
    searches = genotype is None
    if not dry_run:
        say(console, f"Reading {recipe.dataset} …")
    recipe, images = read_and_tell(console, recipe, data, searches=searches, device=target)
    if preset_chosen and not (dry_run or max_steps):
        print_choice(recipe, images, target, console, searches=searches)
    if searches:
        compile_options(recipe.search)  # refused before a folder is made
    for check in checks:
        if told := check(recipe, images):
            say(console, told)
    if target.type == "meta":
        counted = count_memory(recipe, images, searches=searches, genotype=genotype)
        print_memory(recipe, counted, console)
        return None
    measure = partial(project, recipe, images, target, searches=searches, genotype=genotype)
    planned = after_projection(recipe, measure, console, dry_run=dry_run, max_steps=max_steps)
    return None if planned is None else (planned, images)
