"""Saved states of problems."""

from __future__ import annotations

import copy

import pytest
import torch
from noisy_regression import regression

import mlo
from mlo.testing import bilevel_quadratic, diamond, identical


def test_a_state_of_another_graph_is_refused():
    with pytest.raises(mlo.CheckpointError, match="of the problems"):
        regression().load_state_dict(diamond().optimizer("direct").state_dict())
    state = regression().state_dict()
    with pytest.raises(mlo.CheckpointError, match="version 99"):
        regression().load_state_dict({**state, "version": 99})
    state["problems"]["decay"]["module"] = {}
    with pytest.raises(mlo.CheckpointError, match="'decay' does not fit"):
        regression().load_state_dict(state)


def test_a_state_of_the_first_version_is_read():
    """It kept the one optimizer of a problem under no name, and no position in the round."""
    optimizer, other = regression(), regression()
    list(optimizer.run(2))
    state = optimizer.state_dict()
    list(optimizer.run(2))
    state["version"] = 1
    del state["within_round"]
    for name, saved in state["problems"].items():
        for part in ("optimizers", "schedulers"):
            saved[part] = {"" if key == name else key: v for key, v in saved[part].items()}
        assert "" in saved["optimizers"]
    other.load_state_dict(state)
    list(other.run(2))
    assert identical(optimizer.state_dict(), other.state_dict())


def test_later_steps_do_not_change_a_state_that_was_loaded():
    """Optimizers take over the tensors that they are given, and change them in place."""
    problem = bilevel_quadratic()
    optimizer = problem.optimizer("one_step")
    lower = problem.problems[0]
    lower.optimizers[lower.name] = torch.optim.Adam(lower.module.parameters(), lr=0.1)
    optimizer = problem.optimizer("one_step")
    list(optimizer.run(2))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    for _ in range(2):
        optimizer.load_state_dict(state)
        list(optimizer.run(2))
        assert identical(state, kept)
