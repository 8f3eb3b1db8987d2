"""Projects what a run will take from two rounds of each of its phases, on separate modules."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import Dataset
from lfmcw_app.generator_warmup import build_warmup
from lfmcw_app.memory import enough_memory
from lfmcw_app.names import FOLDER
from lfmcw_app.numerics import numerics_of
from lfmcw_app.parts import search_part_labels, search_parts, training_labels
from lfmcw_app.printing import print_table, say
from lfmcw_app.problems import build_search, search_rounds
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import trial
from lfmcw_app.resolving import LARGE_FOLDER, default_preset
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.pdarts import set_skip_drop_probability
from lfmcw_app.sizes import primitive_weights
from lfmcw_app.spaces import SearchStage, space_named
from lfmcw_app.stages import TRAINING, WARMUP, phases_of, search_stages
from lfmcw_app.training import build_training, training_rounds
from lfmcw_app.units import duration
from mlo import MultilevelOptimizer
from mlo.distributed import rank_and_size
from mlo.randomness import preserved

__all__ = [
    "PlannedPhase",
    "Projection",
    "after_projection",
    "planned_phases",
    "print_choice",
    "project",
    "rough_seconds",
]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A phase of a run.

    Attributes:
        name: of the phase.
        rounds: how many it has.
        seconds: of the second round, since the first also fills caches.
        memory: peak memory so far in GB, of the device or, on a CPU, of the process.
    """

    name: str
    rounds: int
    seconds: float
    memory: float


@dataclass(frozen=True, kw_only=True)
class PlannedPhase:
    """A phase of a run before it is built.

    Attributes:
        name: of the phase.
        section: the section of the recipe with its settings.
        rounds: how many it has.
        build: makes separate modules, data streams and optimizers for it.
    """

    name: str
    section: Literal["search", "evaluation"]
    rounds: int
    build: Callable[[], MultilevelOptimizer]


def planned_phases(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    *,
    searches: bool = True,
    genotype: Cells | None = None,
) -> list[PlannedPhase]:
    """The phases of a run, each at its most expensive.

    The architecture moves from the first round on: in a warm-up it rests, which is cheaper. It is
    not yet known which operations a stage of P-DARTS drops, so the most expensive ones are kept
    here. Paths drop with the probability of the last epoch.

    Args:
        recipe: the recipe.
        dataset: what is searched and trained on.
        device: where it runs.
        searches: whether there is a search.
        genotype: what is trained; None for random cells.
    """
    planned = _planned_search(_without_warmup(recipe), dataset, device) if searches else []
    if recipe.trains:
        how = recipe.evaluation
        per_epoch = len(training_labels(recipe, dataset)) // how.batch_size

        def training() -> MultilevelOptimizer:
            optimizer, _ = build_training(recipe, genotype, dataset, device)
            network: Any = optimizer.problems["network"].module
            network.drop_probability = how.drop_path
            return optimizer

        rounds = training_rounds(how, per_epoch)
        planned.append(
            PlannedPhase(name=TRAINING, section="evaluation", rounds=rounds, build=training)
        )
    return planned


def _planned_search(recipe: Recipe, dataset: Dataset, device: torch.device) -> list[PlannedPhase]:
    how = recipe.search
    stages, dropped = search_stages(how), 0
    if not stages:
        return []
    parts = search_parts(recipe, dataset)
    planned = []
    if WARMUP in phases_of(recipe):
        build = partial(build_warmup, recipe, dataset, parts.train, device=device)
        rounds = how.generator.warmup_rounds
        planned.append(PlannedPhase(name=WARMUP, section="search", rounds=rounds, build=build))

    def searched(stage: SearchStage, candidates: Candidates | None) -> MultilevelOptimizer:
        modules = build_modules(
            how, dataset, candidates=candidates, layers=stage.layers, device=device
        )
        for module in modules:
            if module is not None and stage.skip_dropout:
                set_skip_drop_probability(module, stage.skip_dropout)
        train, validation, unused = parts.train, parts.validation, parts.unused
        return build_search(
            recipe, dataset, train, validation, modules, unused=unused, device=device
        )

    rounds = search_rounds(how, len(parts.train))
    for stage in stages:
        left = _most_costly(space_named(how.space).candidates(how), dropped) if dropped else None
        build = partial(searched, stage, left)
        planned.append(PlannedPhase(name=stage.name, section="search", rounds=rounds, build=build))
        dropped += stage.drops.drops if stage.drops is not None else 0
    return planned


