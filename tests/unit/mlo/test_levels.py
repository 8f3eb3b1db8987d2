"""Which solution a loss reads: kinds of solutions, what is kept, and when it is made again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import mlo
from mlo.randomness import preserved
from mlo.solution import Constant, Stationary, Stepped
from mlo.testing import bilevel_quadratic, chain_of_three, diamond, relative_error


def levels_of(optimizer, *, ahead=False):
    return optimizer._ahead if ahead else optimizer._now


@pytest.mark.filterwarnings("ignore:A gradient goes through 1 of the 5 steps")
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("first_order", Constant),
        ("cg", Stationary),
        ("penalty", Stationary),
        ("identity", Stationary),
        ("one_step", Stepped),
        ("darts", Stepped),
        ("unroll", Stepped),
    ],
)
def test_an_engine_says_what_kind_of_solution_it_takes(engine, kind):
    optimizer = bilevel_quadratic().optimizer(engine)
    for _ in range(2):
        assert type(levels_of(optimizer).find("w")) is kind
        optimizer.step()


@pytest.mark.parametrize("change", ["in place", "grows", "goes"])
def test_an_update_that_fails_restores_buffers(change):
    """An update that is left out restores buffers, exchanged ones too; a new one stays."""
    net = nn.Linear(2, 1)
    net.register_buffer("queue", torch.ones(1, 2))

    def loss(net, batch):
        if change == "in place":
            net.queue.zero_()
        else:
            net.queue = torch.zeros(3, 2) if change == "grows" else None
        net.register_buffer("late", torch.ones(1))
        return net.weight.sum() * torch.nan

    problem = mlo.Problem(
        "net", module=net, loss=loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1)
    )
    mlo.MultilevelOptimizer([problem], on_nonfinite="skip").step()
    assert torch.equal(net.queue, torch.ones(1, 2))
    assert torch.equal(net.late, torch.ones(1))


class MomentumEncoder(nn.Module):
    """A frozen encoder that follows the trained one each time that the module runs."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.key.weight.mul_(0.9).add_(self.query.weight, alpha=0.1)
        return self.query(x) - self.key(x)


