"""A run from a script: `run_search` does what `python -m lfmcw_app.run` does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lfmcw_app.commands.execution import conclude
from lfmcw_app.commands.options import check_outside, pick_device
from lfmcw_app.commands.resumption import resumed_folder
from lfmcw_app.complete_runs import run
from lfmcw_app.data_checks import read_and_tell
from lfmcw_app.errors import InputError, shown
from lfmcw_app.idle_settings import idle_settings
from lfmcw_app.names import FOLDER
from lfmcw_app.printing import say
from lfmcw_app.recipe_loading import merged_settings
from lfmcw_app.resolving import resolve_recipe
from lfmcw_app.run_files import CONFIG
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.stopping import Stopped, saved, stop_signals
from lfmcw_app.usual_torch import usual_torch
from mlo.randomness import preserved

__all__ = ["run_search"]


_running = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    """Refuses a second run at the same time in this process, and restores its random states.

    PyTorch has one random state per process: each run would draw the other's numbers, and neither
    would depend on its recipe alone.
    """
    if not _running.acquire(blocking=False):
        raise InputError(
            "Another run_search is under way in this process, in another thread, and the two would "
            "draw from one random state. Make one run after the other, or each in a process of its "
            "own (concurrent.futures.ProcessPoolExecutor)."
        )
    try:
        with preserved():
            yield
    finally:
        _running.release()


@_alone()
@usual_torch()
def run_search(
    dataset: str | PathLike[str],
    folder: str | PathLike[str],
    *,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    data: str | PathLike[str] = "data",
    device: str | torch.device = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Searches for a cell, trains its network, writes a report; or resumes the run in the folder.

    The run depends on its recipe and data alone. The random states, default dtype, default device
    and autocast of the calling program have no effect on it, and are as before when it returns. A
    process makes one run at a time.

    Args:
        dataset: name of a data set; your own has the name that it was registered by
            (`register_dataset`). A `Path` is a folder of images: Path("pets") is "folder:pets".
        folder: of the run. If it holds a run, that run is resumed, so after an interruption you can
            run the same script again.
        preset: the recipe; by default the one for the data set.
        settings: dotted key of the recipe → value, for example {"search.epochs": 10}.
        seed: of the run; by default the recipe's.
        data: folder of data files.
        device: "cpu", "cuda", or "auto"; or a `torch.device`.
        quiet: whether nothing is printed.

    Returns:
        The content of result.json: the test error, the genotype, and more.

    Raises:
        InputError: if something cannot be used, the data are not those that the run began with, or
            another thread makes a run.
        SystemExit: after SIGTERM or Ctrl-C, when the state is saved.
    """
    for name, given in {"dataset": dataset, "folder": folder, "data": data}.items():
        if not isinstance(given, str | PathLike):
            raise InputError(f"{name} is a name or a path, got {shown(given)}.")
    if not isinstance(settings, Mapping | None):
        raise InputError(f"settings is a mapping of keys to values, got {shown(settings)}.")
    dataset = dataset if isinstance(dataset, str) else f"{FOLDER}{Path(dataset)}"
    path, target = Path(folder), pick_device(str(device))
    console = Console(quiet=quiet)
    opened = None
    if (path / CONFIG).exists():
        opened = resumed_folder(
            path,
            searches=True,
            dataset=dataset,
            config=None,
            options={"preset": preset, "seed": seed},
            settings=settings or {},
            out=None,
        )
        recipe = opened.recipe
    else:
        cuda = target.type == "cuda"
        recipe = resolve_recipe(dataset, preset, None, settings, seed, cuda=cuda)
        check_outside(dataset, path)
        for told in idle_settings(recipe, given=merged_settings(settings or {})):
            say(console, told)

    recipe, images = read_and_tell(console, recipe, Path(data), device=target)
    held = opened or RunFolder.create(path, recipe)
    again = "Run the same script again to resume."
    try:
        with stop_signals(again, begun=held.begun):
            result = run(held, images, console, target)
    except Stopped as stop:
        say(console, f"Stopped; the state is saved. The run resumes from {saved()}. {again}")
        raise SystemExit(stop.exit_code) from None
    conclude(held, result, console)
    return result