def project(
    recipe: Recipe,
    dataset: Dataset,
    device: torch.device,
    *,
    searches: bool = True,
    genotype: Cells | None = None,
) -> list[Projection]:
    """Runs two rounds of every phase of `planned_phases`, and returns what the phases will take."""
    found = []
    for phase in planned_phases(recipe, dataset, device, searches=searches, genotype=genotype):
        kind = "search" if phase.section == "search" else "training"
        with numerics_of(recipe, phase.section), enough_memory(kind, recipe, device):
            found.append(_measured(phase, device))
    return found


PASSES = {
    ("lfmcw", "first"): 8, ("lfmcw", "second"): 17, ("darts", "first"): 2, ("darts", "second"): 5,
    ("real", "first"): 5, ("real", "second"): 11,
}  # fmt: skip
"""Method and order → passes through a supernet per round, forward and backward; W1, both moves of
the discriminator and of the generator, W2 on real and generated images, and A take one or two each.
Real: LFM-CW with generator real, which has no game.
"""

LONG_PASS = 0.2
"""Seconds of a pass that is long enough to give the time per image."""


def rough_seconds(
    recipe: Recipe, dataset: Dataset, device: torch.device, *, searches: bool = True
) -> float:
    """What a run takes, roughly, from one pass through each of its networks, in seconds.

    `project` is more accurate, but two rounds of each phase can take minutes. The random state does
    not change.
    """
    how, trained = recipe.search, recipe.evaluation
    shape = (dataset.channels, dataset.image_size, dataset.image_size)
    seconds = 0.0
    with preserved():
        if searches and how.method != "random":
            half, _ = search_part_labels(recipe, dataset)
            per_round = PASSES["real" if how.draws_real else how.method, how.order]
            passes = per_round * search_rounds(how, len(half)) * how.batch_size
            plain = how.model_copy(update={"method": "darts"})
            for stage in search_stages(how):
                modules = build_modules(plain, dataset, layers=stage.layers, device=device)
                searched = partial(_searched, modules.w2.network, modules.arch)
                seconds += passes * _seconds_per_image(searched, shape, how.batch_size, device)
        if not recipe.trains:
            return seconds
        optimizer, rounds = build_training(recipe, None, dataset, device)
        derived = partial(_derived, optimizer.problems["network"].module)
        per_image = _seconds_per_image(derived, shape, trained.batch_size, device)
    return seconds + rounds * trained.batch_size * per_image


def _searched(network: nn.Module, arch: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images, arch())
    return logits


