"""Betty's order of steps as rounds, against Betty's rules played out."""

from __future__ import annotations

import itertools

import pytest

import mlo
from mlo.compat.betty.rounds import Member, betty_order, plan


def chain(*counts, warmups=()):
    """Problems above each other, the lowest first, of so many steps per cycle."""
    names = [f"p{k}" for k in range(len(counts))]
    return [
        Member(
            name=name,
            children=tuple(names[max(k - 1, 0) : k]),
            parents=tuple(names[k + 1 : k + 2]),
            unroll=counts[k],
            warmup=warmups[k] if k < len(warmups) else 0,
            level=k,
        )
        for k, name in enumerate(names)
    ]


def siblings(*unrolls, accumulate=(1, 1)):
    """Two leaves below one problem."""
    leaves = [
        Member(name=name, children=(), parents=("top",), unroll=unroll, accumulate=gas)
        for name, unroll, gas in zip("ab", unrolls, accumulate, strict=True)
    ]
    return [*leaves, Member(name="top", children=("a", "b"), parents=(), level=1)]


def schedule_of(members):
    """steps → the updates of a round, as `DependencyGraph.schedule` makes them."""

    def schedule(steps):
        names = ()
        for level in sorted({m.level for m in members}):
            here = [m.name for m in members if m.level == level]
            most = max(steps[name] for name in here)
            below, names = names, ()
            for move in range(most):
                names += below + tuple(n for n in here if move >= most - steps[n])
        return names

    return schedule


def reads_of(members):
    return {m.name: (*m.children, *m.parents) for m in members}


def planned(members):
    return plan(members, schedule_of(members), reads_of(members))


def test_a_chain_repeats_its_inner_cycles():
    found = planned(chain(3, 2, 1))
    assert found.steps == {"p0": 3, "p1": 2, "p2": 1}
    assert found.warmup_rounds == {"p0": 0, "p1": 0, "p2": 0}
    assert found.iterations == 6


def test_the_rules_played_out_are_bettys():
    order = betty_order(chain(2, 2, 1))
    made = list(itertools.chain.from_iterable(next(order) for _ in range(4)))
    assert made == ["p0", "p0", "p1", "p0", "p0", "p1", "p2"]


def test_leaves_move_on_until_the_slowest_has_ended_its_cycle():
    found = planned(siblings(2, 3))
    assert found.steps == {"a": 3, "b": 3, "top": 1}


def test_an_accumulating_leaf_moves_less_often():
    found = planned(siblings(1, 2, accumulate=(2, 1)))
    assert found.steps == {"a": 1, "b": 2, "top": 1}
    assert found.iterations == 2


@pytest.mark.parametrize(("warmup", "rounds"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 2)])
def test_a_warm_up_of_a_leaf_makes_those_above_wait(warmup, rounds):
    # The first end of a cycle of 3 that is noticed is the first one beyond the warm-up.
    found = planned(chain(3, 1, warmups=(warmup,)))
    assert found.warmup_rounds == {"p0": 0, "p1": rounds}


def test_warm_ups_add_up_along_a_chain():
    found = planned(chain(2, 1, 1, warmups=(5, 3)))
    assert found.warmup_rounds == {"p0": 0, "p1": 2, "p2": 5}


@pytest.mark.parametrize(
    "members",
    [
        siblings(1, 1, accumulate=(2, 3)),  # one leaf moves at 2, 4, 6, the other at 3 and 6
        siblings(1, 4, accumulate=(2, 1)),  # at 2 and 4; rounds would make 3 and 4
        chain(2, 2, 1, warmups=(3,)),  # half a round
    ],
    ids=["no divisor", "not in the last moves", "a warm-up of half a round"],
)
def test_an_order_that_is_no_round_is_refused(members):
    with pytest.raises(
        mlo.ConfigurationError, match=r"one round that repeats.*Choose unroll_steps"
    ):
        planned(members)


def test_a_problem_that_would_never_step_is_told_of(monkeypatch):
    monkeypatch.setattr("mlo.compat.betty.rounds.LONGEST_WARM_UP", 50)
    with pytest.raises(mlo.ConfigurationError, match=r"\['p1'\] would not step"):
        planned(chain(1, 1, warmups=(100,)))


def test_the_order_of_leaves_counts():
    members = siblings(1, 1)
    with pytest.raises(mlo.ConfigurationError, match=r"a → b → top, and.*b → a → top"):
        plan(members, lambda steps: ("b", "a", "top"), reads_of(members))


def test_problems_above_change_places_unless_one_reads_the_other():
    bottom = Member(name="p", children=(), parents=("q", "r"))
    above = [Member(name=name, children=("p",), parents=(), level=1) for name in "qr"]
    reads = {"p": (), "q": ("p",), "r": ("p",)}
    assert plan([bottom, *above], lambda steps: ("p", "r", "q"), reads).iterations == 1
    with pytest.raises(mlo.ConfigurationError, match="p → q → r"):
        plan([bottom, *above], lambda steps: ("p", "r", "q"), reads | {"q": ("p", "r")})
