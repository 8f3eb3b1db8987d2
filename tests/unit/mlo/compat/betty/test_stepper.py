"""Who steps when, by the updates of one optimizer."""

from __future__ import annotations

import pytest
from small_betty_programs import bilevel, problems
from torch.optim import SGD

import mlo
from mlo.compat.betty import Engine, EngineConfig

QUIET = {"strategy": "cpu"}


def test_problems_are_declared_lower_first_with_what_they_read():
    a, b, top = problems("a", "b", "top", a={"unroll_steps": 2}, top={"warmup_steps": 3})
    edges = {"l2u": {a: [b], b: [top]}, "u2l": {top: [a]}}
    optimizer = Engine([top, b, a], EngineConfig(**QUIET), edges).mlo_optimizer
    assert list(optimizer.problems) == ["a", "b", "top"]
    assert optimizer.graph.reads == {"a": ("top",), "b": ("a",), "top": ("b",)}
    assert optimizer.graph.schedule() == ("a", "a", "b", "top")
    assert {name: engine.label for name, engine in optimizer.engines.items()} == {
        "a": "identity",
        "b": "identity",
        "top": "first_order",
    }


def test_an_edge_that_is_missing_is_told_of():
    """In Betty the gradient would silently lack a term."""
    low, up = problems("low", "up")
    type(low).training_step = lambda self, batch: (self.module() * self.up()).sum() ** 2
    engine = Engine([up, low], EngineConfig(**QUIET), {"l2u": {low: [up]}, "u2l": {}})
    with pytest.raises(mlo.GraphError, match=r"'low' uses parameter 'v' of problem 'up'"):
        engine.train_step()


def test_leaves_step_in_turn():
    one, other = problems("one", "other")
    engine = Engine([one, other], EngineConfig(**QUIET))
    with pytest.raises(mlo.ProblemError, match="'other' was stepped, but 'one' is due"):
        other.step()
    one.step(global_step=1)
    other.step(global_step=1)
    assert engine.mlo_optimizer.round == 1


def test_roll_back_needs_cycles_that_end_together():
    a, b, top = problems("a", "b", "top", a={"unroll_steps": 2}, b={"unroll_steps": 4})
    with pytest.raises(mlo.ConfigurationError, match=r"'a' has a cycle of 2 counts.*but needs 4"):
        Engine([top, a, b], EngineConfig(roll_back=True, **QUIET), {"l2u": {a: [top], b: [top]}})


def test_parts_are_not_exchanged_within_a_round():
    engine = bilevel(lower={"unroll_steps": 2}, run=False)
    engine.train_step()
    with pytest.raises(mlo.ProblemError, match="a round is under way: low → up is due"):
        engine.low.set_optimizer(SGD(engine.low.module.parameters(), lr=0.1))


def test_a_warm_up_is_not_made_again_after_an_exchange():
    engine = bilevel(lower={"warmup_steps": 3}, engine={"train_iters": 4})
    assert engine.up.count == 1
    engine.up.set_optimizer(SGD(engine.up.module.parameters(), lr=0.1))
    engine.train_step()
    assert engine.up.count == 2
