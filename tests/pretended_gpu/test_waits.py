"""How often a round waits for the device: once per update, to see whether numbers are lost; and
where a solve decides by its residual how far it goes.
"""

from __future__ import annotations

import pytest
import torch
from gpu_cases import on_device, search

import mlo
from lfmcw_app.data import Batches, load_dataset, resident
from lfmcw_app.recipe import Augmentation
from mlo.testing import bilevel_quadratic

DECIDED_ON_THE_DEVICE = ("first_order", "one_step", "darts")
"""Engines that take no decision in Python."""


def waits_of_a_round(gpu, optimizer, *, settled=4):
    """The waits of the fifth round: checks are made in rounds 1, 2, 4 and 8."""
    for _ in range(settled):
        optimizer.step()
    with gpu.watched() as seen:
        optimizer.step()
    return seen.waits


@pytest.mark.parametrize("engine", DECIDED_ON_THE_DEVICE)
def test_an_engine_waits_for_nothing(gpu, engine):
    closed = bilevel_quadratic()
    on_device(closed, torch.device("cuda"))
    optimizer = closed.optimizer(engine)
    optimizer.on_nonfinite = None
    assert waits_of_a_round(gpu, optimizer) == []


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
    waits = waits_of_a_round(gpu, optimizer)
    assert len(waits) == updates, waits
    optimizer.on_nonfinite = None
    assert waits_of_a_round(gpu, optimizer, settled=0) == []


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
