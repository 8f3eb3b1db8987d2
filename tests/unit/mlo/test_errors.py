"""Errors and warnings: advice, choices, and where a warning points."""

from __future__ import annotations

import warnings

import pytest
import torch

import mlo
from mlo.errors import check_choice, nearest, warn_user
from mlo.testing import chain_of_three


def test_the_nearest_name_is_offered_with_all_others():
    found = nearest("neuman", ["cg", "neumann"])
    assert found == "Did you mean 'neumann'? Valid names: cg, neumann."


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Neumann", "neumann"),
        ("mnist", "fashion-mnist"),
        ("w3", "w2"),
        ("epochs", None),
        ("search", None),
    ],
)
def test_only_a_related_name_is_offered(given, meant):
    """In any case of letters, or as a part; half of the letters in common are no relation."""
    found = nearest(given, ["neumann", "fashion-mnist", "w2", "seed", "dataset"])
    assert ("Did you mean" in found) is (meant is not None)
    assert meant is None or f"Did you mean {meant!r}?" in found


def test_a_name_like_no_other_gets_the_list_only():
    assert nearest("xyz", ["neumann", "cg"]) == "Valid names: cg, neumann."
    assert nearest("xyz", []) == "Valid names: (none)."


def test_a_value_that_is_no_choice_is_refused_with_advice():
    check_choice("on_nonfinite", "skip", ["stop", "skip", None])
    check_choice("on_nonfinite", None, ["stop", "skip", None])
    with pytest.raises(
        mlo.ConfigurationError, match=r"order is 'lower'.*Did you mean 'lower_first'"
    ):
        check_choice("order", "lower", ["lower_first", "outermost_first"])


@pytest.mark.parametrize(
    "error", [mlo.ProblemError, mlo.GraphError, mlo.EngineError, mlo.ConfigurationError]
)
def test_a_users_mistake_is_a_value_error(error):
    assert issubclass(error, ValueError)


def test_lost_numbers_are_no_mistake_of_the_user():
    error = mlo.NonFiniteError("lost", problem="w", round=3, term="loss", data={"update": 4})
    assert isinstance(error, ArithmeticError) and not isinstance(error, ValueError)
    assert (error.problem, error.round, error.term, error.data) == ("w", 3, "loss", {"update": 4})


def test_a_warning_points_at_the_line_that_called_the_library():
    optimizer = chain_of_three().optimizer("first_order")
    with pytest.warns(mlo.SolveWarning) as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_a_warning_from_outside_points_at_its_own_line():
    with pytest.warns(mlo.SolveWarning, match="said") as caught:
        warn_user("said")
    assert caught[0].filename == __file__


def test_warnings_of_solves_can_be_made_errors():
    optimizer = chain_of_three().optimizer("first_order")
    with warnings.catch_warnings():
        warnings.simplefilter("error", mlo.SolveWarning)
        with pytest.raises(mlo.SolveWarning), torch.no_grad():
            optimizer.step()
