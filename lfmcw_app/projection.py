"""What a run will take, from one round of each of its phases on copies that are thrown away."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from lfmcw_app.data import Dataset, search_split
from lfmcw_app.modules import build_modules
from lfmcw_app.problems import build_search, search_rounds
from lfmcw_app.recipe import Recipe
from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.trainer import SearchStage, build_training, search_stages
from lfmcw_app.units import duration
from mlo import MultilevelOptimizer

__all__ = ["Projection", "print_projection", "project"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A phase of a run.

    Attributes:
        name: of the phase.
        rounds: how many it has.
        seconds: of one of them, the second one: the first also fills caches.
        memory: peak memory so far in GB: of the device, or on a CPU of the process.
    """

    name: str
    rounds: int
    seconds: float
    memory: float


def project(recipe: Recipe, dataset: Dataset, device: torch.device) -> list[Projection]:
    """Runs two rounds of every phase and returns what the phases will take.

    A stage of P-DARTS has the first of the operations that it will have as many of; which are left is not known.
    """
    how = recipe.search
    train, validation = search_split(dataset, recipe.data.search_images, recipe.seed, recipe.data.search_fractions)
    found = []
    dropped = 0
    for stage in search_stages(how):
        modules = build_modules(
            how, dataset, primitives=_candidates(stage, how.nodes, dropped), layers=stage.layers, device=device
        )
        optimizer = build_search(recipe, dataset, train, validation, modules, device=device)
        # In the rounds of a warm-up the architecture rests, which is cheaper.
        optimizer.round = how.architecture.warmup_epochs * (len(train) // how.batch_size)
        found.append(_measured(stage.name, search_rounds(how, len(train)), optimizer, device))
        dropped += stage.drops.drops if stage.drops is not None else 0
        del modules, optimizer
    training, rounds = build_training(recipe, None, dataset, device)
    found.append(_measured("training", rounds, training, device))
    return found


def _candidates(stage: SearchStage, nodes: int, dropped: int) -> tuple[str, ...] | Candidates:
    if stage.name == "search":
        return PRIMITIVES
    kept = PRIMITIVES[dropped:]  # the convolutions, which cost most, come last
    return as_candidates(kept, nodes)


def _measured(name: str, rounds: int, optimizer: MultilevelOptimizer, device: torch.device) -> Projection:
    optimizer.step()
    _synchronize(device)
    began = time.perf_counter()
    optimizer.step()
    _synchronize(device)
    return Projection(name=name, rounds=rounds, seconds=time.perf_counter() - began, memory=_peak_memory(device))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_projection(projections: list[Projection], console: Console) -> None:
    """Prints a row a phase, and the sum."""
    table = Table(title="projected from two rounds of each phase", title_justify="left")
    for column in ("phase", "rounds", "seconds a round", "time"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in projections:
        table.add_row(
            phase.name, f"{phase.rounds:,}", f"{phase.seconds:.3g}", " ".join(duration(phase.rounds * phase.seconds))
        )
    total = sum(phase.rounds * phase.seconds for phase in projections)
    table.add_section()
    table.add_row("all", "", "", " ".join(duration(total)))
    console.print(table)
    console.print(f"peak memory {max(phase.memory for phase in projections):.1f} GB", highlight=False)
