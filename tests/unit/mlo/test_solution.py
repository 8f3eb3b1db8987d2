"""What a loss reads, and where it was evaluated, so that it can be evaluated again."""

from __future__ import annotations

import torch

import mlo
from mlo.solution import restore_buffers
from mlo.testing import bilevel_quadratic, chain_of_three, diamond


def evaluation_of(optimizer, name):
    """Where a problem's loss was evaluated last."""
    return optimizer._now.find(name).evaluation


def value_of(evaluation, parameters, reads):
    with evaluation.losses(parameters, reads) as losses:
        (value,) = losses.values()
        return float(value.detach())


def test_an_evaluation_is_repeated_where_it_was():
    """At the recorded point, however far the live tensors have moved; and it moves none."""
    problems = bilevel_quadratic().problems
    for problem in problems:  # (a problem at its solution would not move)
        with torch.no_grad():
            problem.module.v += 1.0
    optimizer = mlo.MultilevelOptimizer(problems, "one_step")
    optimizer.step()
    evaluation = evaluation_of(optimizer, "w")
    (recorded,) = evaluation.value.values()
    for _ in range(3):
        optimizer.step()
    live = {problem.name: dict(problem.module.named_parameters()) for problem in problems}
    before = {name: named["v"].detach().clone() for name, named in live.items()}
    again = evaluation.at_stand_ins(lambda own, reads: value_of(evaluation, own, reads))
    now = value_of(evaluation, live["w"], {"x": live["x"]})
    assert again == float(recorded) != now
    assert all(torch.equal(live[name]["v"], before[name]) for name in live)


def test_inputs_are_values_from_above_and_responses_below():
    def inputs(closed_form, name):
        levels = closed_form.optimizer("cg")._now
        found = levels.find(name).free_inputs
        return {(item.name, item.solution is not None) for item in found}

    assert inputs(chain_of_three(), "w1") == {("x", False)}
    assert inputs(chain_of_three(), "w2") == {("w1", True)}
    assert inputs(diamond(), "w2") == {("w1", True), ("gan", True), ("arch", False)}


def test_buffers_return_to_what_an_evaluation_recorded():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) + 3.0
    up = torch.nn.Linear(2, 1)
    lower = mlo.Problem(
        "net",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        loss=lambda net, _, *, up: up(net(x)).square().mean(),
    )
    upper = mlo.Problem(
        "up",
        module=up,
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        loss=lambda up, _, *, net: net(x).square().mean(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], "one_step")
    optimizer.step()
    evaluation = evaluation_of(optimizer, "net")
    assert float(net[1].running_mean.abs().max()) > 0.0
    restore_buffers(evaluation)
    assert torch.equal(net[1].running_mean, torch.zeros(2))  # as before the update
    assert torch.equal(net[1].running_var, torch.ones(2))
