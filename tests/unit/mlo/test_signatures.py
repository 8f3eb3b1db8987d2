"""What a problem's functions read, from their signatures."""

from __future__ import annotations

import functools

import pytest
from small_graphs import graph, problem
from torch import nn

import mlo


def test_reads_are_found_in_any_callable():
    """Reads are found in partials, methods, callable objects and modules."""

    def loss(own, batch, *, w, scale):
        return own.v.sum() * scale

    class Callable:
        def __call__(self, own, batch, *, w):
            return own.v.sum()

        def method(self, own, batch, *, w):
            return own.v.sum()

    class Criterion(nn.Module):
        def forward(self, own, batch, *, w):
            return own.v.sum()

    class OwnCall(nn.Module):
        def __call__(self, own, batch, *, w):
            return own.v.sum()

    partial = functools.partial(loss, scale=2.0)
    modules = Criterion(), functools.partial(Criterion()), OwnCall()
    for function in (partial, Callable(), Callable().method, *modules):
        assert graph(problem("w"), problem("x", function)).reads_below["x"] == ("w",)


def test_a_loss_with_a_double_star_is_asked_for_a_list():
    with pytest.raises(mlo.ProblemError, match=r"reads=\['task0', 'task1', \.\.\.\]"):
        problem("up", lambda own, _, **tasks: own.v.sum())
    problem("up", lambda own, _, **tasks: own.v.sum(), reads=[])


@pytest.mark.parametrize(
    ("reads", "message"),
    [(["task"], r"reads= names 'task'.*Add \*\*problems"), ("task", "must be a list")],
)
def test_a_list_of_reads_that_cannot_be_passed_is_refused(reads, message):
    with pytest.raises(mlo.ProblemError, match=message):
        problem("up", lambda own, _, *, other: own.v.sum(), reads=reads)
