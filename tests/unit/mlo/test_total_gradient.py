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


# ------------------------------ losses that take gradients themselves


def values_of(**named):
    made = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in named.items()}
    return nn.ParameterDict({name: value.clone() for name, value in made.items()})


def plain(name, module, loss, rate=0.1, **options):
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    return mlo.Problem(name, module=module, optimizer=optimizer, loss=loss, **options)


def drawn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


INPUT, TARGET = drawn(12, 4, seed=1), drawn(12, seed=2)


def squares(net, x, y):
    return (torch.tanh(x @ net["a"]) @ net["b"] - y).square().mean()


def distance(syn, batch=None, *, net):
    """How far the gradient on synthetic data is from that on real data (condensation)."""
    own = list(net.values())
    real = torch.autograd.grad(squares(net, INPUT, TARGET), own)
    ours = torch.autograd.grad(squares(net, syn["x"], syn["y"]), own, create_graph=True)
    return sum((one - other).square().sum() for one, other in zip(ours, real, strict=True))


def on_synthetic(net, batch=None, *, syn):
    return squares(net, syn["x"], syn["y"])


@pytest.mark.parametrize("engine", ["first_order", "one_step", "darts", "unroll"])
@pytest.mark.parametrize("lowest", ["net", "syn"])
def test_gradients_are_matched_in_a_network_that_is_read(lowest, engine):
    net = values_of(a=drawn(4, 3, seed=3), b=drawn(3, seed=4))
    syn = values_of(x=drawn(5, 4, seed=5), y=drawn(5, seed=6))
    leaves = {
        name: {k: p.detach().clone().requires_grad_() for k, p in module.items()}
        for name, module in (("net", net), ("syn", syn))
    }
    of_net, of_syn = leaves["net"], leaves["syn"]
    if lowest == "net":
        problems = [plain("net", net, on_synthetic), plain("syn", syn, distance)]
        first, second = (on_synthetic, of_net, "syn", of_syn), (distance, of_syn, "net")
    else:
        problems = [plain("syn", syn, distance), plain("net", net, on_synthetic)]
        first, second = (distance, of_syn, "net", of_net), (on_synthetic, of_net, "syn")
    (record,) = mlo.MultilevelOptimizer(problems, engine).run(1)

    # The same by hand: a step of the lower problem, and the gradient of the upper one through it.
    loss, own, other, read = first
    value = loss(own, **{other: read})
    steps = torch.autograd.grad(value, list(own.values()), create_graph=True)
    after = {k: p - 0.1 * g for (k, p), g in zip(own.items(), steps, strict=True)}
    if engine == "first_order":
        after = {k: p.detach().requires_grad_() for k, p in after.items()}
    loss, own, other = second
    upper = loss(own, **{other: after})
    gradient = torch.autograd.grad(upper, list(own.values()))
    assert record.losses[lowest] == pytest.approx(float(value.detach()))
    moved = syn if lowest == "net" else net
    for (key, before), g in zip(own.items(), gradient, strict=True):
        step = (before.detach() - moved[key].detach()) / 0.1
        assert relative_error(step, g) < (1e-7 if engine == "darts" else 1e-12), key


class Noisy(nn.Module):
    """Running statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()

    def forward(self, x):
        return self.layers(x)[:, 0]


def sensitive(net, batch, *, scale):
    loss = (scale["s"].exp() * (net(INPUT) - TARGET).square()).mean()
    calls.append(scale["s"].requires_grad)
    (slope,) = torch.autograd.grad(loss, scale["s"], create_graph=True)
    return loss + slope.square().sum()


calls: list[bool] = []


def test_a_loss_that_is_begun_again_repeats_noise_and_buffers():
    calls.clear()
    torch.manual_seed(0)
    net, by_hand = Noisy(), Noisy()
    by_hand.load_state_dict(net.state_dict())
    scale = values_of(s=[0.3])
    problems = [
        plain("net", net, sensitive, accumulate=2, data=[1, 2]),
        plain("scale", scale, lambda scale, batch, *, net: scale["s"].square().sum()),
    ]
    torch.manual_seed(1)
    optimizer = mlo.MultilevelOptimizer(problems, "first_order")
    list(optimizer.run(3))
    # Once without and once with a gradient in what is read, then always with it. (Rounds 1 and 2
    # also look at whether the loss knows its tensors by identity.)
    assert not calls[0] and all(calls[1:])

    torch.manual_seed(1)
    step = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    frozen = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        total = sum(sensitive(by_hand, None, scale={"s": frozen}) for _ in range(2)) / 2
        step.zero_grad()
        total.backward()
        step.step()
        with torch.no_grad():
            frozen -= 0.1 * 2.0 * frozen
    ours, theirs = net.state_dict(), by_hand.state_dict()
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, rtol=1e-12), key


def test_other_losses_read_constants():
    seen = []

    def loss(w, batch, *, x):
        seen.append(x["s"].requires_grad)
        return (w["s"] - x["s"]).square().sum()

    w, x = values_of(s=[1.0]), values_of(s=[2.0])
    upper = plain("x", x, lambda x, batch, *, w: (x["s"] * w["s"]).sum())
    optimizer = mlo.MultilevelOptimizer([plain("w", w, loss), upper], "first_order")
    next(optimizer.run(1))
    assert seen[0] is False


def test_what_only_depends_on_a_lent_constant_has_no_derivative():
    def slope(x, batch, *, w):
        return torch.autograd.grad(w["s"].square().sum(), w["s"], create_graph=True)[0].sum()

    w, x = values_of(s=[1.0]), values_of(s=[2.0])
    lower = plain("w", w, lambda w, batch, *, x: (w["s"] - x["s"]).square().sum())
    optimizer = mlo.MultilevelOptimizer([lower, plain("x", x, slope)], "first_order")
    with pytest.warns(UserWarning, match="depends only on the solutions"):
        optimizer.step()
    assert x["s"].item() == 2.0
