"""What a run keeps of its updates, and until when."""

from __future__ import annotations

import warnings

import pytest
import torch

import mlo
from mlo.hypergradient.registry import engines_for
from mlo.testing import bilevel_quadratic


def begun(engine, rounds=0, **options):
    """The history of a bilevel run, and its lower parameter."""
    optimizer = mlo.MultilevelOptimizer(bilevel_quadratic().problems, engine, **options)
    for _ in range(rounds):
        optimizer.step()
    return optimizer._history, optimizer.problems["w"].parameters["v"]


def window(steps):
    return {"name": "unroll", "steps": steps}


# ------------------------------ steps


@pytest.mark.parametrize(
    ("engine", "later", "needed"),
    [
        ("one_step", ["x"], True),
        ("one_step", ["w", "x"], False),
        ("one_step", [], False),
        (window(2), ["w", "x"], True),
        (window(2), ["w", "w", "x"], False),
        ("cg", ["x"], True),  # solves on its batches
        ("cg", ["w", "x"], False),
        ("first_order", ["x"], False),
    ],
)
def test_a_step_is_needed_until_it_leaves_the_window(engine, later, needed):
    history, _ = begun(engine)
    assert history.step_needed("w", later) is needed


def test_a_problem_that_looks_ahead_needs_no_step_that_was_made():
    history, _ = begun("one_step", order="outermost_first")
    assert not history.step_needed("w", ["x"])


@pytest.mark.parametrize("engine", ["one_step", window(2)], ids=["one_step", "unroll"])
def test_weights_that_were_set_are_no_result_of_a_step(engine):
    history, weights = begun(engine, rounds=2)
    assert history.last_step("w").value["v"] is weights
    with torch.no_grad():
        weights.add_(1.0)
    assert history.last_step("w") is None


def test_where_copies_are_kept_a_change_of_data_is_seen():
    history, weights = begun(window(2), rounds=2)
    weights.data.add_(1.0)
    assert history.last_step("w") is None


def test_a_window_holds_the_last_steps_since_a_change():
    optimizer = bilevel_quadratic().optimizer(window(3))
    lengths = []
    for number in range(7):
        if number == 4:
            optimizer.problems["w"].parameters["v"].data.add_(1.0)
        optimizer.step()
        lengths.append(len(optimizer._history.last_step("w").history))
    assert lengths == [1, 2, 3, 3, 1, 2, 3]


def test_forgotten_updates_leave_no_step():
    history, _ = begun("one_step", rounds=1)
    history.forget()
    assert history.last_step("w") is None and history.last == {}
    assert history.updates == {"w": 1, "x": 1}


def test_a_problem_rests_until_the_round_after_its_warmup():
    problem = bilevel_quadratic()
    problem.problems[0].warmup_steps = 2
    optimizer = problem.optimizer("one_step")
    rested = []
    for _ in range(4):
        rested.append(optimizer._history.rests("w"))
        optimizer.step()
    assert rested == [True, True, False, False]


def test_that_no_step_is_recorded_is_said_once():
    optimizer = bilevel_quadratic().optimizer(window(3))
    with pytest.warns(mlo.SolveWarning, match="1 of the 3 steps.*none of its steps is recorded"):
        optimizer.gradient("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.gradient("x")
    assert optimizer._history.warned_of_no_steps == {"w"}


# ------------------------------ other engines, kept graphs


def test_under_other_engines_all_but_steps_has_happened():
    history, _ = begun("one_step", rounds=2)
    history.memory["w"]["kept"] = torch.ones(1)
    for engine, kept in (("one_step", ["kept"]), ("darts", [])):
        other = history.with_engines(engines_for(history.graph.problems, engine))
        assert (other.round, other.updates) == (2, {"w": 2, "x": 2})
        assert other.last == history.last and other.last is not history.last
        assert other.stepped == {} and list(other.memory["w"]) == kept
    history.memory["w"]["later"] = torch.ones(1)
    assert "later" not in other.memory["w"]


def test_a_kept_graph_is_released_after_its_last_reader():
    optimizer = bilevel_quadratic().optimizer({"name": "one_step", "keep_graph": True})
    held = [
        (update.problem, [name for name, _ in optimizer._history.graphs])
        for update in optimizer.updates(rounds=2)
    ]
    assert held == [("w", ["w"]), ("x", [])] * 2


def test_the_first_update_decides_whether_graphs_are_kept():
    optimizer = bilevel_quadratic().optimizer("one_step")
    history = optimizer._history
    assert history.graph_decision("w") is None
    optimizer.step()
    assert history.graph_decision("w") is True
    history.restore_graph_decision("w", False)
    assert history.graph_decision("w") is False
    # Of a choice there is nothing to decide, nor to restore.
    history, _ = begun({"name": "one_step", "keep_graph": True})
    history.restore_graph_decision("w", False)
    assert history.keeps_graph["w"] is True and history.graph_decision("w") is None


def test_engines_memory_is_restored_as_it_was():
    history, _ = begun("one_step")
    history.memory["w"]["kept"] = torch.ones(1)
    copied = history.copied_memory()
    live = history.memory["w"]
    live["kept"], live["new"] = torch.zeros(1), torch.zeros(1)
    history.restore_memory(copied)
    assert history.memory["w"] is live and list(live) == ["kept"] and live["kept"] == 1.0
