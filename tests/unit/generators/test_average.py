"""The moving average of weights."""

from __future__ import annotations

import torch
from generator_cases import make_generator

from lfmcw_app.generators.average import MovingAverage


def test_the_average_starts_late_and_moves_by_a_share():
    """The average is the weights themselves until it starts, and moves by a share afterwards."""
    average = MovingAverage({"a.b": torch.zeros(2)}, decay=0.9, start=2)
    for value, expected in ((1.0, 1.0), (2.0, 2.0), (3.0, 0.9 * 2.0 + 0.1 * 3.0)):
        average.update({"a.b": torch.full((2,), value)})
        assert torch.allclose(average.tensors()["a.b"], torch.full((2,), expected))


def test_several_calls_are_one_update_of_the_average():
    """Several calls with the same weights are one update of the average."""
    once, parts = (
        MovingAverage({"a": torch.zeros(2, dtype=torch.float64)}, decay=0.9, start=1)
        for _ in range(2)
    )
    for value in (1.0, 2.0, 4.0):
        tensors = {"a": torch.full((2,), value, dtype=torch.float64)}
        once.update(tensors)
        for _ in range(4):
            parts.update(tensors, parts=4)
    assert torch.allclose(parts.tensors()["a"], once.tensors()["a"], rtol=1e-12)
    assert not torch.allclose(once.tensors()["a"], tensors["a"])


def test_the_average_has_no_parameters():
    generator = make_generator("biggan")
    assert not any(name.startswith("average") for name, _ in generator.named_parameters())
