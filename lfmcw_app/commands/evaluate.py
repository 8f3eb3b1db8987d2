"""`python -m lfmcw_app.evaluate GENOTYPE DATASET`: train a genotype's network, report its error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app.commands import options
from lfmcw_app.commands.execution import carry_out, main_of, reported_errors
from lfmcw_app.commands.resumption import resumed_folder
from lfmcw_app.data import Dataset, short_name
from lfmcw_app.errors import InputError, shown
from lfmcw_app.genotype_argument import GENOTYPE_HELP, read_genotype
from lfmcw_app.printing import say
from lfmcw_app.processes import check_batches, joined, quiet_unless_main, shared_folder
from lfmcw_app.recipe import Recipe
from lfmcw_app.resolving import resolve_recipe
from lfmcw_app.run_files import EVALUATED
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.named import NAMED_GENOTYPES
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import TRAINING
from lfmcw_app.tensorboard import check_tensorboard


def evaluate(
    genotype: Annotated[
        str | None,
        typer.Argument(
            autocompletion=options.completing(*NAMED_GENOTYPES, "random:"),
            help=f"{GENOTYPE_HELP} Needed unless --resume is given.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Argument(
            autocompletion=options.complete_dataset,
            help=f"{options.DATASET_HELP} Needed unless --resume is given.",
        ),
    ] = None,
    preset: options.PresetOption = None,
    space: options.SpaceOption = None,
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
    quiet: options.QuietOption = False,
    tensorboard: options.TensorBoardOption = False,
    dry_run: options.DryRunOption = False,
) -> None:
    """Trains the network of GENOTYPE on DATASET from scratch and reports its test error.

    With --lookup the error is read from a table of all cells instead, and no data are needed.
    """
    # Not needed for `--help`, and slow to import: the networks, and matplotlib.
    from lfmcw_app.commands.preparation import prepared
    from lfmcw_app.complete_runs import evaluate_genotype
    from lfmcw_app.idle_settings import idle_settings
    from lfmcw_app.operation_checks import check_operations
    from lfmcw_app.starting_weights import check_network_fits

    console = Console(quiet=quiet and not dry_run)
    with reported_errors(Console(stderr=True)):
        if tensorboard:
            check_tensorboard()
        settings = options.given_settings(
            assign, {"evaluation.init.run": init, "lookup.file": lookup}
        )

        # The genotype and the recipe come from the folder that is resumed, or from the options.
        folder = None
        if resume is not None:
            folder = resumed_folder(
                resume,
                searches=False,
                dataset=dataset,
                config=config,
                options={"preset": preset, "search.space": space, "seed": seed},
                settings=settings,
                out=out,
            )
            options.check_no_trial(max_steps)
            recipe, cells = folder.recipe, _evaluated(folder)
            if genotype is not None and _given(genotype, recipe) != cells:
                raise InputError(
                    f"{resume} holds the evaluation of a genotype other than {genotype}. Resume it "
                    f"with --resume {resume} alone, or start a new evaluation."
                )
        elif genotype is None or dataset is None:
            what = "a genotype and a data set"
            if genotype is not None:
                what = f"a data set after the genotype {shown(genotype)}"
            raise InputError(
                f"Name {what}. For a first try: python -m lfmcw_app.evaluate random:0 digits"
            )
        else:
            recipe = resolve_recipe(
                dataset,
                preset,
                config,
                settings,
                seed,
                space=space,
                cuda=options.pick_device(device, counts=dry_run).type != "cpu",
            )
            options.check_outside(dataset, out or options.RUNS)
            if out is not None and not dry_run:
                RunFolder.check_free(out)
            cells = _given(genotype, recipe)
            for told in idle_settings(recipe, config=config, given=settings, searches=False):
                say(console, told)
        if not recipe.trains:
            if dry_run or max_steps is not None:
                raise InputError(
                    "--dry-run and --max-steps concern a training, but with --lookup nothing is "
                    "trained. Drop them."
                )
            place = options.place(out, f"{short_name(recipe.dataset)}-lookup")
            _look_up(folder, place, recipe, cells, console)
            return
        check_operations(cells.primitives, recipe, searches=False)
        check_batches(recipe, searches=False)
        options.set_threads(threads, recipe.preset)

        with joined(options.pick_device(device, counts=dry_run)) as target:
            console = quiet_unless_main(console)
            begins = folder is None or not folder.checkpoints(TRAINING).exists()

            def fits(recipe: Recipe, images: Dataset) -> str:
                return check_network_fits(recipe, cells, images)

            planned = prepared(
                recipe,
                data,
                target,
                console,
                preset_chosen=folder is None and preset is None,
                dry_run=dry_run,
                max_steps=max_steps,
                checks=(fits,) if begins else (),
                genotype=cells,
            )
            if planned is None:
                return
            recipe, images = planned
            name = f"{short_name(recipe.dataset)}-{recipe.preset}-evaluation"
            shared = shared_folder(folder, options.place(out, name), recipe)
            if folder is None:  # marks the folder as one without a search
                shared.write(EVALUATED, cells.to_json())
            work = partial(evaluate_genotype, shared, cells, images, console, target)
            carry_out(shared, console, "lfmcw_app.evaluate", work, tensorboard=tensorboard)


def _look_up(
    folder: RunFolder | None,
    place: Callable[[], Path],
    recipe: Recipe,
    cells: Cells,
    console: Console,
) -> None:
    """Looks up the error of a genotype in the recipe's table, without data or a device.

    Args:
        folder: the one that is resumed.
        place: makes a new one; see `shared_folder`.
        recipe: names the table.
        cells: the genotype.
        console: where the result is printed.

    Raises:
        InputError: if the table cannot be used, or does not hold the genotype.
    """
    from lfmcw_app.complete_runs import look_up_genotype
    from lfmcw_app.lookup import table_of

    with joined(options.pick_device("cpu")):
        table = table_of(recipe)
        assert table is not None
        table.trained(cells)  # refused before a folder is made
        shared = shared_folder(folder, place, recipe)
        if folder is None:  # marks the folder as one without a search
            shared.write(EVALUATED, cells.to_json())
        work = partial(look_up_genotype, shared, cells)
        carry_out(shared, quiet_unless_main(console), "lfmcw_app.evaluate", work, tensorboard=False)


def _given(genotype: str, recipe: Recipe) -> Cells:
    """The genotype of the argument, of the recipe's space.

    Raises:
        InputError: if it has other cells.
    """
    cells = read_genotype(genotype, recipe.search)
    space = space_named(recipe.search.space)
    if not isinstance(cells, space.genotype):
        raise InputError(
            f"{shown(genotype)} does not have the cells of {space.title}. Name a genotype of this "
            "space in a file, or another --space."
        )
    return cells


def _evaluated(folder: RunFolder) -> Cells:
    """The genotype that a folder was made for."""
    space = space_named(folder.recipe.search.space)
    return space.genotype.load(folder.path / EVALUATED)


def main() -> None:
    """Entry point."""
    main_of(evaluate)
