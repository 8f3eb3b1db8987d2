"""Halves of a batch, from which the bias of a solve is estimated.

What the estimate finds is tried in tests/oracle/test_solves_on_batches.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mlo.hypergradient.batch_bias import halves_of, is_mean
from mlo.tensors import versions_of


@dataclass(frozen=True)
class Evaluated:
    """What halving needs to know of an evaluation."""

    batches: tuple
    random_states: tuple
    versions: tuple
    loss: str = "of the problem"


def evaluated(*batches):
    states = tuple(f"state {k}" for k in range(len(batches)))
    return Evaluated(batches, states, tuple(map(versions_of, batches)))


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.zeros(8, 2), True),
        ((torch.zeros(8, 2), torch.zeros(8)), True),
        ((torch.zeros(8, 2), torch.zeros(4)), False),
        (torch.zeros(7, 2), False),
        (torch.zeros(2, 2), False),
        (torch.tensor(1.0), False),
        ("text", False),
    ],
    ids=["tensor", "pair", "other lengths", "odd", "too few", "a number", "no tensor"],
)
def test_batches_that_can_be_halved(batch, found):
    assert (halves_of(evaluated(batch)) is not None) == found


def test_the_halves_of_a_batch_are_its_rows():
    images, labels = torch.arange(16.0).view(8, 2), torch.arange(8)
    first, second = halves_of(evaluated({"images": images, "labels": labels, "name": "x"}))
    for half, rows in ((first, slice(0, 4)), (second, slice(4, 8))):
        (batch,) = half.batches
        assert torch.equal(batch["images"], images[rows])
        assert torch.equal(batch["labels"], labels[rows])
        assert (batch["name"], half.loss) == ("x", "of the problem")


def test_both_halves_begin_with_the_random_state_of_the_batch():
    halves = halves_of(evaluated(torch.zeros(4)))
    assert [half.random_states for half in halves] == [("state 0",), ("state 0",)]


def test_the_versions_are_those_of_the_halves():
    """A change of the whole batch in place is a change of its halves, which are views."""
    batch = torch.zeros(4)
    first, second = halves_of(evaluated(batch))
    batch.add_(1.0)
    for half in (first, second):
        assert versions_of(half.batches[0]) != half.versions[0]


@pytest.mark.parametrize(("count", "each"), [(2, 1), (5, 2)])
def test_several_batches_are_divided_among_the_halves(count, each):
    """Of an odd number the last one is left out."""
    first, second = halves_of(evaluated(*[torch.full((3,), float(k)) for k in range(count)]))
    assert [int(batch[0]) for batch in first.batches] == list(range(each))
    assert [int(batch[0]) for batch in second.batches] == list(range(each, 2 * each))
    assert len(first.random_states) == len(first.versions) == each


@pytest.mark.parametrize(
    ("whole", "one", "other", "expected"),
    [
        (1.0, 0.5, 1.5, True),
        (2.0, 0.5, 1.5, False),
        (1.05, 0.5, 1.5, True),
        (-1.0, -0.5, -1.5, True),
        (0.0, 0.0, 0.0, True),
    ],
    ids=["mean", "sum", "nearly", "negative", "zero"],
)
def test_a_mean_is_told_from_a_sum(whole, one, other, expected):
    assert is_mean(*map(torch.tensor, (whole, one, other))) is expected
