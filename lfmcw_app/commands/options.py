"""The options that command lines share, and what their values mean.

`--help` imports this module and no torch. What needs torch imports it by itself.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfmcw_app.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DATASET_HELP", "check_keep", "check_no_trial", "complete_dataset", "completing",
    "default_threads", "fresh_folder", "pick_device", "place", "set_threads", "with_lookup",
]  # fmt: skip

# What has these names needs torch, which takes ten times as long to import as `--help` takes to
# print. A test compares them.
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagenet")
PRESETS = ("smoke", "small", "paper", "original")
SPACES = ("darts", "pdarts", "pcdarts", "s1", "s2", "s3", "s4", "nasbench201")
KEPT = ("all", "metrics", "results")


def all_spaces() -> list[str]:
    """The application's search spaces, then those of other packages; none is loaded."""
    others = [point.name for point in entry_points(group="lfmcw_app.spaces")]
    return list(dict.fromkeys([*SPACES, *others]))


DATASET_HELP = (
    f"Data set: {', '.join(DATASETS)}, folder:PATH (your own images), random:NAME "
    "(noise in its shape)."
)


def completing(*values: str) -> Callable[[str], list[str]]:
    """Completes the beginning of one of some values, for the shell."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


complete_dataset = completing(*DATASETS, "folder:", "random:")

PresetOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing(*PRESETS),
        help="Recipe: smoke, small, paper (its Tables 6 and 7) or original (the original methods' "
        "programs). By default smoke for digits, small for fashion-mnist and for small folders or "
        "without a GPU, else paper.",
    ),
]
OrderOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing("first", "second"),
        help="first drops the implicit terms (DARTS-1st), second keeps them. By default the "
        "recipe's.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing("lfmcw", "darts", "random"),
        help="lfmcw; darts: the baseline without W1 and the generator; random: no search. By "
        "default the recipe's.",
    ),
]
SpaceOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing(*all_spaces()),
        help=f"Search space: {', '.join(all_spaces())}, with the preset's settings for it.",
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option(help="YAML file with any part of a recipe; goes over the preset.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Sets one key, for example search.channels=8. Can be repeated.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(help="Seed of split, initial values and noise. By default the recipe's."),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Run folder, new or empty. By default a new one under runs/.")
]
ResumeOption = Annotated[
    Path | None, typer.Option(help="Resumes what was interrupted in this run folder.")
]
InitOption = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        help="Starts from the weights of this run instead of random ones: run takes those of its "
        "search, evaluate those of its trained network.",
    ),
]
LookupOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Table of all cells of the space (our own CSV, or NATS-Bench's): the test error is "
        "looked up there, and no network is trained.",
    ),
]
DataOption = Annotated[Path, typer.Option(help="Folder of data files.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        autocompletion=completing("auto", "cpu", "cuda", "meta"),
        help="cpu, cuda, or auto: cuda where there is one. With --dry-run also meta: the memory of "
        "a GPU, counted without one.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", help="Prints nothing but errors; the result is in the run folder."),
]
TensorBoardOption = Annotated[
    bool,
    typer.Option(
        "--tensorboard", help="Also writes event files for TensorBoard, in RUN_DIR/tensorboard."
    ),
]
KeepOption = Annotated[
    str,
    typer.Option(
        autocompletion=completing(*KEPT),
        help="Of a complete run: all; metrics: no checkpoints, weights and pictures; results: no "
        "metrics.jsonl either. What is not kept is not drawn.",
    ),
]
MaxStepsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="A trial: so many rounds of each phase, without warm-ups, after a projection of the "
        "whole run.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Projects time and memory from two rounds of each phase, and stops."
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="CPU threads. By default one for the presets smoke and small, else one for each core.",
    ),
]


# ------------------------------ what their values mean


def with_lookup(assign: list[str] | None, lookup: Path | None) -> list[str] | None:
    """The assignments of --set, with that of --lookup."""
    if lookup is None:
        return assign
    return [*(assign or []), f"lookup.file={json.dumps(str(lookup))}"]


def check_no_trial(max_steps: int | None) -> None:
    """Refuses --max-steps beside --resume.

    Raises:
        InputError: if it is given.
    """
    if max_steps is not None:
        raise InputError("--max-steps starts a trial of its own; drop it to resume with --resume.")


def check_keep(name: str) -> None:
    """Checks the --keep option.

    Raises:
        InputError: for an unknown name.
    """
    from mlo.errors import nearest

    if name not in KEPT:
        raise InputError(f"Unknown --keep {name!r}. {nearest(name, KEPT)}")


def place(out: Path | None, name: str) -> Callable[[], Path]:
    """Where a new run folder is made: as --out says, or under runs/."""
    return partial(fresh_folder, name) if out is None else lambda: out


def fresh_folder(name: str) -> Path:
    """Makes a folder under runs/ that no other run has.

    Raises:
        InputError: if it cannot be made.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for count in itertools.count(1):
        path = Path("runs") / (f"{name}-{stamp}-{count}" if count > 1 else f"{name}-{stamp}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # several runs may start in one second
            continue
        except OSError as error:
            raise InputError(
                f"The run folder {path} cannot be made ({error.strerror or error}). Name one that "
                "can with --out."
            ) from None
        return path
    raise AssertionError


def pick_device(name: str, *, counts: bool = False) -> torch.device:
    """Reads the --device option.

    Args:
        name: its value.
        counts: whether the meta device will do, since only memory is asked for.

    Raises:
        InputError: for an unknown device, CUDA where there is none, or meta where numbers are
            needed.
    """
    import torch

    if name == "meta" and counts and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--device meta counts the memory of one process. Run it without torchrun, with the "
            "part of each batch that a process has (search.batch_size, evaluation.batch_size)."
        )
    if name == "meta" and counts:
        return torch.device("meta")
    if name == "meta":
        raise InputError(
            "--device meta has shapes and no numbers: lfmcw_app.run and lfmcw_app.evaluate count "
            "memory on it, with --dry-run. Use cpu, cuda or auto."
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device is cpu, cuda or auto, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: this machine (or this build of PyTorch) has no CUDA. Use --device cpu."
        )
    return torch.device(name)


def default_threads(preset: str) -> int | None:
    """CPU threads of a run of a preset: one for the small ones, else PyTorch's choice (None).

    Small presets gain nothing from more threads. Where other work wants the cores, more threads
    cost them much, since threads that wait for one another spin (docs/benchmarks.md).
    """
    return 1 if preset in ("smoke", "small") else None


def set_threads(threads: int | None, preset: str) -> None:
    """Sets the number of CPU threads to `threads`, or to the default of the preset."""
    import torch

    number = threads or default_threads(preset)
    if number is not None:
        torch.set_num_threads(number)
