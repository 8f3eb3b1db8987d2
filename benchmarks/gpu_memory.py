"""Makes the table of docs/gpus.md: the GPU memory of the paper's recipes, and which card they fit.

Everything is counted on PyTorch's meta device: no GPU is needed, and no data. A recipe that does
not fit every card is also counted at half its batch. The memory of other batches is on the line
through both. Rows are printed as they are counted, and take about ten minutes of a quiet core in
all.

    python benchmarks/gpu_memory.py
    python benchmarks/gpu_memory.py --only "first order"
    python benchmarks/gpu_memory.py --preset small --dataset digits
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lfmcw_app.data_checks import read_data
from lfmcw_app.memory_projection import CARDS, META, ROOM, count_phase, fits, largest_batch
from lfmcw_app.projection import planned_phases
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import load_recipe

DARTS, FIRST = {"search.method": "darts"}, {"search.order": "first"}
SECOND = {"search.order": "second"}
CASES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "DARTS, first order": ("darts", "search", DARTS | FIRST),
    "DARTS, second order": ("darts", "search", DARTS | SECOND),
    "LFM-CW, first order": ("darts", "search", FIRST),
    "LFM-CW, second order": ("darts", "search", SECOND),
    "LFM-CW, second order, checkpointing": (
        "darts", "search", SECOND | {"search.checkpointing": True}
    ),
    "LFM-CW with PC-DARTS, first order": ("pcdarts", "search", FIRST),
    "LFM-CW with PC-DARTS, second order": ("pcdarts", "search", SECOND),
    "training of the derived network": ("darts", "evaluation", {}),
}  # fmt: skip
"""Row → search space, section of the recipe, and settings."""


def peak(recipe: Recipe, section: str) -> int:
    """Peak memory of the last phase of a section, in bytes."""
    recipe, dataset = read_data(recipe, Path("data"), device=META)
    planned = planned_phases(recipe, dataset, META, searches=section == "search")
    *_, last = (phase for phase in planned if phase.section == section)
    return count_phase(last).peak


def row(name: str, preset: str, dataset: str) -> str:
    """A row of the table: batch, peak, and for each card whether it fits or which batch does."""
    space, section, settings = CASES[name]
    batch = getattr(load_recipe(preset, space=space), section).batch_size

    def counted(size: int) -> int:
        overrides = {"dataset": dataset, **settings, f"{section}.batch_size": size}
        return peak(load_recipe(preset, space=space, overrides=overrides), section)

    batches, high = (batch // 2, batch), counted(batch)
    cards = ["✓"] * len(CARDS)
    if not fits(high, min(CARDS)):
        peaks = (counted(batches[0]), high)
        cards = [
            "✓" if fits(high, card) else str(largest_batch(batches, peaks, card) or "–")
            for card in CARDS
        ]
    return f"| {name} | {batch} | {high / 1e9:.1f} | {' | '.join(cards)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"Computed, not measured: torch {torch.__version__}, preset {args.preset}, {args.dataset}"
    )
    print(
        f"✓: the batch of the recipe takes at most {ROOM:.0%} of the card; otherwise the largest "
        "batch"
    )
    print(f"\n| | batch | peak GB | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print(f"|{'---|' * (3 + len(CARDS))}", flush=True)
    for name in CASES:
        if args.only in name:
            print(row(name, args.preset, args.dataset), flush=True)


if __name__ == "__main__":
    main()
