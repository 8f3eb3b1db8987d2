"""`python -m lfmcw_app.run DATASET`: search a cell, train the derived network, report its error."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app import cli
from lfmcw_app.data import DATASETS, short_name
from lfmcw_app.errors import InputError
from lfmcw_app.processes import check_batches, joined, quiet_unless_main, shared_folder
from lfmcw_app.projection import after_projection, project
from lfmcw_app.recipe import Recipe
from lfmcw_app.run_folder import EVALUATED, RunFolder
from lfmcw_app.search import read_data
from lfmcw_app.search import run as run_phases
from lfmcw_app.tensorboard import check_tensorboard


def run(
    dataset: Annotated[
        str | None,
        typer.Argument(
            autocompletion=cli.complete_dataset,
            help=f"{cli.DATASET_HELP} Needed unless --resume is given.",
        ),
    ] = None,
    preset: cli.PresetOption = None,
    space: cli.SpaceOption = None,
    order: cli.OrderOption = None,
    method: cli.MethodOption = None,
    config: cli.ConfigOption = None,
    assign: cli.SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, new or empty. By default a new one under runs/."),
    ] = None,
    seed: cli.SeedOption = None,
    resume: Annotated[Path | None, typer.Option(help="Resumes the run in this folder.")] = None,
    data: cli.DataOption = Path("data"),
    device: cli.DeviceOption = "auto",
    threads: cli.ThreadsOption = None,
    max_steps: cli.MaxStepsOption = None,
    detect_collapse: Annotated[
        bool,
        typer.Option(
            "--detect-collapse",
            help="Warns of skip-connection collapse and of a GAN that does not learn any more.",
        ),
    ] = False,
    quiet: cli.QuietOption = False,
    tensorboard: cli.TensorBoardOption = False,
    dry_run: cli.DryRunOption = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Prints the resolved recipe and stops.")
    ] = False,
) -> None:
    """Searches a cell with LFM-CW (or DARTS) on DATASET, trains its network, reports its error."""
    # A recipe or a projection that is asked for is printed in any case.
    console = Console(quiet=quiet and not (print_config or dry_run))
    with cli.reported_errors(Console(stderr=True)):
        if tensorboard:
            check_tensorboard()
        if dataset is None and resume is None:
            raise InputError(
                f"Name a data set: {', '.join(DATASETS)}. For a first try: python -m lfmcw_app.run "
                "digits"
            )
        if detect_collapse:
            assign = [*(assign or []), "detect_collapse=true"]

        # The recipe comes from the options, or from the folder that is resumed.
        recipe = None
        if dataset is not None:
            recipe = cli.resolve_recipe(
                dataset, preset, config, assign, seed, space=space, order=order, method=method
            )
        folder = None
        if resume is not None:
            changes = (preset, space, order, method, config, assign, seed)
            has_changes = any(value not in (None, []) for value in changes)
            folder = _resumed(resume, out, recipe, has_changes=has_changes)
            cli.check_no_trial(max_steps)
        recipe = folder.recipe if folder is not None else recipe
        assert recipe is not None
        if print_config:
            console.print(recipe.to_yaml(), end="", highlight=False, soft_wrap=True, markup=False)
            return
        check_batches(recipe)
        cli.set_threads(threads, recipe.preset)

        with joined(cli.pick_device(device)) as target:
            console = quiet_unless_main(console)
            images = read_data(recipe, data)
            measure = partial(project, recipe, images, target)
            recipe = after_projection(
                recipe, measure, console, dry_run=dry_run, max_steps=max_steps
            )
            if recipe is None:
                return

            out = out or cli.fresh_folder(f"{short_name(recipe.dataset)}-{recipe.preset}")
            shared = shared_folder(folder, out, recipe)
            work = partial(run_phases, shared, images, console, target)
            cli.carry_out(shared, console, "lfmcw_app.run", work, tensorboard=tensorboard)


def _resumed(
    path: Path, out: Path | None, recipe: Recipe | None, *, has_changes: bool
) -> RunFolder:
    """Opens the folder of --resume; options given beside it must be those of the run."""
    folder = RunFolder.open(path)
    if (path / EVALUATED).exists():
        raise InputError(
            f"{path} holds the evaluation of a given genotype, which has no search to go on with. "
            f"Go on with it by python -m lfmcw_app.evaluate --resume {path}"
        )
    if out is not None and out.resolve() != path.resolve():
        raise InputError(f"--resume {path} goes on in its own folder; drop --out {out}.")
    if recipe is None:
        if has_changes:
            raise InputError(
                "--resume takes the run's own recipe; drop the options that change it."
            )
    elif recipe.dataset != folder.recipe.dataset or (has_changes and recipe != folder.recipe):
        raise InputError(
            f"The run in {path} has another recipe ({folder.recipe.dataset}, preset "
            f"{folder.recipe.preset}, seed {folder.recipe.seed}) than these options ask for. "
            f"Resume it with --resume {path} alone, or start a new run."
        )
    return folder


def main() -> None:
    """Entry point."""
    cli.main(run)


if __name__ == "__main__":
    main()
