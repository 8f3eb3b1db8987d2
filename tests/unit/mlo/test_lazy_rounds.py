"""Rounds that nobody asks for: nothing is made, and that is said."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

import mlo
from mlo.testing import bilevel_quadratic


def optimizer():
    return mlo.MultilevelOptimizer(bilevel_quadratic().problems)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda opt: opt.run(10), r"run\(steps=10\) made nothing.*for record in"),
        (lambda opt: opt.updates(rounds=3), r"updates\(rounds=3\) made nothing"),
    ],
    ids=["run", "updates"],
)
def test_rounds_that_nobody_asks_for_are_warned_of(call, said):
    opt = optimizer()
    with pytest.warns(mlo.SolveWarning, match=said) as caught:
        call(opt)
    assert [warning.filename for warning in caught] == [__file__]
    assert opt.round == 0


def test_a_loop_that_is_left_is_not_warned_of():
    opt = optimizer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in opt.run(10):
            break
        next(opt.updates(rounds=1))
        assert [record.round for record in opt.run(2)] == [2, 3]
        assert list(opt.run(0)) == []
        gc.collect()
    assert caught == []


def test_an_iterator_that_is_kept_makes_its_rounds_later():
    opt = optimizer()
    rounds = opt.run(2)
    assert iter(rounds) is rounds
    opt.step()
    # `steps` counts from when the first record is asked for.
    assert [record.round for record in rounds] == [2, 3]
    assert next(rounds, None) is None


@pytest.mark.parametrize("count", [0.5, 2.0, "3", None, True])
@pytest.mark.parametrize("call", ["run", "updates"])
def test_a_number_of_rounds_is_an_integer(call, count):
    with pytest.raises(mlo.ConfigurationError, match=rf"{call}\(.*={count!r}\).*an integer"):
        getattr(optimizer(), call)(count)


def test_an_integer_of_a_library_is_a_number_of_rounds():
    assert len(list(optimizer().run(torch.tensor(2)))) == 2
