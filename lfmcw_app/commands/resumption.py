"""The options beside --resume, which change the run's recipe if they may."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfmcw_app.bounded_files import read_object
from lfmcw_app.data import check_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.lookup import with_table_digest
from lfmcw_app.names import FOLDER
from lfmcw_app.recipe_loading import changed_recipe, with_options
from lfmcw_app.run_files import DATASET, EVALUATED
from lfmcw_app.run_folder import RunFolder

__all__ = ["resumed_folder"]


def resumed_folder(
    path: Path,
    *,
    searches: bool,
    dataset: str | None,
    config: Path | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    out: Path | None,
) -> RunFolder:
    """Opens the folder of --resume, with the recipe that the other options ask for.

    Options that repeat the run's recipe change nothing, so the command that started the run can be
    repeated.

    Args:
        path: the run folder.
        searches: whether a search is resumed, not the evaluation of a given genotype.
        dataset: the argument DATASET.
        config: the option --config.
        options: dotted key → value of other options that set a key; None if not given.
        settings: dotted key → value of single settings.
        out: the option --out.

    Raises:
        InputError: if there is no such run in the folder, if a fixed setting would change, or if
            options contradict each other.
    """
    folder = RunFolder.open(path)
    evaluated = (path / EVALUATED).exists()
    if searches and evaluated:
        raise InputError(
            f"{path} holds the evaluation of a given genotype, which has no search to resume. "
            f"Resume it with python -m lfmcw_app.evaluate --resume {shlex.quote(str(path))}"
        )
    if not searches and not evaluated:
        raise InputError(
            f"{path} holds no evaluation of a given genotype (no {EVALUATED}). If it is a search, "
            f"resume it with python -m lfmcw_app.run --resume {shlex.quote(str(path))}"
        )
    if out is not None and out.resolve() != path.resolve():
        raise InputError(f"--resume {path} resumes in its own folder; drop --out {out}.")
    if dataset is not None:
        check_dataset(dataset)
    given = with_options(settings, {**options, "dataset": dataset})
    wanted = changed_recipe(folder.recipe, config=config, overrides=given)
    names_data = "dataset" in given or wanted.dataset != folder.recipe.dataset
    if not names_data and (place := _place(folder)) is not None:
        given["dataset"] = place
        wanted = changed_recipe(folder.recipe, config=config, overrides=given)
    folder.change(with_table_digest(wanted), searches=searches)
    return folder


def _place(folder: RunFolder) -> str | None:
    """Where the folder of images of a run is, if its name leads elsewhere from here."""
    name = folder.recipe.dataset
    try:
        described = read_object(folder.path / DATASET)
        began = Path(described["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # not yet written, or of data that are not in a folder
    here = Path(os.path.expanduser(name.removeprefix(FOLDER))).resolve()
    if not name.startswith(FOLDER):
        return None
    if began.is_dir():
        return None if began == here else f"{FOLDER}{began}"
    if here.is_dir():
        return None  # run and images were moved together
    raise InputError(
        f"The images of the run in {folder.path} were in {began}, which no longer exists. If "
        "they have moved, name the new place: folder:PATH --resume "
        f"{shlex.quote(str(folder.path))}"
    )
