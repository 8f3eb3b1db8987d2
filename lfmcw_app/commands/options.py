"""The options that command lines share, and what their values mean.

`--help` imports this module, but not torch. Functions that need torch import it themselves.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfmcw_app.errors import InputError
from lfmcw_app.names import FOLDER, PRESETS, RANDOM
from lfmcw_app.run_files import KEEP

if TYPE_CHECKING:
    import torch

__all__ = [
    "DATASET_HELP", "check_keep", "check_no_trial", "complete_dataset", "completing",
    "default_threads", "fresh_folder", "given_settings", "pick_device", "place", "set_threads",
]  # fmt: skip

# The tables with these names need torch, which takes ten times as long to import as `--help` takes
# to print. A test compares the names.
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagenet")
SPACES = ("darts", "pdarts", "pcdarts", "s1", "s2", "s3", "s4", "nasbench201")
RUNS = Path("runs")


def all_spaces() -> list[str]:
    """The application's search spaces, then those of other packages. None is loaded."""
    others = [point.name for point in entry_points(group="lfmcw_app.spaces")]
    return list(dict.fromkeys([*SPACES, *others]))


DATASET_HELP = (
    f"Data set: {', '.join(DATASETS)}, folder:PATH (your own images), random:NAME "
    "(noise in its shape)."
)


def completing(*values: str) -> Callable[[str], list[str]]:
    """Completes the beginning of one of some values, for the shell."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


complete_dataset = completing(*DATASETS, FOLDER, RANDOM)

PresetOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing(*PRESETS),
        help="Recipe: smoke, small, paper (its Tables 6 and 7) or original (the original methods' "
        "programs). By default smoke for digits; small for fashion-mnist, for small folders and "
        "without a GPU; otherwise paper.",
    ),
]
OrderOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing("first", "second"),
        help="first drops the implicit terms (DARTS-1st), second keeps them. By default as in the "
        "recipe.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing("lfmcw", "darts", "random"),
        help="lfmcw; darts: the baseline without W1 and the generator; random: no search. By "
        "default as in the recipe.",
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
    Path | None, typer.Option(help="YAML file with any part of a recipe; it overrides the preset.")
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
    typer.Option(help="Seed of split, initial values and noise. By default as in the recipe."),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Run folder, new or empty. By default a new one under runs/.")
]
ResumeOption = Annotated[
    Path | None, typer.Option(help="Resumes the interrupted run in this folder.")
]
InitOption = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        help="Starts from the weights of this run instead of random ones: run uses those of its "
        "search, evaluate those of its trained network.",
    ),
]
LookupOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Table of all cells of the space (a CSV file of this program, or NATS-Bench's). The "
        "test error is looked up there, and no network is trained.",
    ),
]
DataOption = Annotated[Path, typer.Option(help="Folder of data files.")]
DEVICE_HELP = "cpu, cuda, or auto: cuda if there is a GPU."
DeviceOption = Annotated[
    str, typer.Option(autocompletion=completing("auto", "cpu", "cuda"), help=DEVICE_HELP)
]
ProjectedDeviceOption = Annotated[
    str,
    typer.Option(
        autocompletion=completing("auto", "cpu", "cuda", "meta"),
        help=f"{DEVICE_HELP} With --dry-run also meta: projects the memory on a GPU without having "
        "one.",
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", help="Prints only errors; the result is in the run folder."),
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
        autocompletion=completing(*KEEP),
        help="What to keep of a complete run. all: everything; metrics: no checkpoints, weights "
        "and pictures; results: no metrics.jsonl either. Pictures are drawn only with all.",
    ),
]
MaxStepsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="A trial: projects the whole run, then makes this many rounds of each phase, without "
        "warm-ups.",
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
        help="CPU threads. By default one for the presets smoke and small, otherwise one per core.",
    ),
]


# ------------------------------ what their values mean


def given_settings(
    assign: Sequence[str] | None, paths: Mapping[str, Path | None]
) -> dict[str, Any]:
    """Dotted key → value of --set, and of options that name a path.

    Args:
        assign: of --set.
        paths: key → the path of its option; None if it was not given.

    Raises:
        InputError: naming an assignment that is none, or that contradicts one of the options.
    """
    from lfmcw_app.recipe_loading import parsed_settings, with_options

    of_options = {key: None if path is None else str(path) for key, path in paths.items()}
    return with_options(parsed_settings(assign or ()), of_options)


def check_no_trial(max_steps: int | None) -> None:
    """Refuses --max-steps beside --resume.

    Raises:
        InputError: if it is given.
    """
    if max_steps is not None:
        raise InputError("--max-steps starts a separate trial; drop it to resume with --resume.")


def check_keep(name: str) -> None:
    """Checks the --keep option.

    Raises:
        InputError: for an unknown name.
    """
    from mlo.errors import nearest

    if name not in KEEP:
        raise InputError(f"Unknown --keep {name!r}. {nearest(name, list(KEEP))}")


def check_outside(dataset: str, *places: Path) -> None:
    """Checks that runs are not made among the images: these would have one more class.

    Args:
        dataset: name of the data set, such as folder:PATH.
        places: folders that will be written.

    Raises:
        InputError: naming one that is in the folder of the images.
    """
    if not dataset.startswith(FOLDER):
        return
    images = Path(os.path.expanduser(dataset.removeprefix(FOLDER))).resolve()
    for path in places:
        if path.resolve().is_relative_to(images):
            raise InputError(
                f"{path} is in the folder of the images ({images}), where it would be read as one "
                "more class. Name a folder outside of it with --out, or start in another folder."
            )


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
        path = RUNS / (f"{name}-{stamp}-{count}" if count > 1 else f"{name}-{stamp}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # several runs may start in one second
            continue
        except OSError as error:
            raise InputError(
                f"The run folder {path} cannot be made ({error.strerror or error}). Name another "
                "folder with --out."
            ) from None
        return path
    raise AssertionError


def pick_device(name: str, *, counts: bool = False) -> torch.device:
    """Reads the --device option.

    Args:
        name: its value.
        counts: whether the meta device is enough, because only memory is wanted.

    Raises:
        InputError: for an unknown device, CUDA where there is none, or meta where numbers are
            needed.
    """
    import torch

    if name == "meta" and counts and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--device meta counts the memory of one process. Run it without torchrun, with one "
            "process's share of each batch (search.batch_size, evaluation.batch_size)."
        )
    if name == "meta" and counts:
        return torch.device("meta")
    if name == "meta":
        raise InputError(
            "--device meta has shapes but no numbers. It serves lfmcw_app.run and "
            "lfmcw_app.evaluate with --dry-run, to count memory. Use cpu, cuda or auto."
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or auto, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: this machine (or this build of PyTorch) has no CUDA. Use --device cpu."
        )
    return torch.device(name)


def default_threads(preset: str) -> int | None:
    """CPU threads for a preset: one for small presets, otherwise PyTorch's choice (None).

    Small presets gain nothing from more threads. If other work needs the cores, more threads cost
    them much time, because threads that wait for one another spin (docs/benchmarks.md).
    """
    return 1 if preset in ("smoke", "small") else None


def set_threads(threads: int | None, preset: str) -> None:
    """Sets the number of CPU threads to `threads`, or to the default of the preset."""
    import torch

    number = threads or default_threads(preset)
    if number is not None:
        torch.set_num_threads(number)
