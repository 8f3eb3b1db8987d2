"""`python -m lfmcw_app.table NAME`: makes or resumes a table of the paper over several seeds.

    table2     LFM-CW against its baseline (the same search without LFM-CW)
    table4     generated and real images against generated ones only (Eq. 19)
    table5     the generators
    fig3       the trade-off λ
    controls   other explanations of a gain: random cells, more rounds, λ = 0, uniform class weights
    ablation   the search without LFM-CW against LFM-CW and LFM-CW without its parts, and LFM-CW
               against its controls

Every run has its own folder under --runs, named by its recipe and its data. So tables share runs:
those with a result are not run again, interrupted ones are resumed, and those that another table
command is carrying out are taken from it. A Markdown table and a CSV file with one row per run are
written after each run, and a figure at the end.

With --reuse, the rows of that CSV file count as runs on another machine too: a table is continued
there, or put together from the seeds of several machines.

In a value of --set, {seed} stands for a run's seed: with search.generator.init.run=warm/{seed} all
searches of a seed start from the same generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lfmcw_app.arms import TABLES, contrasts, table_recipes
from lfmcw_app.commands import options
from lfmcw_app.commands.execution import main_of, reported_errors
from lfmcw_app.data import short_name
from lfmcw_app.errors import InputError
from lfmcw_app.printing import say
from lfmcw_app.recipe_loading import key_value
from lfmcw_app.stopping import unwound
from lfmcw_app.sweep import LAUNCHERS, Launcher, make_launcher, resume_command, sweep
from mlo.errors import nearest

if TYPE_CHECKING:
    from lfmcw_app.table_plan import TablePlan


def table(
    name: Annotated[str, typer.Argument(help=f"Which table: {', '.join(TABLES)}.")],
    dataset: Annotated[
        str, typer.Argument(autocompletion=options.complete_dataset, help=options.DATASET_HELP)
    ] = "fashion-mnist",
    preset: options.PresetOption = None,
    space: options.SpaceOption = None,
    order: options.OrderOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = None,
    lookup: options.LookupOption = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Searches per arm, with the seeds 0, 1, ... (see --first-seed)."),
    ] = 10,
    first_seed: Annotated[
        int, typer.Option(min=0, help="The first of the seeds, to divide a table among machines.")
    ] = 0,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A runs.csv, of another machine for example. Runs of this table that it has are "
            "not made again. Can be repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the table. By default tables/NAME-DATASET-PRESET."),
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(help="Folder of the runs. Tables share it."),
    ] = Path("tables/runs"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    launcher: Annotated[
        str, typer.Option(help=f"Where the runs are made: {', '.join(LAUNCHERS)}.")
    ] = "local",
    launcher_set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Option of the launcher, such as num_gpus=1 or timeout_min=1440. Can be repeated.",
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="How often a failed run is retried from its last checkpoint.")
    ] = 2,
    data: options.DataOption = Path("data"),
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    keep: options.KeepOption = "all",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Projects the time of all arms and seeds, and stops."),
    ] = False,
) -> None:
    """Runs a table of the paper, seed by seed, and writes table.md, runs.csv and figure.png."""
    # Not needed for `--help`, and slow to import: the networks, and matplotlib.
    from lfmcw_app.table_plan import plan_table
    from lfmcw_app.table_projection import print_table_projection, project_arms

    console = Console()
    with reported_errors(Console(stderr=True)):
        if name not in TABLES:
            raise InputError(f"Unknown table {name!r}. {nearest(name, TABLES)}")
        options.check_keep(keep)
        options.check_outside(dataset, out or Path("tables"), runs)
        recipes = table_recipes(
            name,
            dataset,
            preset,
            config,
            assign or [],
            range(first_seed, first_seed + seeds),
            space=space,
            order=order,
            settings=options.given_settings(None, {"lookup.file": lookup}),
        )
        tell = partial(say, console)
        plan = plan_table(name, recipes, runs=runs, reuse=reuse or (), data=data, tell=tell)
        of_launcher = dict(
            key_value(setting, "--launcher-set", "num_gpus=1") for setting in launcher_set or []
        )
        place = make_launcher(launcher, jobs=jobs, folder=runs / "launcher", options=of_launcher)

        if dry_run:
            tell("Measuring two rounds of each phase of each arm …")
            options.set_threads(threads, plan.preset)
            target = options.pick_device(device)
            projected = project_arms(plan.arms, plan.made, seeds, plan.images, target)
            print_table_projection(projected, len(contrasts(name)), jobs, console)
            return

        # The runs share the processor, unless each needs only one thread.
        shared = max(1, (os.cpu_count() or 1) // jobs)
        command = partial(
            resume_command,
            data=data,
            device=device,
            threads=threads or options.default_threads(plan.preset) or shared,
            keep=keep,
            lookup=lookup,
        )
        folder = out or Path("tables") / f"{name}-{short_name(dataset)}-{plan.preset}"
        _make(plan, folder, runs, place, command, keep=keep, retries=retries, tell=tell)


def _make(
    plan: TablePlan,
    folder: Path,
    runs: Path,
    place: AbstractContextManager[Launcher],
    command: Callable[[Path], list[str]],
    *,
    keep: str,
    retries: int,
    tell: Callable[[str], None],
) -> None:
    """Makes the runs of a table that are missing, and writes the table after each.

    Args:
        plan: the table.
        folder: of the table.
        runs: the folder of the runs.
        place: where they run.
        command: run folder → the command that completes the run.
        keep: which checkpoints a run keeps.
        retries: how often a failed run is tried again.
        tell: is called with each sentence about the progress.

    Raises:
        InputError: if runs failed, at the end.
    """
    from lfmcw_app.table_files import TableReport, claim, run_folder

    # Complete runs go into the report at once; the rest is missing.
    claim(folder, plan.arms, plan.images, first_seed=plan.first_seed)
    report = TableReport(plan.name, folder, plan.title)
    for key, row in plan.reused.items():
        report.add_reused(key, row)
    folders = {
        key: run_folder(runs, recipe, plan.images, keep=keep)
        for key, recipe in plan.recipes.items()
        if key not in plan.reused
    }
    missing = report.collect(folders)
    total = len(plan.recipes)
    if len(missing) < total:
        report.write_so_far()
    tell(f"{total} runs, {total - len(missing)} of them already complete. Logs: {runs}/*/log.txt")

    keys = {path: key for key, path in folders.items()}
    failures = []
    with unwound(), place as where:  # the launcher's end stops the runs
        for outcome in sweep(missing, command, where, retries=retries):
            key = keys[outcome.folder]
            run = f"{key[0]}, seed {key[1]}"
            tries = f" after {outcome.tries} tries" if outcome.tries > 1 else ""
            if outcome.failure is None and outcome.folder not in report.collect(folders):
                report.write_so_far()
                tell(f"{run}: {report.said(key)}{tries}")
            else:
                failures.append(f"{run}: {outcome.failure}{tries}")
                tell(f"Failed: {failures[-1]}")

    if len(failures) < total:
        report.write()
        tell(report.path.read_text("utf-8"))
        tell(f"In {folder}: table.md, runs.csv, figure.png")
        tell(report.to_contribute())
    if failures:
        raise InputError(
            f"{len(failures)} of {total} runs failed, and the table lacks them: "
            f"{'; '.join(failures)}"
        )


def main() -> None:
    """Entry point."""
    main_of(table)