def _derived(network: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = network(images)[0]
    return logits


def _seconds_per_image(
    forward: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
) -> float:
    """Seconds of a forward and backward pass per image of a batch."""
    # The batch grows until a pass takes long enough, because small batches take longer per image.
    size = 2
    while True:
        images = torch.randn(size, *shape, device=device)
        # The faster of two: other work on the machine may have stopped one of them.
        seconds = math.inf
        for _ in range(2):
            _synchronize(device)
            began = time.perf_counter()
            forward(images).square().mean().backward()  # type: ignore[no-untyped-call]
            _synchronize(device)
            seconds = min(seconds, time.perf_counter() - began)
        if seconds > LONG_PASS or size >= batch_size:
            return seconds / size
        size = min(4 * size, batch_size)


def after_projection(
    recipe: Recipe,
    measure: Callable[[], list[Projection]],
    console: Console,
    *,
    dry_run: bool,
    max_steps: int | None,
) -> Recipe | None:
    """Prints the projection with which a dry run or a trial begins.

    Args:
        recipe: of the whole run.
        measure: projects it.
        console: where it is printed.
        dry_run: whether to stop after it.
        max_steps: rounds of each phase of a trial.

    Returns:
        The recipe to run, if any.
    """
    if (dry_run or max_steps is not None) and not phases_of(recipe):
        say(
            console,
            "Nothing to project: cells are drawn at random, and the test error is looked up.",
        )
    elif dry_run or max_steps is not None:
        console.print("Measuring two rounds of each phase …", highlight=False)
        _print(measure(), console)
    if dry_run:
        return None
    if max_steps is None:
        return recipe
    console.print(
        f"A trial with a meaningless result; rounds of each phase: {max_steps}.", highlight=False
    )
    return trial(recipe, max_steps)


def _without_warmup(recipe: Recipe) -> Recipe:
    """The recipe of a search whose architecture moves from the first round on."""
    architecture = recipe.search.architecture.model_copy(update={"warmup_epochs": 0})
    search = recipe.search.model_copy(update={"architecture": architecture})
    return recipe.model_copy(update={"search": search})


def _most_costly(candidates: Candidates, dropped: int) -> Candidates:
    """The operations that each edge keeps: those with the most weights."""

    def left(edge: tuple[str, ...]) -> tuple[str, ...]:
        # If they tie, the last ones are kept: in DARTS's order pools and identities come first.
        by_size = sorted(edge, key=lambda name: (name != "none", primitive_weights(name, 16, 1)))
        kept = by_size[dropped:]
        return tuple(name for name in edge if name in kept)

    return Candidates(
        normal=tuple(map(left, candidates.normal)),
        reduction=tuple(map(left, candidates.reduction)),
    )


def _measured(phase: PlannedPhase, device: torch.device) -> Projection:
    optimizer = phase.build()
    optimizer.step()  # fills caches; not measured
    _synchronize(device)
    began = time.perf_counter()
    optimizer.step()
    _synchronize(device)
    seconds = time.perf_counter() - began
    return Projection(
        name=phase.name, rounds=phase.rounds, seconds=seconds, memory=_peak_memory(device)
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_choice(
    recipe: Recipe, dataset: Dataset, device: torch.device, console: Console, *, searches: bool
) -> None:
    """Says which preset was chosen if none was named, and roughly what it takes.

    It does so only if the choice is not obvious: for a folder, and for the paper's settings, which
    take days.
    """
    alone = rank_and_size()[1] == 1  # processes that wait for one another take different times
    has_gpu, is_folder = device.type == "cuda", recipe.dataset.startswith(FOLDER)
    chosen = recipe.preset == default_preset(recipe.dataset, cuda=has_gpu)  # no file named another
    if not alone or not chosen or not (is_folder or recipe.preset == "paper"):
        return
    why = "the default of this data set"
    if is_folder and recipe.preset == "paper":
        why = f"chosen because there is a GPU, and the folder has {LARGE_FOLDER:,} files or more"
    elif is_folder:
        few = f"the folder has fewer than {LARGE_FOLDER:,} files"
        why = f"chosen because {few if has_gpu else 'there is no GPU'}"
    time_taken = " ".join(duration(rough_seconds(recipe, dataset, device, searches=searches)))
    others = {
        "small": "--preset paper has the paper's settings, which take days on a GPU",
        "paper": "--preset small is a complete experiment in miniature",
        "smoke": "--preset small is a complete experiment in miniature",
    }
    say(
        console,
        f"Preset {recipe.preset}, {why}. It takes about {time_taken}. {others[recipe.preset]}; "
        "--dry-run projects time and memory.",
    )


def _print(projections: list[Projection], console: Console) -> None:
    """Prints one row per phase, and the sum."""
    table = Table(title="projected from two rounds of each phase", title_justify="left")
    for column in ("phase", "rounds", "seconds per round", "time"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in projections:
        table.add_row(
            phase.name,
            f"{phase.rounds:,}",
            f"{phase.seconds:.3g}",
            " ".join(duration(phase.rounds * phase.seconds)),
        )
    total = sum(phase.rounds * phase.seconds for phase in projections)
    table.add_section()
    table.add_row("all", "", "", " ".join(duration(total)))
    print_table(console, table)
    peak = max(phase.memory for phase in projections)
    console.print(f"peak memory {peak:.1f} GB", highlight=False)
