"""`python -m lfmcw_app.run DATASET`: search for a cell, train its network, report its error."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app.commands import options
from lfmcw_app.commands.execution import carry_out, main_of, reported_errors
from lfmcw_app.errors import InputError
from lfmcw_app.printing import say


def run(
    dataset: Annotated[
        str | None,
        typer.Argument(
            autocompletion=options.complete_dataset,
            help=f"{options.DATASET_HELP} Needed unless --resume is given.",
        ),
    ] = None,
    preset: options.PresetOption = None,
    space: options.SpaceOption = None,
    order: options.OrderOption = None,
    method: options.MethodOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = None,
    out: options.OutOption = None,
    seed: options.SeedOption = None,
    init: options.InitOption = None,
    lookup: options.LookupOption = None,
    resume: options.ResumeOption = None,
    data: options.DataOption = Path("data"),
    device: options.ProjectedDeviceOption = "auto",
    threads: options.ThreadsOption = None,
    max_steps: options.MaxStepsOption = None,
    detect_collapse: Annotated[
        bool,
        typer.Option(
            "--detect-collapse",
            help="Warns of skip-connection collapse, and of a GAN that has stopped learning or "
            "does not draw pictures of the classes.",
        ),
    ] = False,
    quiet: options.QuietOption = False,
    tensorboard: options.TensorBoardOption = False,
    keep: options.KeepOption = "all",
    dry_run: options.DryRunOption = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Prints the resolved recipe and stops.")
    ] = False,
) -> None:
    """Searches for a cell on DATASET by LFM-CW or DARTS, trains its network, reports the error."""
    waiting = Console(stderr=True, quiet=quiet)
    if waiting.is_terminal:
        waiting.print("Loading PyTorch …")
    # Not needed for `--help`, and slow to import: torch, the networks, recipes, and matplotlib.
    from lfmcw_app.commands.preparation import prepared
    from lfmcw_app.commands.resumption import resumed_folder
    from lfmcw_app.complete_runs import run as run_phases
    from lfmcw_app.data import short_name
    from lfmcw_app.idle_settings import idle_settings
    from lfmcw_app.lookup import table_of
    from lfmcw_app.processes import check_batches, joined, quiet_unless_main, shared_folder
    from lfmcw_app.recipe_loading import with_options
    from lfmcw_app.resolving import resolve_recipe
    from lfmcw_app.run_folder import RunFolder
    from lfmcw_app.starting_weights import check_generator_fits, check_supernets_fit
    from lfmcw_app.tensorboard import check_tensorboard

    # A requested recipe or projection is always printed.
    console = Console(quiet=quiet and not (print_config or dry_run))
    with reported_errors(Console(stderr=True)):
        if tensorboard:
            check_tensorboard()
        options.check_keep(keep)
        settings = options.given_settings(assign, {"search.init.run": init, "lookup.file": lookup})
        settings = with_options(settings, {"detect_collapse": detect_collapse or None})

        # The recipe comes from the options, or from the folder that is resumed.
        folder = None
        if resume is not None:
            given = {"preset": preset, "search.space": space, "search.order": order}
            folder = resumed_folder(
                resume,
                searches=True,
                dataset=dataset,
                config=config,
                options={**given, "search.method": method, "seed": seed},
                settings=settings,
                out=out,
            )
            options.check_no_trial(max_steps)
            recipe = folder.recipe
        elif dataset is None:
            raise InputError(
                f"Name a data set: {', '.join(options.DATASETS)}. For a first try: "
                "python -m lfmcw_app.run digits"
            )
        else:
            recipe = resolve_recipe(
                dataset,
                preset,
                config,
                settings,
                seed,
                space=space,
                order=order,
                method=method,
                cuda=options.pick_device(device, counts=dry_run).type != "cpu",
            )
            options.check_outside(dataset, out or options.RUNS)
            if out is not None and not (print_config or dry_run):
                RunFolder.check_free(out)
        if print_config:
            console.print(recipe.to_yaml(), end="", highlight=False, soft_wrap=True, markup=False)
            return
        table_of(recipe)  # refused here if it does not fit, before the data are read
        check_batches(recipe)
        options.set_threads(threads, recipe.preset)

        with joined(options.pick_device(device, counts=dry_run)) as target:
            console = quiet_unless_main(console)
            if resume is None:
                for told in idle_settings(recipe, config=config, given=settings, order=order):
                    say(console, told)
            planned = prepared(
                recipe,
                data,
                target,
                console,
                preset_chosen=folder is None and preset is None,
                dry_run=dry_run,
                max_steps=max_steps,
                checks=() if folder is not None else (check_supernets_fit, check_generator_fits),
            )
            if planned is None:
                return
            recipe, images = planned
            place = options.place(out, f"{short_name(recipe.dataset)}-{recipe.preset}")
            shared = shared_folder(folder, place, recipe)
            shared.keep = keep
            work = partial(run_phases, shared, images, console, target)
            carry_out(shared, console, "lfmcw_app.run", work, tensorboard=tensorboard)


def main() -> None:
    """Entry point."""
    main_of(run)
