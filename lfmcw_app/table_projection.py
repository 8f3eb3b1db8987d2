"""Projects what a table will take: arms × seeds × the time of a run, minus complete runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from lfmcw_app.comparison_text import describe_planned_power
from lfmcw_app.data import Dataset
from lfmcw_app.printing import print_table, say
from lfmcw_app.projection import project
from lfmcw_app.recipe import Recipe
from lfmcw_app.units import duration

__all__ = ["ArmProjection", "print_table_projection", "project_arms"]


@dataclass(frozen=True, kw_only=True)
class ArmProjection:
    """The time that an arm will take.

    Attributes:
        label: of the arm.
        runs: number of its runs.
        done: how many of them have a result.
        seconds: time of a run.
    """

    label: str
    runs: int
    done: int
    seconds: float

    @property
    def left(self) -> float:
        """Seconds of the runs that are not done."""
        return (self.runs - self.done) * self.seconds


def project_arms(
    recipes: Mapping[str, Recipe],
    done: Mapping[str, int],
    seeds: int,
    dataset: Dataset,
    device: torch.device,
) -> list[ArmProjection]:
    """Projects the arms of a table, each from two rounds of each phase of one of its runs.

    Args:
        recipes: label → the recipe of a run.
        done: label → number of runs with a result.
        seeds: number of runs of an arm.
        dataset: what they run on.
        device: where.
    """
    found = []
    for label, recipe in recipes.items():
        # A complete arm costs nothing more, and may be slow to measure.
        phases = project(recipe, dataset, device) if done[label] < seeds else []
        seconds = sum(phase.rounds * phase.seconds for phase in phases)
        found.append(ArmProjection(label=label, runs=seeds, done=done[label], seconds=seconds))
    return found


def print_table_projection(
    arms: list[ArmProjection], tests: int, jobs: int, console: Console
) -> None:
    """Prints a row per arm, the sum, and what an experiment of this size can see.

    Args:
        arms: of the table.
        tests: number of its comparisons.
        jobs: runs at a time.
        console: where.
    """
    table = Table(title="projected from two rounds of each phase", title_justify="left")
    for column in ("arm", "runs", "done", "time per run", "left"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in arms:
        known = arm.done < arm.runs
        table.add_row(
            arm.label,
            f"{arm.runs:,}",
            f"{arm.done:,}",
            " ".join(duration(arm.seconds)) if known else "",
            " ".join(duration(arm.left)) if known else "",
        )
    runs, done = sum(arm.runs for arm in arms), sum(arm.done for arm in arms)
    left = sum(arm.left for arm in arms)
    table.add_section()
    table.add_row("all", f"{runs:,}", f"{done:,}", "", " ".join(duration(left)))
    print_table(console, table)
    if jobs > 1:
        say(
            console,
            f"With {jobs} at a time, where each has a core: {' '.join(duration(left / jobs))}.",
        )
    say(console, describe_planned_power(arms[0].runs, tests))
