"""Sums over solves: means, what was used, and a state of plain values."""

from __future__ import annotations

import io

import pytest
import torch

import mlo
from mlo.solve_sums import SolveSums
from mlo.testing import Vector


def gradients(values):
    """A total gradient at each value of a parameter a; b is used from the second one on."""
    module = torch.nn.ParameterDict({k: Vector(torch.ones(2)).v for k in "ab"})
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)

    def loss(module, batch):
        total = (batch * module["a"]).sum()
        if batch > 1:
            total = total + (batch * module["b"]).sum()
        return total, {"value": batch, "half": float(batch) / 2.0, "name": f"batch {batch:g}"}

    problem = mlo.Problem("p", module=module, optimizer=sgd, loss=loss)
    optimizer = mlo.MultilevelOptimizer([problem])
    for value in values:
        yield optimizer._now.differentiate("p", (torch.tensor(value),))


def test_means_over_the_solves_that_were_added():
    sums = SolveSums()
    for found in gradients([1.0, 2.0, 6.0]):
        sums.add(found)
    mean = sums.mean(found)
    assert sums.count == 3
    assert torch.equal(mean.gradient["a"], torch.full((2,), 3.0))
    assert torch.allclose(mean.gradient["b"], torch.full((2,), 8.0 / 3.0))
    assert mean.unused == frozenset()
    assert float(mean.losses["p"]) == pytest.approx((2.0 + 8.0 + 24.0) / 3.0)
    assert float(mean.metrics["value"]) == 3.0
    assert mean.metrics["half"] == 1.5
    assert mean.metrics["name"] == "batch 6"


def test_a_metric_is_averaged_over_the_solves_that_returned_it():
    sums = SolveSums()
    for found in gradients([1.0, 2.0, 6.0]):
        if float(found.metrics["value"]) == 2.0:
            del found.metrics["half"]
        sums.add(found)
        sums = SolveSums.from_state_dict(sums.state_dict(), torch.device("cpu"))
    assert sums.mean(found).metrics["half"] == (0.5 + 3.0) / 2


def test_what_no_solve_used_stays_unused():
    sums = SolveSums()
    for found in gradients([1.0, 1.0]):
        sums.add(found)
    assert sums.mean(found).unused == {"b"}


def test_a_state_is_of_tensors_and_plain_values():
    sums = SolveSums()
    first, second = gradients([1.0, 3.0])
    sums.add(first)
    file = io.BytesIO()
    torch.save(sums.state_dict(), file)
    file.seek(0)
    loaded = SolveSums.from_state_dict(
        torch.load(file, weights_only=True), device=torch.device("cpu")
    )
    sums.add(second), loaded.add(second)
    one, other = sums.mean(second), loaded.mean(second)
    assert all(torch.equal(one.gradient[k], other.gradient[k]) for k in one.gradient)
    assert one.losses == other.losses
    assert one.metrics == other.metrics
    assert one.unused == other.unused
