"""Problems that no gradient reaches through the solutions below them."""

from __future__ import annotations

import warnings

import pytest
import small_graphs
import torch
from small_graphs import problem
from torch.optim import SGD, lr_scheduler

import mlo
from mlo.hypergradient.registry import engines_for
from mlo.testing import Vector
from mlo.zero_terms import watched_problems

UNROLLED = {"net": {"name": "unroll", "steps": 2}, "aug": {"name": "unroll", "steps": 1}}
ENGINES = ["one_step", UNROLLED, "direct", "identity"]


def trilevel(
    engine="one_step",
    *,
    net_sees=lambda aug: aug.v,
    net_term=lambda net, seen: (net.v - seen).square().sum(),
    aug_sees=lambda reg: reg.v,
    reg_sees=lambda net: net.v,
    rates=(0.1, 0.1, 0.1),
    start=1.0,
    schedules=None,
    order=("net", "aug", "reg"),
    names=("net", "aug", "reg"),
    **options,
):
    """Three vectors, each loss of which has a direct term as well; what each sees of another."""
    made = {}
    losses = {
        "net": lambda net, batch, *, aug: net_term(net, net_sees(aug)) + net.v.pow(4).sum(),
        "aug": lambda aug, batch, *, net, reg: (
            (net.v - 2.0).square().sum() + (aug.v - aug_sees(reg)).square().sum()
        ),
        "reg": lambda reg, batch, *, net: reg_sees(net).square().sum() + 0.1 * reg.v.sum(),
    }
    for name, rate in zip(names, rates, strict=True):
        module = Vector(torch.full((2,), start, dtype=torch.float64))
        optimizer = SGD(module.parameters(), lr=rate)
        scheduler = schedules(optimizer) if schedules is not None and name == "net" else None
        made[name] = mlo.Problem(
            name,
            module=module,
            optimizer=optimizer,
            loss=losses[name],
            steps=2 if name == "net" else 1,
            scheduler=scheduler,
            **(options if name == "net" else {}),
        )
    return mlo.MultilevelOptimizer([made[name] for name in order], engine)


