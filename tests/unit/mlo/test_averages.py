"""Averages of iterates: their weights, their state, and how they are read."""

from __future__ import annotations

import copy

import pytest
import torch
from small_blocks import LOWER, UPPER, Blocks

import mlo
from mlo.averages import Averages, average_from
from mlo.testing import identical, relative_error


def averaged(average, values):
    """The average of numbers after each of them."""
    averages = Averages(average)
    for value in values:
        parameters = {"p": torch.tensor([value], dtype=torch.float64)}
        averages.take(parameters)
        yield float(averages.values(parameters)["p"])


VALUES = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, 5.0, 3.5, 8.0, -9.0, 7.0]


def test_an_exponential_mean_has_weights_that_sum_to_one():
    for count, mean in enumerate(averaged(mlo.Ema(decay=0.8), VALUES), start=1):
        weights = [0.8 ** (count - 1 - k) for k in range(count)]
        expected = sum(w * v for w, v in zip(weights, VALUES[:count], strict=True)) / sum(weights)
        assert mean == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("begin", [0, 5])
def test_a_tail_average_begins_after_so_many_updates(begin):
    for count, mean in enumerate(averaged(mlo.TailAverage(begin=begin), VALUES), start=1):
        tail = VALUES[begin:count] or [VALUES[count - 1]]
        assert mean == pytest.approx(sum(tail) / len(tail), rel=1e-12)


def test_a_tail_average_covers_the_last_half_or_more():
    """From half a power of two on; of the updates that is between 1/2 and 3/4."""
    values = [float(k * k % 17) for k in range(100)]
    for count, mean in enumerate(averaged(mlo.TailAverage(), values), start=1):
        begun = max(1, 2 ** (count.bit_length() - 1) // 2)
        tail = values[begun - 1 : count]
        assert mean == pytest.approx(sum(tail) / len(tail), rel=1e-10)
        assert 0.5 <= len(tail) / count <= 0.75 + 1.0 / count


def test_half_precision_is_averaged_in_single():
    averages = Averages(mlo.Ema(decay=0.999))
    for value in [1.0] * 1000 + [1.5] * 200:
        parameters = {"p": torch.tensor([value], dtype=torch.bfloat16)}
        averages.take(parameters)
    assert averages.values(parameters)["p"].dtype == torch.bfloat16
    assert float(averages.kept["p"]["mean"]) == pytest.approx(1.13, abs=0.02)


# ------------------------------ in a run


def run_of(average, rounds=0):
    blocks = Blocks()
    optimizer = blocks.optimizer(
        mlo.Soba(step_size="lower"),
        blocks.drawn(LOWER, 40),
        blocks.drawn(UPPER, 40),
        alpha=0.05,
        gamma=0.03,
        x={"average": average},
    )
    list(optimizer.run(rounds))
    return optimizer


def test_the_average_of_a_run_is_read_and_evaluated():
    optimizer = run_of(mlo.TailAverage(begin=0))
    start = optimizer.problems["x"].module.v.detach().clone()
    assert torch.equal(optimizer.averages["x"]["v"], start)
    seen = [optimizer.problems["x"].module.v.detach().clone() for _ in optimizer.run(9)]
    assert set(optimizer.averages) == {"x"}
    expected = torch.stack(seen).mean(0)
    assert relative_error(optimizer.averages["x"]["v"], expected) < 1e-12
    with optimizer.averaged():
        assert relative_error(optimizer.problems["x"].module.v, expected) < 1e-12
    assert torch.equal(optimizer.problems["x"].module.v.detach(), seen[-1])


def test_an_average_changes_nothing_in_a_run():
    plain, with_average = run_of(None, 12), run_of("tail", 12)
    assert identical(
        plain.problems["x"].module.state_dict(), with_average.problems["x"].module.state_dict()
    )


@pytest.mark.parametrize("average", ["ema", "tail"])
def test_a_run_with_an_average_resumes_bit_for_bit(average):
    whole, part, resumed = run_of(average, 12), run_of(average, 5), run_of(average)
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    list(resumed.run(7))
    assert identical(whole.averages, resumed.averages)
    assert identical(whole.state_dict()["problems"], resumed.state_dict()["problems"])


def test_a_state_without_its_average_is_refused():
    with pytest.raises(mlo.CheckpointError, match="saved without an average"):
        run_of("ema").load_state_dict(run_of(None).state_dict())


def test_an_update_that_is_left_out_is_not_averaged():
    optimizer = run_of("ema", 3)
    optimizer.on_nonfinite = "skip"
    before = optimizer.averages
    loss = optimizer.problems["x"].loss
    optimizer.problems["x"].loss = lambda m, batch, *, z: torch.inf * loss(m, batch, z=z)
    optimizer.step()
    assert identical(before, optimizer.averages)


# ------------------------------ refusals


@pytest.mark.parametrize("choice", ["mean", 0.9])
def test_an_unknown_average_is_refused(choice):
    with pytest.raises(mlo.ProblemError, match=r"must be an mlo\.Ema"):
        average_from("w", choice)


def test_options_outside_their_range_are_refused():
    with pytest.raises(mlo.ConfigurationError, match="decay of at least 0 and below 1"):
        mlo.Ema(decay=1.0)
    with pytest.raises(mlo.ConfigurationError, match="must begin after 0 or more updates"):
        mlo.TailAverage(begin=-1)
