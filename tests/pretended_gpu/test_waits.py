"""How often a round waits for the device: once per update, to see whether numbers are lost; and
where a solve decides by its residual how far it goes.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gpu_cases import on_device, search

import mlo
from lfmcw_app.data import Batches, load_dataset, resident
from lfmcw_app.recipe import Augmentation
from mlo.hypergradient import available_engines
from mlo.tensors import have_same_values
from mlo.testing import bilevel_quadratic

GPUS = Path(__file__).parents[2] / "docs" / "gpus.md"
ENGINES = [name for name in available_engines() if not name.startswith("betty-")]


def waits_of_a_round(gpu, optimizer, *, settled=4):
    """The waits of the fifth round, and its record: checks are made in rounds 1, 2, 4 and 8."""
    for _ in range(settled):
        optimizer.step()
    with gpu.watched() as seen:
        record = optimizer.step()
    return seen.waits, record


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_the_waits_of_an_engine_are_those_of_its_page(gpu, engine):
    (row,) = re.findall(rf"^\| `{engine}` \| (\d+) \| (\d+) \|", GPUS.read_text("utf-8"), re.M)
    closed = bilevel_quadratic()
    on_device(closed, torch.device("cuda"))
    optimizer = closed.optimizer(engine)
    optimizer.on_nonfinite = None
    waits, record = waits_of_a_round(gpu, optimizer)
    products = sum(solve.iterations for solve in record.solves.values())
    assert (len(waits), products) == tuple(map(int, row)), waits


def test_values_of_many_tensors_are_compared_in_one_wait(gpu):
    values = [torch.arange(3.0).to("cuda") for _ in range(4)]
    others = [value.clone() for value in values]
    with gpu.watched() as seen:
        assert have_same_values(values, others)
    assert len(seen.waits) == 1
    others[2] += 1
    assert not have_same_values(values, others)


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"order": "first"}, 4),
        ({"order": "second", "hypergradient": "darts"}, 4),
        ({"order": "second", "method": "darts"}, 2),
    ],
    ids=["lfmcw-first", "lfmcw-darts", "darts-one_step"],
)
def test_a_search_waits_once_per_update(gpu, options, updates):
    optimizer = search(torch.device("cuda"), torch.float32, nodes=1, **options)
    waits, _ = waits_of_a_round(gpu, optimizer)
    assert len(waits) == updates, waits
    optimizer.on_nonfinite = None
    waits, _ = waits_of_a_round(gpu, optimizer, settled=0)
    assert waits == []


def test_reading_all_of_a_record_waits_once_per_dtype(gpu):
    record = mlo.Record(round=1)
    values = torch.arange(6.0).to("cuda")
    record.add(
        "gan",
        loss={"generator": values[1], "discriminator": values[2]},
        metrics={"weights": values[3:], "count": torch.tensor(7).to("cuda")},
        gradient_norm=values[4],
        player_norms={"generator": values[5]},
    )
    with gpu.watched() as seen:
        assert record.losses == {"gan": {"generator": 1.0, "discriminator": 2.0}}
        assert record.metrics == {"gan": {"weights": [3.0, 4.0, 5.0], "count": 7}}
        assert record.gradient_norms == {"gan": 4.0}
        assert record.player_gradient_norms == {"gan": {"generator": 5.0}}
    assert len(seen.waits) == 2, seen.waits


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"flip": True},
        {"flip": True, "resized_crop": True, "color_jitter": (0.4, 0.4, 0.4, 0.2)},
        {"crop_padding": 2, "flip": True, "cutout": 4},
    ],
    ids=lambda how: ", ".join(how) or "plain",
)
def test_a_batch_waits_for_nothing(gpu, how):
    data, how = load_dataset("digits"), Augmentation(**how)
    images = resident(data.train, how, "cuda")
    batches = Batches(images, data, batch_size=8, seed=3, augmentation=how, device="cuda")
    batches.batch(0)
    with gpu.watched() as seen:
        batches.batch(1)
    assert seen.waits == []
