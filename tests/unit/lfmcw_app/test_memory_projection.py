"""A recipe's GPU memory without a GPU: counted, and told which cards it fits."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import lfmcw_app.memory_projection as projected
from lfmcw_app.counted_memory import BLOCK
from lfmcw_app.errors import InputError
from lfmcw_app.memory_projection import (
    CountedPhase,
    count_memory,
    count_phase,
    fits,
    largest_batch,
    print_memory,
)
from lfmcw_app.projection import planned_phases
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.testing import noise_dataset

SMALL = {
    "search.channels": 4,
    "search.nodes": 1,
    "search.steps": 11,
    "search.batch_size": 4,
    "search.order": "first",
    "search.primitives": ["none", "skip_connect", "sep_conv_3x3"],
    "search.generator.channels": 4,
    "evaluation.channels": 2,
    "evaluation.epochs": 3,
    "evaluation.batch_size": 4,
}
DARTS = {**SMALL, "search.method": "darts"}


def small_recipe(**settings):
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return load_recipe("smoke", overrides={**DARTS, **dotted})


def counted(**settings):
    """What was counted of a search; its training is left out."""
    planned = planned_phases(small_recipe(**settings), noise_dataset(size=8), projected.META)
    return count_phase(planned[0])


def test_every_phase_is_counted_and_no_number_is_needed():
    recipe, dataset = small_recipe(), noise_dataset(size=8)
    found = count_memory(recipe, dataset)
    assert [(phase.name, phase.rounds) for phase in found] == [("search", 11), ("training", 18)]
    assert all(0 < phase.held < phase.peak for phase in found)
    # The count is a function of the recipe; bfloat16 is counted in float32.
    of_training = small_recipe(evaluation__precision="bf16")
    assert count_memory(of_training, dataset, searches=False) == found[1:]


def test_what_is_held_is_parameters_optimizers_and_images():
    recipe, dataset = load_recipe("smoke", overrides=DARTS), noise_dataset(size=16)
    (training,) = count_memory(recipe, dataset, searches=False)
    (planned,) = planned_phases(recipe, dataset, torch.device("cpu"), searches=False)
    network = planned.build().problems["network"].module

    def blocks(*tensors):
        return sum(-(-t.numel() * t.element_size() // BLOCK) * BLOCK for t in tensors)

    images = blocks(dataset.train.pixels, dataset.train.labels)
    # The weights have a momentum each.
    known = 2 * blocks(*network.parameters()) + blocks(*network.buffers()) + images
    # Beside these a copy of the buffers, of before the round, and a few single numbers.
    most = known + blocks(*network.buffers()) + 40 * BLOCK
    assert known <= training.held <= most


@pytest.mark.slow
def test_the_peak_grows_with_the_batch_in_a_straight_line():
    peaks = [counted(search__batch_size=size).peak for size in (4, 8, 12)]
    assert peaks[0] < peaks[1] < peaks[2]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.02)


def test_checkpointed_cells_take_less_at_the_peak():
    size = {"search__batch_size": 12, "search__channels": 8}
    plain, checkpointed = counted(**size), counted(**size, search__checkpointing=True)
    assert checkpointed.held == plain.held
    assert checkpointed.peak < 0.8 * plain.peak


@pytest.mark.parametrize("engine", ["one_step", "darts", {"name": "cg", "max_steps": 1}], ids=str)
def test_engines_that_read_numbers_are_counted(engine):
    found = counted(search__order="second", search__hypergradient=engine)
    assert found.peak > found.held > 0


def test_a_phase_that_needs_numbers_is_refused(monkeypatch):
    class Chooses:
        def step(self):
            torch.empty(3, device="meta").nonzero()

    planned = projected.PlannedPhase(name="mine", section="search", rounds=1, build=Chooses)
    monkeypatch.setattr(projected, "planned_phases", lambda *arguments, **options: [planned])
    with pytest.raises(InputError, match=r"memory of mine cannot be counted .*one_step"):
        count_memory(small_recipe(), noise_dataset(size=8))


def test_a_card_has_room_for_what_is_not_counted():
    assert fits(0.85 * 16 * 2**30, 16)
    assert not fits(0.86 * 16 * 2**30, 16)
    assert fits(0.86 * 16 * 2**30, 24)


def test_the_largest_batch_follows_the_line():
    gib = 2**30
    # 1 GiB of weights, and 0.1 GiB per image: (0.85 · 16 − 1) / 0.1 is 126.
    peaks = [int((1 + 0.1 * batch) * gib) for batch in (16, 32)]
    assert largest_batch((16, 32), peaks, 16) == 120
    assert largest_batch((16, 32), peaks, 24) == 192
    assert largest_batch((16, 32), [peak + 12 * gib for peak in peaks], 16) is None


@pytest.mark.parametrize(
    ("peak", "precision", "words"),
    [
        (
            10.0,
            None,
            [
                "It fits a card of 16 GB, 24 GB, 40 GB, 80 GB, if the counted memory may take 85%",
                "Not counted:",
            ],
        ),
        (30.0, "bf16", ["It fits a card of 40 GB, 80 GB,", "Counted in float32, .*: evaluation"]),
        (90.0, None, ["It fits none of these cards"]),
    ],
)
def test_what_fits_is_said(peak, precision, words):
    output = io.StringIO()
    recipe = load_recipe("smoke", overrides={"evaluation.precision": precision})
    phases = [
        CountedPhase(name="search", rounds=1000, held=10**9, peak=int(peak * 1e9)),
        CountedPhase(name="training", rounds=10, held=10**8, peak=10**9),
    ]
    print_memory(recipe, phases, Console(file=output, width=300))
    text = " ".join(output.getvalue().split())
    rows = [line.split() for line in output.getvalue().splitlines() if line.startswith("│")]
    assert rows[0][1::2] == ["search", "1,000", "1.00", f"{peak:.2f}"]
    for part in words:
        head, _, tail = part.partition(" .*")
        assert head in text and tail in text


def test_a_run_without_phases_has_nothing_to_count():
    output = io.StringIO()
    print_memory(load_recipe("smoke"), [], Console(file=output, width=300))
    assert "Nothing to count" in output.getvalue()
