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
from lfmcw_app.recipe import PRESETS, SPACES, Recipe, load_recipe, parse_yaml
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
    "complete_dataset",
    "completing",
    "default_preset",
    "fresh_folder",
    "key_value",
    "listening",
    "pick_device",
    "reported_errors",
    "resolve_recipe",
    "stoppable",
]

USER_ERRORS = (
    InputError, CheckpointError, ConfigurationError, EngineError, GraphError, NonFiniteError, ProblemError,
)  # fmt: skip

DEFAULT_PRESETS = {"digits": "smoke", "fashion-mnist": "small"}

DATASET_HELP = f"Data set: {', '.join(DATASETS)}, folder:PATH (your own images), random:NAME (noise in its shape)."


def completing(*values: str) -> Callable[[str], list[str]]:
    """Completes the beginning of one of some values, for the shell."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


complete_dataset = completing(*DATASETS, "folder:", "random:")

PresetOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing(*PRESETS),
        help="Recipe: smoke, small, paper (its Tables 6 and 7) or original (the original methods' programs). By default "
        "smoke for digits, small for fashion-mnist, else paper.",
    ),
]
OrderOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing("first", "second"),
        help="first drops the implicit terms (DARTS-1st), second keeps them. By default the recipe's.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing("lfmcw", "darts", "random"),
        help="lfmcw; darts: the baseline without W1 and the generator; random: no search. By default the recipe's.",
    ),
]
SpaceOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=completing(*SPACES),
        help="Search space: darts, pdarts or pcdarts, with the preset's settings for it.",
    ),
]
ConfigOption = Annotated[Path | None, typer.Option(help="YAML file with any part of a recipe; goes over the preset.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Sets one key, for example search.channels=8. Can be repeated."),
]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of split, initial values and noise. By default the recipe's.")
]
DataOption = Annotated[Path, typer.Option(help="Folder of data files.")]
DeviceOption = Annotated[
    str,
    typer.Option(autocompletion=completing("auto", "cpu", "cuda"), help="cpu, cuda, or auto: cuda where there is one."),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="Prints nothing but errors; the result is in the run folder.")
]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Also writes event files for TensorBoard, in RUN_DIR/tensorboard.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. By default one for each core.")]


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
    given_space = [a.partition("=")[2].strip() for a in assign or () if a.partition("=")[0].strip() == "search.space"]
    if given_space and space is not None and given_space[-1] != space:
        raise InputError(f"--space {space} and --set search.space={given_space[-1]} contradict each other; drop one.")
    space = space or (given_space[-1] if given_space else None)
    if any(assignment.partition("=")[0].strip() == "dataset" for assignment in assign or ()):
        raise InputError("The data set is the argument DATASET; drop --set dataset=….")
    given: dict[str, Any] = {"dataset": dataset, "search.order": order, "search.method": method, "seed": seed}
    return load_recipe(
        preset or default_preset(dataset),
        space=space or ("pcdarts" if dataset in ("imagenet", "random:imagenet") else "darts"),
        config=config,
        overrides={key: value for key, value in given.items() if value is not None},
        assignments=tuple(assign or ()),
    )


def key_value(setting: str, option: str) -> tuple[str, Any]:
    """Reads KEY=VALUE, the value in YAML.

    Raises:
        InputError: naming the option.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{option} takes KEY=VALUE, got {setting!r}.")
    try:
        return key.strip(), parse_yaml(text)
    except ValueError:
        raise InputError(f"The value in {option} {setting!r} is not valid YAML.") from None


def fresh_folder(name: str) -> Path:
    """A folder under runs/ that no other run has."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
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
        raise InputError("--device cuda: this machine (or this build of PyTorch) has no CUDA. Use --device cpu.")
    return torch.device(name)


@contextmanager
def listening(folder: RunFolder, *, tensorboard: bool) -> Iterator[None]:
    """Writes a run's event files while the body runs, if asked to."""
    if not (tensorboard and folder.writes):
        yield
        return
    with closing(EventFiles(folder.path / "tensorboard")) as files:
        folder.listeners.append(files)
        yield


@contextmanager
def reported_errors(console: Console) -> Iterator[None]:
    """Shows a user's error as one paragraph and exits with code 2; other errors are bugs and keep their traceback.

    Warnings are shown as one paragraph too.
    """
    number = int(os.environ.get("RANK", "0"))  # of this process, under torchrun

    def paragraph(kind: str, text: object) -> None:
        console.print(kind, end=" ")
        console.print(" ".join(str(text).split()), highlight=False, markup=False, soft_wrap=not console.is_terminal)

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if number == 0:  # the others warn of the same
            paragraph("[bold yellow]Warning:[/]", message)

    with warnings.catch_warnings():
        for category in (CheckpointWarning, NumbersWarning):
            warnings.simplefilter("always", category)  # each is news, although its words may be the same
        warnings.showwarning = shown
        try:
            yield
        except USER_ERRORS as error:
            paragraph(f"[bold red]Error{f' in process {number}' if number else ''}:[/]", error)
            raise typer.Exit(2) from None


@contextmanager
def stoppable(console: Console, command: str) -> Iterator[None]:
    """Ends the body at SIGTERM (exit code 0) and SIGINT (130) after a checkpoint, and says how to go on.

    Args:
        console: where it is said.
        command: with which the run goes on.
    """

    def go_on(what: str) -> None:
        console.print(f"{what} Go on with: {command}", highlight=False, soft_wrap=True, markup=False)

    try:
        with stop_signals():
            yield
    except Stopped as stop:
        go_on("Interrupted; the state is saved." if stop.exit_code else "Stopped; the state is saved.")
        raise typer.Exit(stop.exit_code) from None
    except KeyboardInterrupt:
        go_on("Interrupted at once; the last checkpoint stands.")
        raise typer.Exit(130) from None


def main(command: Callable[..., None]) -> None:
    """Runs a function as a command line; `--install-completion` teaches the shell to complete it."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
