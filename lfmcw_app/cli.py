"""What the command lines have in common: options, and errors as one paragraph with exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from lfmcw_app.data import DATASETS, check_dataset
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.recipe import PRESETS, SPACES, Recipe, is_imagenet, load_recipe
from lfmcw_app.report import REPORT, write_report
from lfmcw_app.result import print_result
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.stopping import Stopped, stop_signals
from lfmcw_app.tensorboard import EventFiles
from mlo.errors import (
    CheckpointError,
    CheckpointWarning,
    ConfigurationError,
    EngineError,
    GraphError,
    NonFiniteError,
    ProblemError,
)

__all__ = [
    "DATASET_HELP",
    "carry_out",
    "check_no_trial",
    "complete_dataset",
    "completing",
    "default_preset",
    "fresh_folder",
    "pick_device",
    "reported_errors",
    "resolve_recipe",
]

USER_ERRORS = (
    InputError,
    CheckpointError,
    ConfigurationError,
    EngineError,
    GraphError,
    NonFiniteError,
    ProblemError,
)

DEFAULT_PRESETS = {"digits": "smoke", "fashion-mnist": "small"}

DATASET_HELP = (
    f"Data set: {', '.join(DATASETS)}, folder:PATH (your own images), random:NAME "
    "(noise in its shape)."
)


# ------------------------------ options


def completing(*values: str) -> Callable[[str], list[str]]:
    """Completes the beginning of one of some values, for the shell."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


complete_dataset = completing(*DATASETS, "folder:", "random:")

PresetOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing(*PRESETS),
        help="Recipe: smoke, small, paper (its Tables 6 and 7) or original (the original methods' "
        "programs). By default smoke for digits, small for fashion-mnist, else paper.",
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
        autocompletion=completing(*SPACES),
        help="Search space: darts, pdarts or pcdarts, with the preset's settings for it.",
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
DataOption = Annotated[Path, typer.Option(help="Folder of data files.")]
DeviceOption = Annotated[
    str,
    typer.Option(
        autocompletion=completing("auto", "cpu", "cuda"),
        help="cpu, cuda, or auto: cuda where there is one.",
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


# ------------------------------ what options mean


def default_preset(dataset: str) -> str:
    """The preset that is meant for a data set."""
    return DEFAULT_PRESETS.get(dataset, "paper")


def resolve_recipe(
    dataset: str,
    preset: str | None,
    config: Path | None,
    assign: list[str] | None,
    seed: int | None,
    *,
    space: str | None = None,
    order: str | None = None,
    method: str | None = None,
) -> Recipe:
    """Makes the recipe of a command line.

    Raises:
        InputError: for an unknown data set, preset or key, or a value of the wrong type or range.
    """
    check_dataset(dataset)
    assigned = {}  # the last of several assignments to a key counts
    for assignment in assign or ():
        key, _, value = assignment.partition("=")
        assigned[key.strip()] = value.strip()

    # The space decides which of the preset's files are read, however it is given.
    set_space = assigned.get("search.space")
    if set_space is not None and space is not None and set_space != space:
        raise InputError(
            f"--space {space} and --set search.space={set_space} contradict each other; drop one."
        )
    space = space or set_space
    if "dataset" in assigned:
        raise InputError("The data set is the argument DATASET; drop --set dataset=….")
    given: dict[str, Any] = {
        "dataset": dataset,
        "search.order": order,
        "search.method": method,
        "seed": seed,
    }
    return load_recipe(
        preset or default_preset(dataset),
        space=space or ("pcdarts" if is_imagenet(dataset) else "darts"),
        config=config,
        overrides={key: value for key, value in given.items() if value is not None},
        assignments=tuple(assign or ()),
    )


def check_no_trial(max_steps: int | None) -> None:
    """Refuses --max-steps beside --resume.

    Raises:
        InputError: if it is given.
    """
    if max_steps is not None:
        raise InputError("--max-steps starts a trial of its own; drop it to go on with --resume.")


def fresh_folder(name: str) -> Path:
    """A folder under runs/ that no other run has."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    # Several runs may start in one second.
    path, count = Path("runs") / f"{name}-{stamp}", 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{name}-{stamp}-{count}"
    return path


def pick_device(name: str) -> torch.device:
    """Reads the --device option.

    Raises:
        InputError: for an unknown device, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device is cpu, cuda or auto, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: this machine (or this build of PyTorch) has no CUDA. Use --device cpu."
        )
    return torch.device(name)


# ------------------------------ carrying out


@contextmanager
def listening(folder: RunFolder, *, tensorboard: bool) -> Iterator[None]:
    """Writes a run's event files while the body runs, if asked to."""
    if not (tensorboard and folder.writes):
        yield
        return
    with closing(EventFiles(folder.path / "tensorboard")) as files:
        folder.listeners.append(files)
        yield


def default_threads(preset: str) -> int | None:
    """CPU threads of a run of a preset: one for the small ones, else PyTorch's choice (None).

    Small presets gain nothing from more threads. Where other work wants the cores, more threads
    cost them much, since threads that wait for one another spin (docs/results.md).

    More cost them much where other work wants the cores, since threads that wait for one another
    spin (docs/results.md).
    """
    return 1 if preset in ("smoke", "small") else None


def set_threads(threads: int | None, preset: str) -> None:
    """Sets the number of CPU threads to `threads`, or to the default of the preset."""
    number = threads or default_threads(preset)
    if number is not None:
        torch.set_num_threads(number)


def carry_out(
    folder: RunFolder,
    console: Console,
    module: str,
    work: Callable[[], dict[str, Any]],
    *,
    tensorboard: bool,
) -> None:
    """Does the work of a run folder, writes its report and prints the result.

    Args:
        folder: of the run.
        console: where it is told.
        module: whose `--resume` resumes it.
        work: returns the result.
        tensorboard: whether event files are written.
    """
    console.print(f"Run folder: {folder.path}", highlight=False, soft_wrap=True, markup=False)
    go_on = f"python -m {module} --resume {folder.path}"
    with stoppable(console, go_on), listening(folder, tensorboard=tensorboard):
        result = work()

    # The result is in the folder already: a report that cannot be written is no failure.
    if folder.writes:
        with folder.attempting(REPORT):
            write_report(folder.path)
        print_result(result, folder, console)


@contextmanager
def reported_errors(console: Console) -> Iterator[None]:
    """Shows a user's error as one paragraph and exits with code 2.

    Other errors are bugs and keep their traceback. Warnings are shown as one paragraph too.

    Warnings are shown as one paragraph too.
    """
    number = int(os.environ.get("RANK", "0"))  # of this process, under torchrun

    def paragraph(kind: str, text: object) -> None:
        console.print(kind, end=" ")
        console.print(
            " ".join(str(text).split()),
            highlight=False,
            markup=False,
            soft_wrap=not console.is_terminal,
        )

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if number == 0:  # the others warn of the same
            paragraph("[bold yellow]Warning:[/]", message)

    with warnings.catch_warnings():
        # Each of these is news, although its words may be the same.
        for category in (CheckpointWarning, NumbersWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = shown
        try:
            yield
        except USER_ERRORS as error:
            paragraph(f"[bold red]Error{f' in process {number}' if number else ''}:[/]", error)
            raise typer.Exit(2) from None


@contextmanager
def stoppable(console: Console, command: str) -> Iterator[None]:
    """Ends the body at SIGTERM (exit code 0) or SIGINT (130), and says how to resume.

    Args:
        console: where it is said.
        command: resumes the run.
    """

    def go_on(what: str) -> None:
        console.print(
            f"{what} Go on with: {command}", highlight=False, soft_wrap=True, markup=False
        )

    try:
        with stop_signals(f"Go on with: {command}"):
            yield
    except Stopped as stop:
        what = "Interrupted" if stop.exit_code else "Stopped"
        go_on(f"{what}; the state is saved.")
        raise typer.Exit(stop.exit_code) from None
    except KeyboardInterrupt:
        go_on("Interrupted at once; the last checkpoint stands.")
        raise typer.Exit(130) from None


def main(command: Callable[..., None]) -> None:
    """Runs a function as a command line, with `--install-completion` for the shell."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
