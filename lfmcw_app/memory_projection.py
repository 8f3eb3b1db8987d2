"""Counts the GPU memory of a recipe's phases on the meta device, without a GPU."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

import mlo
from lfmcw_app.counted_memory import MemoryCount
from lfmcw_app.data import Dataset
from lfmcw_app.errors import InputError
from lfmcw_app.printing import print_table, say
from lfmcw_app.projection import PlannedPhase, planned_phases
from lfmcw_app.recipe import Recipe
from lfmcw_app.search_space.genotype import Cells

__all__ = [
    "CARDS",
    "META",
    "NOT_COUNTED",
    "ROOM",
    "CountedPhase",
    "count_memory",
    "count_phase",
    "fits",
    "in_single_precision",
    "largest_batch",
    "print_memory",
]

CARDS = (16, 24, 40, 80)
"""Sizes of GPUs, in GiB, that people have."""

ROOM = 0.85
"""Share of a card that tensors may take. The rest is for memory that is not counted: an assumption.
"""

NOT_COUNTED = (
    "Not counted: CUDA's context, the workspaces of cuDNN and cuBLAS, gaps between the allocator's "
    "blocks."
)

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class CountedPhase:
    """The GPU memory of a phase of a run.

    Attributes:
        name: of the phase.
        rounds: how many it has.
        held: bytes that stay between two rounds: weights, optimizers, images.
        peak: largest number of bytes in the second round, which includes the optimizers' states.
    """

    name: str
    rounds: int
    held: int
    peak: int


def count_memory(
    recipe: Recipe, dataset: Dataset, *, searches: bool = True, genotype: Cells | None = None
) -> list[CountedPhase]:
    """Runs two rounds of every phase on the meta device; see `planned_phases`.

    A phase in bfloat16 is counted in float32, since the meta device has no autocast.

    Args:
        recipe: the recipe.
        dataset: what is searched and trained on; its pixels are not read.
        searches: whether there is a search.
        genotype: what is trained; None for random cells.

    Raises:
        InputError: if a phase uses numbers to decide the shapes that it computes.
    """
    recipe = in_single_precision(recipe)
    planned = planned_phases(recipe, dataset, META, searches=searches, genotype=genotype)
    return [count_phase(phase) for phase in planned]


def in_single_precision(recipe: Recipe) -> Recipe:
    """The recipe without autocast."""
    sections = {
        name: getattr(recipe, name).model_copy(update={"precision": None})
        for name in ("search", "evaluation")
    }
    return recipe.model_copy(update=sections)


def count_phase(phase: PlannedPhase) -> CountedPhase:
    """Builds a phase on the meta device and runs two rounds of it.

    Raises:
        InputError: if it decides by numbers what shape it computes.
    """
    gc.collect()  # left over from the phase before
    count = MemoryCount()
    try:
        # All numbers are 1 there, so warnings of engines mean nothing.
        with warnings.catch_warnings(), count:
            warnings.simplefilter("ignore", mlo.SolveWarning)
            optimizer = phase.build()
            optimizer.step()
            count.restart()
            held = count.held
            optimizer.step()
    except (NotImplementedError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"The memory of {phase.name} cannot be counted on the meta device ({said}). Its "
            "engine or one of its operations uses numbers to decide what to compute. Use another "
            "engine for the count (search.hypergradient=one_step), or --device cuda if there is "
            "a GPU."
        ) from error
    return CountedPhase(
        name=phase.name,
        rounds=phase.rounds,
        held=held,
        peak=count.peak,
    )


# ------------------------------ cards


def fits(peak: float, card: int) -> bool:
    """Whether a counted peak in bytes fits a card of so many GiB; see `ROOM`."""
    return peak <= ROOM * card * 2**30


def largest_batch(batches: Sequence[int], peaks: Sequence[int], card: int) -> int | None:
    """The largest batch, a multiple of 8, that fits a card of so many GiB; None if not even 8 does.

    Memory is linear in the batch: the weights, plus the activations of every image.

    Args:
        batches: two batches, the smaller one first.
        peaks: what was counted with each, in bytes.
        card: size of the card in GiB.
    """
    (small, large), (low, high) = batches, peaks
    per_image = (high - low) / (large - small)
    most = (ROOM * card * 2**30 - (low - per_image * small)) / per_image
    batch = 8 * math.floor(most / 8)
    return batch if batch >= 8 else None


def print_memory(recipe: Recipe, phases: Sequence[CountedPhase], console: Console) -> None:
    """Prints a row per phase, and which cards the largest one fits."""
    if not phases:
        say(
            console, "Nothing to count: cells are drawn at random, and the test error is looked up."
        )
        return
    title = "GPU memory, counted on the meta device"
    table = Table(title=title, title_justify="left")
    for column in ("phase", "rounds", "held GB", "peak GB"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in phases:
        sizes = (f"{size / 1e9:.2f}" for size in (phase.held, phase.peak))
        table.add_row(phase.name, f"{phase.rounds:,}", *sizes)
    print_table(console, table)

    peak = max(phase.peak for phase in phases)
    fitting = [f"{card} GB" for card in CARDS if fits(peak, card)]
    cards = f"It fits a card of {', '.join(fitting)}" if fitting else "It fits none of these cards"
    say(
        console,
        f"{cards}, if the counted memory may take {ROOM:.0%} of it. {NOT_COUNTED}",
    )
    rounded = [
        name for name in ("search", "evaluation") if getattr(recipe, name).precision is not None
    ]
    if rounded:
        say(
            console,
            f"Counted in float32, which takes more than bfloat16: {' and '.join(rounded)}.",
        )
