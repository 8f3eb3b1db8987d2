"""`python -m lfmcw_app.evaluate GENOTYPE DATASET`: train a genotype's network, report its error."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app.commands import options
from lfmcw_app.commands.execution import carry_out, main_of, reported_errors, say
from lfmcw_app.data import short_name
from lfmcw_app.errors import InputError
from lfmcw_app.processes import check_batches, joined, quiet_unless_main, shared_folder
from lfmcw_app.resolving import resolve_recipe
from lfmcw_app.run_folder import EVALUATED, RunFolder
from lfmcw_app.search_space.genotype import Genotype, random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES, named_genotype
from lfmcw_app.tensorboard import check_tensorboard


def evaluate(
    genotype: Annotated[
        str | None,
        typer.Argument(
            autocompletion=options.completing(*NAMED_GENOTYPES, "random:"),
            help=f"A genotype.json, a published one ({', '.join(NAMED_GENOTYPES)}), or random:N. "
            "Needed unless --resume is given.",
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
    resume: options.ResumeOption = None,
    data: options.DataOption = Path("data"),
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    max_steps: options.MaxStepsOption = None,
    quiet: options.QuietOption = False,
    tensorboard: options.TensorBoardOption = False,
    dry_run: options.DryRunOption = False,
) -> None:
    """Trains the network of GENOTYPE on DATASET from scratch and reports its test error."""
    # Not needed for `--help`, and slow to import: the networks, and matplotlib.
    from lfmcw_app.complete_runs import evaluate_genotype
    from lfmcw_app.data_checks import read_data
    from lfmcw_app.projection import after_projection, project_training

    console = Console(quiet=quiet and not dry_run)
    with reported_errors(Console(stderr=True)):
        if tensorboard:
            check_tensorboard()

        # The genotype and the recipe come from the folder that is resumed, or from the options.
        folder = None
        if resume is not None:
            others = (genotype, dataset, preset, space, config, assign, out, seed)
            if any(value not in (None, []) for value in others):
                raise InputError(
                    "--resume takes the evaluation's own genotype, data set and recipe; drop the "
                    "others."
                )
            options.check_no_trial(max_steps)
            folder = _evaluation(resume)
            recipe, cells = folder.recipe, Genotype.load(resume / EVALUATED)
        elif genotype is None or dataset is None:
            raise InputError(
                "Name a genotype and a data set. For a first try: python -m lfmcw_app.evaluate "
                "random:0 digits"
            )
        else:
            recipe = resolve_recipe(dataset, preset, config, assign, seed, space=space)
            cells = _read_genotype(genotype, recipe.search.nodes)
        check_batches(recipe, searches=False)
        options.set_threads(threads, recipe.preset)

        with joined(options.pick_device(device)) as target:
            console = quiet_unless_main(console)
            images = read_data(recipe, data, searches=False)
            say(console, images.summary)
            measure = partial(project_training, recipe, cells, images, target)
            planned = after_projection(
                recipe, measure, console, dry_run=dry_run, max_steps=max_steps
            )
            if planned is None:
                return
            recipe = planned

            name = f"{short_name(recipe.dataset)}-{recipe.preset}-evaluation"
            shared = shared_folder(folder, out or options.fresh_folder(name), recipe)
            if folder is None:  # marks the folder as one without a search
                shared.write(EVALUATED, cells.to_json())
            work = partial(evaluate_genotype, shared, cells, images, console, target)
            carry_out(shared, console, "lfmcw_app.evaluate", work, tensorboard=tensorboard)


def _evaluation(path: Path) -> RunFolder:
    """Opens the folder of --resume."""
    folder = RunFolder.open(path)
    if not (path / EVALUATED).exists():
        raise InputError(
            f"{path} holds no evaluation of a given genotype (no {EVALUATED}). If it is a search, "
            f"go on with it by python -m lfmcw_app.run --resume {path}"
        )
    return folder


def _read_genotype(text: str, nodes: int) -> Genotype:
    kind, colon, number = text.partition(":")
    if text in NAMED_GENOTYPES:
        return NAMED_GENOTYPES[text]
    if not colon or kind != "random":
        # A name that is neither a file nor published is more likely a mistyped name.
        is_file = Path(text).suffix or Path(text).exists()
        return Genotype.load(text) if is_file else named_genotype(text)
    if not number.isascii() or not number.isdecimal() or int(number) >= 2**62:
        raise InputError(
            f"A random genotype is random:N with a whole number N below 2**62, got {text!r}."
        )
    return random_genotype(nodes, int(number))


def main() -> None:
    """Entry point."""
    main_of(evaluate)
