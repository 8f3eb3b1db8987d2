"""`first_order`: the solution is a constant."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.testing import ClosedForm, chain_of_three


def test_a_gradient_that_is_zero_by_construction_is_said():
    optimizer = chain_of_three().optimizer("first_order")
    with pytest.warns(mlo.SolveWarning, match="gradient of problem 'x' is zero.*'one_step'"):
        optimizer.step()


def test_first_order_drops_only_the_problem_it_is_chosen_for():
    closed: ClosedForm = chain_of_three()
    with pytest.warns(mlo.SolveWarning, match="'first_order' of w1"):
        cut = closed.optimizer({"default": "direct", "w1": "first_order"}).gradient("x")["v"]
    assert torch.equal(cut, torch.zeros_like(cut))
