"""A loss that is evaluated again is compared with the value that it had."""

from __future__ import annotations

import warnings

import pytest
import torch

from mlo.errors import ProblemError, SolveWarning
from mlo.replays import check_replay, check_stand_ins

DOUBLE = [torch.float64]


def values(*numbers, dtype=torch.float64):
    """A function that returns these losses one after another, then the last again."""
    left = list(numbers)

    def evaluate():
        number = left.pop(0) if len(left) > 1 else left[0]
        return {"w": torch.tensor(number, dtype=dtype)}

    return evaluate


def recorded(number, dtype=torch.float64):
    return {"w": torch.tensor(number, dtype=dtype)}


def test_an_equal_value_is_evaluated_once():
    calls = []
    assert check_replay("w", recorded(2.0), lambda: calls.append(1) or recorded(2.0), DOUBLE)
    assert len(calls) == 1


def test_without_a_recorded_value_two_replays_are_compared():
    assert check_replay("w", {}, values(2.0), DOUBLE)
    with pytest.warns(SolveWarning, match="'w' is 2 and, evaluated again at the same point, 3"):
        assert not check_replay("w", {}, values(2.0, 3.0), DOUBLE)


def test_a_value_that_changed_and_stays_names_both():
    with pytest.warns(SolveWarning, match="'w' was 2 when the problem moved, and is 3 now"):
        assert not check_replay("w", recorded(2.0), values(3.0), DOUBLE)


def test_a_value_that_changes_at_every_call_is_told_as_state():
    with pytest.warns(SolveWarning, match="'w' is 3 and, evaluated again at the same point, 4"):
        assert not check_replay("w", recorded(2.0), values(3.0, 4.0), DOUBLE)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)],
)
def test_differences_of_rounding_are_none(dtype, rounding):
    """Of the loss's dtype, or of the coarsest in which it is computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_replay("w", recorded(2.0), values(2.0 * (1.0 + rounding)), [dtype])
    with pytest.warns(SolveWarning):
        assert not check_replay("w", recorded(2.0), values(2.0 * (1.0 + 100.0 * rounding)), [dtype])


def test_only_players_that_were_evaluated_are_compared():
    both = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert check_replay("game", {"a": torch.tensor(1.0)}, lambda: both, [torch.float32])


def test_another_value_with_stand_ins_is_refused():
    with pytest.raises(ProblemError, match="'w' is 3 with the parameters in their modules, and 2"):
        check_stand_ins("w", recorded(2.0), values(3.0), [values(5.0), values(2.0)], DOUBLE)
    assert check_stand_ins("w", recorded(2.0), values(2.0), [values(2.0)], DOUBLE)


@pytest.mark.parametrize(
    ("in_place", "with_stand_ins", "message"),
    [
        ((3.0, 4.0), (2.0,), "is 3 and, evaluated again at the same point, 4"),
        ((3.0,), (5.0,), "is 2 and, evaluated again at the same point, 3"),
    ],
)
def test_a_loss_that_keeps_state_tells_nothing_of_stand_ins(in_place, with_stand_ins, message):
    stand_ins = [values(*with_stand_ins)]
    with pytest.warns(SolveWarning, match=f"{message}. It keeps state"):
        assert not check_stand_ins("w", recorded(2.0), values(*in_place), stand_ins, DOUBLE)


@pytest.mark.parametrize(("calls", "told"), [(1, "once more"), (3, "3 times .* more")])
def test_a_loss_that_is_not_replayed_is_evaluated_once(calls, told):
    evaluated = []

    def in_place():
        evaluated.append(None)
        return recorded(3.0)

    with pytest.warns(SolveWarning, match=f"'w' is 2 .*, 3. .* calling the loss {told} than its"):
        assert not check_stand_ins("w", recorded(2.0), in_place, [], DOUBLE, calls=calls)
    assert check_stand_ins("w", recorded(3.0), in_place, [], DOUBLE)
    assert len(evaluated) == 2