def warned(optimizer, rounds):
    """The warnings of some rounds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(optimizer.run(rounds))
    return [str(entry.message) for entry in caught if entry.category is mlo.SolveWarning]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("part", "reader", "read", "silent"),
    [
        ("net_sees", "net", "aug", ["aug", "reg"]),
        ("aug_sees", "aug", "reg", ["reg"]),
        ("reg_sees", "reg", "net", ["reg"]),
    ],
)
@pytest.mark.parametrize("unused", [False, True])
def test_a_detached_read_is_named_at_the_first_update(engine, part, reader, read, silent, unused):
    def sees(module):
        return torch.ones(2, dtype=torch.float64) if unused else module.v.detach()

    # (A middle problem whose loss ignores reg has two problems above net, both reached or not.)
    found = warned(trilevel(engine, **{part: sees}), rounds=5)
    cause = f"The loss of {reader!r} names {read!r} and does not depend on it."
    assert [message.split("'")[1] for message in found] == silent
    assert all(cause in message for message in found)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_reaches_every_level_is_silent(engine):
    assert warned(trilevel(engine), rounds=5) == []


@pytest.mark.parametrize("engine", ["one_step", UNROLLED])
def test_a_step_of_length_zero_is_named(engine):
    found = warned(trilevel(engine, rates=(0.0, 0.1, 0.1)), rounds=2)
    assert [message.split("'")[1] for message in found] == ["aug", "reg"]
    assert all("The learning rate of 'net' is 0" in message for message in found)
    found = warned(trilevel(engine, rates=(0.1, 0.0, 0.1)), rounds=2)
    assert [message.split("'")[1] for message in found] == ["reg"]
    assert "The learning rate of 'aug' is 0" in found[0]


def test_a_rate_of_zero_above_all_steps_is_silent():
    assert warned(trilevel(rates=(0.1, 0.1, 0.0)), rounds=5) == []


@pytest.mark.parametrize("engine", ["direct", "identity"])
def test_a_condition_without_a_step_needs_no_rate(engine):
    assert warned(trilevel(engine, rates=(0.0, 0.1, 0.1)), rounds=5) == []


def test_a_rate_that_is_raised_from_zero_is_silent():
    def warming(optimizer):
        return lr_scheduler.LambdaLR(optimizer, lambda made: min(1.0, made / 3))

    assert warned(trilevel(schedules=warming), rounds=5) == []


def test_a_rate_that_is_scheduled_to_stay_zero_is_named():
    def still(optimizer):
        return lr_scheduler.LambdaLR(optimizer, lambda made: 0.0)

    optimizer = trilevel(schedules=still)
    assert warned(optimizer, rounds=2) == []
    assert "The learning rate of 'net' is 0" in warned(optimizer, rounds=1)[0]


def test_a_term_that_starts_at_zero_is_silent():
    def penalty(net, seen):
        return seen.square().dot(net.v.square()) + (net.v - 1.0).square().sum()

    # At weights of zero the derivative of a penalty in its strength is zero: for one step.
    assert warned(trilevel(net_term=penalty, start=0.0), rounds=5) == []


def test_a_term_without_a_lower_parameter_is_told_later():
    def apart(net, seen):
        return net.v.square().sum() + seen.square().sum()

    optimizer = trilevel(net_term=apart)
    assert warned(optimizer, rounds=2) == []
    found = warned(optimizer, rounds=1)
    assert [message.split("'")[1] for message in found] == ["aug", "reg"]
    assert "was exactly zero at the first 3 updates" in found[0]
    assert warned(optimizer, rounds=5) == []


def test_a_loss_that_is_flat_in_a_solution_is_silent():
    assert warned(trilevel(reg_sees=lambda net: (net.v - 100.0).relu()), rounds=5) == []


def test_first_order_drops_its_term_in_silence():
    engines = {"net": "first_order", "aug": "one_step"}
    assert warned(trilevel(engines, net_sees=lambda aug: aug.v.detach()), rounds=5) == []


def test_a_problem_in_its_warmup_is_not_judged():
    def sees(aug):
        return aug.v.detach()

    optimizer = trilevel(net_sees=sees, warmup_steps=2)
    assert warned(optimizer, rounds=2) == []
    assert [message.split("'")[1] for message in warned(optimizer, rounds=1)] == ["aug", "reg"]


def test_looking_changes_no_number():
    def term(net, seen):
        return (net.v + 0.1 * torch.randn(2, dtype=torch.float64)).square().sum()

    def losses(watch):
        torch.manual_seed(3)
        optimizer = trilevel(net_term=term)
        if not watch:
            optimizer._history.zero_terms._zero.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [record.losses for record in optimizer.run(5)]

    assert losses(watch=True) == losses(watch=False)


@pytest.mark.parametrize("engine", ["one_step", "cg"])
def test_a_break_far_below_is_named(engine):
    """Four levels; the lowest loss names the highest problem and does not use it."""
    vectors = {name: Vector(torch.ones(2)) for name in ("a", "b", "c", "d")}

    def reads(lower):
        def loss(own, batch, **problems):
            return (own.v - problems[lower].v).square().sum() + own.v.pow(4).sum()

        return loss

    def lowest(a, batch, *, d):
        return (a.v - 2.0).square().sum()

    losses = {"a": lowest, "b": reads("a"), "c": reads("b"), "d": reads("c")}
    problems = []
    for name, below in zip("abcd", ("d", "a", "b", "c"), strict=True):
        optimizer = SGD(vectors[name].parameters(), lr=0.1)
        problems.append(
            mlo.Problem(
                name, module=vectors[name], optimizer=optimizer, loss=losses[name], reads=(below,)
            )
        )
    with pytest.warns(mlo.SolveWarning, match="The loss of 'a' names 'd' and does not depend"):
        mlo.MultilevelOptimizer(problems, engine).step()


def test_a_gradient_of_which_a_part_is_dropped_is_not_watched():
    def watched(engine, **options):
        optimizer = trilevel(engine, **options)
        return watched_problems(optimizer.graph, optimizer.engines)

    assert watched("one_step") == ["aug", "reg"]
    assert watched({"default": "one_step", "aug": "first_order"}) == ["aug"]
    assert watched("first_order") == []


def test_estimates_are_not_watched():
    """Their first values may be of earlier batches."""

    def watched(**options):
        graph = small_graphs.graph(
            problem("w", lambda w, _, *, x: (w.v * x.v).sum()),
            problem("x", lambda x, _, *, w: w.v.sum(), **options),
        )
        return watched_problems(graph, engines_for(graph.problems, "soba"))

    assert watched() == ["x"]
    assert watched(estimator="storm") == []