@pytest.mark.parametrize("engine", ["first_order", "one_step", "cg", "darts"])
@pytest.mark.filterwarnings("ignore:The gradient of problem 'up' is zero")
@pytest.mark.filterwarnings("ignore::mlo.errors.SolveWarning")
def test_a_frozen_part_moves_in_its_own_updates_only(engine):
    """As buffers do: losses that read the module run it on copies, in every round."""
    torch.manual_seed(0)
    net, up, x = MomentumEncoder(), nn.Linear(2, 1), torch.randn(4, 2)
    lower = mlo.Problem(
        "net",
        module=net,
        optimizer=torch.optim.SGD(net.query.parameters(), lr=0.1),
        loss=lambda net, _, *, up: (net(x) - up(x)).square().mean(),
        steps=2,
    )
    upper = mlo.Problem(
        "up",
        module=up,
        optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
        loss=lambda up, _, *, net: net(x).square().mean(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
    key = net.key.weight.clone()
    before = net.query.weight.detach().clone()  # at which an update runs the module
    for update in optimizer.updates(rounds=3):
        if update.problem == "net":
            key, before = 0.9 * key + 0.1 * before, net.query.weight.detach().clone()
        assert torch.allclose(net.key.weight, key)


def test_a_problem_that_rests_is_a_constant():
    problem = bilevel_quadratic()
    problem.problems[0].warmup_steps = 1
    optimizer = problem.optimizer("one_step")
    assert type(levels_of(optimizer).find("w")) is Constant
    optimizer.step()
    assert type(levels_of(optimizer).find("w")) is Stepped


def test_a_step_that_was_made_is_read_until_the_next():
    optimizer = bilevel_quadratic().optimizer("one_step")
    now = levels_of(optimizer)
    optimizer.step()
    made = now.find("w")
    assert now.find("w") is made and made.evaluation.loss.problem.name == "w"
    optimizer.step()
    assert now.find("w") is not made


def test_a_solution_is_made_again_only_after_something_moved():
    optimizer = chain_of_three().optimizer("cg")
    now = levels_of(optimizer)
    before = now.find("w2")
    assert now.find("w2") is before
    next(optimizer.updates(rounds=1))  # w1 moves, which w2 reads
    assert now.find("w2") is not before


def test_the_two_views_keep_solutions_of_their_own():
    optimizer = bilevel_quadratic().optimizer("one_step")
    optimizer.step()
    made, coming = levels_of(optimizer).find("w"), levels_of(optimizer, ahead=True).find("w")
    live = optimizer.problems["w"].parameters["v"]
    assert torch.equal(made.value["v"], live)
    assert not torch.equal(coming.value["v"], live)
    # The step ahead is the step that the optimizer then makes.
    next(optimizer.updates(rounds=1))
    assert relative_error(coming.value["v"], live.detach()) < 1e-12


def test_a_question_leaves_known_solutions_as_they_were():
    optimizer = diamond().optimizer("cg")
    now = levels_of(optimizer)
    known = now.find("w1")
    optimizer.gradient("arch")
    assert now.find("w1") is known
    fresh = diamond().optimizer("cg")
    fresh.gradient("arch")
    assert levels_of(fresh)._known == {}


def test_records_that_outlive_a_move_hold_copies():
    """An engine of several steps reads lower solutions as they were at each of them."""
    optimizer = chain_of_three().optimizer({"default": "cg", "w2": {"name": "unroll", "steps": 2}})
    optimizer.step()
    read = levels_of(optimizer).find("w2").history[0].evaluation.solutions["w1"].value["v"]
    then = read.detach().clone()
    optimizer.step()
    assert torch.equal(read, then)
    assert not torch.equal(read, optimizer.problems["w1"].parameters["v"])


@pytest.mark.parametrize("order", ["lower_first", "outermost_first"])
def test_noise_is_replayed_where_data_of_solves_drew(order):
    lower, upper = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    examples = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def fit(own, batch, *, upper):
        return (own(batch) - upper(batch)).square().mean() + own.weight.square().sum()

    drawn: list[torch.Tensor] = []

    def noisy(own, batch, *, lower):
        drawn.append(torch.randn_like(own.weight))
        return (own.weight * drawn[-1] - lower.weight).square().sum()

    def problem(name, module, loss, **options):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return mlo.Problem(name, module=module, optimizer=optimizer, loss=loss, **options)

    def loader():  # which draws its order from the global generator
        return DataLoader(examples, batch_size=2, shuffle=True)

    problems = [
        problem("lower", lower, fit, data=loader(), solve_data=loader()),
        problem("upper", upper, noisy),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, hypergradient="cg", order=order)
    for _ in range(9):  # two epochs of the solves
        optimizer.step()
        (state,) = levels_of(optimizer)._history.last["upper"].random_states
        with preserved():
            state.restore()
            assert torch.equal(torch.randn_like(upper.weight), drawn[-1])


class OwnRates(torch.optim.Optimizer):
    """Finds its rates itself, and has None in the group, as Adafactor may."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": None})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(0.1 * parameter.grad)


@pytest.mark.parametrize("engine", ["identity", "direct", "soba"])
def test_a_learning_rate_may_be_none(engine):
    def run(kind):
        fixed = bilevel_quadratic()
        optimizer = fixed.optimizer(engine)
        problem = optimizer.problems["w"]
        lower = mlo.Problem(
            "w", module=problem.module, optimizer=kind(problem.module), loss=problem.loss
        )
        optimizer = mlo.MultilevelOptimizer([lower, optimizer.problems["x"]], engine)
        list(optimizer.run(2))
        return [p.module.v.detach() for p in optimizer.problems.values()]

    own = run(lambda module: OwnRates(module.parameters()))
    sgd = run(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    for one, other in zip(own, sgd, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
