"""The total gradient: the direct one, and what flows through each solution."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlo
from mlo import bare_step, total_gradient
from mlo.testing import diamond, relative_error


def test_fixing_solutions_takes_the_gradient_apart():
    """Fixing solutions takes the gradient apart by what flows through them."""
    closed = diamond()
    optimizer = closed.optimizer("direct")
    q2 = torch.linalg.solve(closed.jacobians["w2"].T, closed.direct["w2"])

    def through(name):
        q = torch.linalg.solve(closed.jacobians[name].T, -closed.mixed["w2"][name].T @ q2)
        return -closed.mixed[name]["arch"].T @ q

    expected = {
        ("w1", "gan", "w2"): closed.direct["arch"],
        ("w1", "gan"): closed.direct["arch"] - closed.mixed["w2"]["arch"].T @ q2,
        ("gan",): closed.exact - through("gan"),
        ("w1",): closed.exact - through("w1"),
        (): closed.exact,
    }
    for fixed, gradient in expected.items():
        assert (
            relative_error(optimizer.gradient("arch", held_constant=fixed)["v"], gradient) < 1e-12
        )
    with pytest.raises(mlo.GraphError, match="no problem 'w3'"):
        optimizer.gradient("arch", held_constant=("w3",))


# ------------------------------ a lone response, which is pulled back without a node


class Scaled(nn.Module):
    """A network whose hidden values are scaled by what is above it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.last((self.first(x) * scale.exp()).tanh())


class Scale(nn.Module):
    """One tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(5))


def lower_loss(net, batch, *, scale):
    return F.cross_entropy(net(batch[0], scale.value), batch[1])


def upper_loss(scale, batch, *, net):
    return F.cross_entropy(net(batch[0], scale.value), batch[1])


STEPS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def two_level(engine, steps) -> mlo.MultilevelOptimizer:
    torch.manual_seed(0)
    net, scale = Scaled(), Scale()
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=STEPS[steps](net.parameters()),
            loss=lower_loss,
            data=batches[:2],
        ),
        mlo.Problem(
            "scale",
            module=scale,
            optimizer=torch.optim.Adam(scale.parameters(), lr=0.02),
            loss=upper_loss,
            data=batches[2:],
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def made(optimizer) -> list[object]:
    """Everything that three rounds leave."""
    records = list(optimizer.run(3))
    found: list[object] = [(r.losses, r.gradient_norms, repr(r.solves)) for r in records]
    for problem in optimizer.problems.values():
        found += [parameter.detach().tolist() for parameter in problem.parameters.values()]
    return [*found, optimizer.gradient("scale")["value"].tolist(), torch.get_rng_state().sum()]


ENGINES = ("first_order", "one_step", "darts", "neumann", "direct", "cg", "penalty", "unroll")


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("engine", ENGINES)
def test_quick_rounds_are_the_whole_ones_bit_for_bit(engine, steps, monkeypatch):
    """Bare steps and a response without a node change no bit of anything."""
    quick = made(two_level(engine, steps))
    monkeypatch.setattr(bare_step, "needs_whole_step", lambda _: "the test asks for it")
    monkeypatch.setattr(total_gradient, "_lone_response", lambda *_: None)
    assert quick == made(two_level(engine, steps))


@pytest.fixture
def lone(monkeypatch) -> list[bool]:
    """Whether each gradient that was taken had a lone response."""
    seen: list[bool] = []
    find = total_gradient._lone_response

    def watched(*arguments):
        found = find(*arguments)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(total_gradient, "_lone_response", watched)
    return seen


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
@pytest.mark.parametrize("engine", ["one_step", "darts", "neumann"])
def test_a_response_to_values_alone_is_lone(engine, lone):
    two_level(engine, "SGD").step()
    assert lone == [False, True]  # the lower problem reads no solution


@pytest.mark.parametrize("engine", ["first_order", "unroll", "zeroth_order"])
def test_an_engine_with_a_response_of_its_own_is_asked(engine, lone):
    two_level(engine, "SGD").step()
    assert lone == [False, False]


def test_a_solution_held_constant_is_not_lone(lone):
    optimizer = two_level("one_step", "SGD")
    optimizer.step()
    optimizer.gradient("scale", held_constant="net")
    assert not lone[-1]


def test_several_responses_meet_in_autograd(lone):
    """Where a loss reads two responses, or one to another response, autograd sums them."""
    diamond().optimizer("direct").gradient("arch")
    assert not any(lone)


def test_players_that_read_a_response_take_the_node(lone):
    """Each player has cotangents of its own, and gradients in its own parameters alone."""
    game = nn.ModuleDict({"one": Scale(), "two": Scale()})
    net = Scale()

    def lower(net, batch, *, game):
        return (net.value - game["one"].value - game["two"].value).square().sum()

    def players(game, batch, *, net):
        return {key: (net.value - 1.0 + part.value).square().sum() for key, part in game.items()}

    problems = [
        mlo.Problem(
            "net", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), loss=lower
        ),
        mlo.Problem(
            "game",
            module=game,
            optimizer=torch.optim.SGD(game.parameters(), lr=0.1),
            loss=players,
            players={"one": "one", "two": "two"},
        ),
    ]
    mlo.MultilevelOptimizer(problems, "one_step").step()
    assert lone == [False, False]


def test_two_responses_that_a_loss_reads_meet_in_autograd(lone):
    one, two, scale = Scale(), Scale(), Scale()

    def lower(net, batch, *, scale):
        return (net.value - scale.value - 1.0).square().sum()

    def upper(scale, batch, *, one, two):
        return (one.value * two.value + 2.0 * scale.value).sum()

    problems = [
        mlo.Problem(name, module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), loss=f)
        for name, net, f in (("one", one, lower), ("two", two, lower), ("scale", scale, upper))
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "one_step")
    optimizer.step()
    assert lone == [False, False, False]
    # d/dx Σ (w₁ w₂ + 2 x) with dwᵢ/dx = 2 · 0.1.
    found = optimizer.gradient("scale")["value"]
    assert torch.allclose(found, 2.0 + 0.2 * (one.value + two.value).detach())
