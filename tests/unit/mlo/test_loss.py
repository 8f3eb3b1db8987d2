"""Losses: what they may return, and what of a game's loss is not evaluated."""

from __future__ import annotations

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from noisy_regression import regression
from torch import nn
from torch.optim import SGD

import mlo
from mlo.loss import GradientSums, call_deferred
from mlo.randomness import forked
from mlo.testing import relative_error


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)


def game(deferred, engine="darts"):
    """A game of a and b, both noisy, below a problem that reads a only; and how often b's loss was
    evaluated.
    """
    torch.manual_seed(0)
    pair, up = Pair().double(), nn.Linear(3, 3).double()
    calls = [0]

    def pair_loss(pair, x, *, up):
        def a_loss():
            return (pair.a(x + torch.randn_like(x)) * pair.b(x) + up(x)).square().mean()

        def b_loss():
            calls[0] += 1
            return (pair.b(x + torch.randn_like(x)) - pair.a(x) * up(x)).square().mean(), {"b": 1.0}

        if deferred:
            return {"a": a_loss, "b": b_loss}, {"both": 2.0}
        with forked(0):
            state = torch.get_rng_state()
            first = a_loss()
            torch.set_rng_state(state)
            second, metrics = b_loss()
        return {"a": first, "b": second}, {"both": 2.0, **metrics}

    def up_loss(up, x, *, pair):
        return (pair.a(x) - up(x)).square().mean()

    x = torch.randn(4, 3, dtype=torch.float64)
    problems = [
        mlo.Problem(
            "pair",
            module=pair,
            loss=pair_loss,
            data=[x],
            players={"a": "a", "b": "b"},
            optimizer=SGD(pair.parameters(), lr=0.1),
        ),
        mlo.Problem(
            "up", module=up, loss=up_loss, data=[x], optimizer=SGD(up.parameters(), lr=0.1)
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    record = optimizer.step()
    optimizer.gradient("up")  # (pull-backs 1 and 2 also look whether all losses repeat themselves)
    calls[0] = 0
    return optimizer.gradient("up"), calls[0], record


def test_a_loss_that_is_a_function_is_for_its_player_only():
    """A loss that is a function is evaluated only for its player."""
    expected, _, expected_record = game(deferred=False)
    found, calls, record = game(deferred=True)
    assert relative_error(found, expected) == 0.0
    assert calls == 0
    assert record.losses == expected_record.losses
    assert record.metrics == expected_record.metrics == {"pair": {"both": 2.0, "b": 1.0}, "up": {}}


def test_engines_that_couple_the_players_evaluate_both():
    expected, _, _ = game(deferred=False, engine="direct")
    found, calls, _ = game(deferred=True, engine="direct")
    assert calls > 0
    assert relative_error(found, expected) == 0.0


SOURCES = {
    "torch": lambda generator: float(torch.rand(3)[0]),
    "generator": lambda generator: float(torch.rand(3, generator=generator)[0]),
    "numpy": lambda generator: float(np.random.rand(3)[0]),  # noqa: NPY002
    "python": lambda generator: random.random(),
}


def noisy_game(functions, engine="one_step", **options):
    """A game whose players a and b draw numbers in functions, and all that was drawn.

    Args:
        functions: player → its source of numbers; None: it draws nothing.
        engine: of the problem above it.
        options: of the game.
    """
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    pair = nn.ModuleDict({"a": nn.ParameterDict({"x": torch.ones(2)}), "b": nn.Linear(1, 1)})

    def pair_loss(pair, batch, *, up):
        def of(player):
            def loss():
                draw = functions[player]
                number = 0.0 if draw is None else SOURCES[draw](generator)
                drawn.append((player, number))
                return sum(p.square().sum() for p in pair[player].parameters()) * (
                    number + up["x"].sum()
                )

            return loss

        return {player: of(player) for player in functions}

    def up_loss(up, batch, *, pair):
        return pair["a"]["x"].sum() * up["x"].sum()

    up = nn.ParameterDict({"x": torch.ones(1)})
    problems = [
        mlo.Problem(
            "pair",
            module=pair,
            loss=pair_loss,
            players={player: player for player in functions},
            optimizer=SGD(pair.parameters(), lr=0.01),
            generators=[generator],
            **options,
        ),
        mlo.Problem("up", module=up, loss=up_loss, optimizer=SGD(up.parameters(), lr=0.0)),
    ]
    return mlo.MultilevelOptimizer(problems, engine), drawn


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_functions_draw_new_numbers_at_each_evaluation(source, order):
    """A player's function draws new numbers at each step, whichever function is called last."""
    optimizer, drawn = noisy_game({player: source if player == "a" else None for player in order})
    live = []
    for _ in range(4):
        drawn.clear()
        optimizer.step()
        live.append(dict(reversed(drawn))["a"])  # a replay repeats it
        assert {number for player, number in drawn if player == "a"} == {live[-1]}
    assert len(set(live)) == 4


def test_functions_draw_new_numbers_for_each_batch():
    optimizer, drawn = noisy_game({"a": "torch", "b": None}, accumulate=3, engine="first_order")
    optimizer.step()
    assert len({number for player, number in drawn if player == "a"}) == 3


def test_a_function_draws_what_it_would_draw_alone():
    """Functions start from one state, so what one draws does not depend on the others."""
    optimizer, drawn = noisy_game({"a": "torch", "b": "torch"}, player_steps={"b": 2})
    optimizer.step()
    # The first move is of b alone, the second of both. A check repeats what was drawn.
    (first, alone), (second, with_b), (third, with_a) = list(dict.fromkeys(drawn))[:3]
    assert (first, second, third) == ("b", "a", "b")
    assert alone != with_b == with_a


def test_a_single_function_draws_from_the_common_stream():
    """What the only function of a loss draws is what comes next in the common stream."""
    value = {"a": torch.ones(()), "b": lambda: torch.rand(())}
    torch.manual_seed(0)
    call_deferred(value)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), torch.stack([value["b"], after]))


def test_a_resumed_game_draws_the_same_numbers():
    optimizer, drawn = noisy_game({"a": "torch", "b": None})
    optimizer.step()
    state = optimizer.state_dict()
    drawn.clear()
    optimizer.step()
    other, others = noisy_game({"a": "torch", "b": None})
    other.load_state_dict(state)
    other.step()
    assert drawn == others


def test_a_functions_metrics_must_be_a_mapping():
    pair, up = Pair(), nn.Linear(3, 3)
    problems = [
        mlo.Problem(
            "pair",
            module=pair,
            loss=lambda pair, x, *, up: {"a": lambda: (pair.a(x).sum(), 3), "b": pair.b(x).sum()},
            data=[torch.ones(1, 3)],
            players={"a": "a", "b": "b"},
            optimizer=SGD(pair.parameters(), lr=0.1),
        ),
        mlo.Problem(
            "up",
            module=up,
            loss=lambda up, x, *, pair: pair.a(up(x)).sum(),
            data=[torch.ones(1, 3)],
            optimizer=SGD(up.parameters(), lr=0.1),
        ),
    ]
    with pytest.raises(mlo.ProblemError, match="whose second part is a int"):
        mlo.MultilevelOptimizer(problems).step()


def test_the_loss_must_be_a_scalar():
    optimizer = regression()
    optimizer.problems["net"].loss = lambda net, batch, *, decay: net(batch[0])
    with pytest.raises(mlo.ProblemError, match="'net' must be a floating-point scalar"):
        optimizer.step()


def test_losses_of_players_that_are_not_declared_say_how():
    net = nn.Linear(2, 1)
    problem = mlo.Problem(
        "net",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        loss=lambda net, _: {"a": net.bias.sum()},
    )
    with pytest.raises(mlo.ProblemError, match="declare them with players="):
        mlo.MultilevelOptimizer([problem]).step()


@pytest.mark.parametrize(
    ("others", "advice"),
    [
        ({"loss": 1.0, "logits": torch.ones(2)}, "Return its entry 'loss', or with metrics a pair"),
        ({"box": 2.0, "class": 1.0}, r"parts of one loss, return their sum\. Return .*as a pair"),
        ({"box": 2.0, "scores": torch.ones(2)}, r"'scores'\. Return .*as a pair"),
    ],
)
def test_a_loss_in_a_dict_says_what_to_return(others, advice):
    """Models of transformers return a mapping with the loss in it, detectors one of losses."""
    optimizer = regression()
    optimizer.problems["net"].loss = lambda net, batch, *, decay: {
        key: net(batch[0]).mean() * part for key, part in others.items()
    }
    with pytest.raises(mlo.ProblemError, match=f"got a dict of {', '.join(map(repr, others))}"):
        optimizer.step()
    with pytest.raises(mlo.ProblemError, match=advice):
        optimizer.step()


def test_a_batch_that_a_loss_misses_is_told_of_data():
    def noted(loss):
        net = nn.Linear(2, 1)
        problem = mlo.Problem("net", module=net, optimizer=SGD(net.parameters(), lr=0.1), loss=loss)
        with pytest.raises((TypeError, AttributeError)) as caught:
            mlo.MultilevelOptimizer([problem]).step()
        return "Problem 'net' has no data=, so its batch is None." in caught.value.__notes__

    assert noted(lambda net, batch: net(batch[0]).sum())
    assert noted(lambda net, batch: net(batch.x).sum())
    assert not noted(lambda net, batch: net.missing.sum())
    assert not noted(lambda net, batch: net.weight.sum(axes=1))


def test_an_argument_that_cannot_be_learned_is_told():
    """The weights of cross_entropy, for example; the note has the formula, which is the same."""
    torch.manual_seed(0)
    net, up, x, y = nn.Linear(3, 4), nn.Linear(4, 1), torch.randn(6, 3), torch.arange(6) % 4
    cross_entropy = nn.functional.cross_entropy

    def in_words(net, up):
        weight = up.weight[0].exp()
        losses = weight[y] * cross_entropy(net(x), y, reduction="none")
        return losses.sum() / weight[y].sum()

    def learned(net, _, *, up):
        return cross_entropy(net(x), y, weight=up.weight[0].exp())

    def smoothed(net, _, *, up):
        return cross_entropy(net(x), y, label_smoothing=up.weight[0, 0].sigmoid())

    with torch.no_grad():
        assert torch.allclose(in_words(net, up), learned(net, None, up=up))
    for loss in (learned, smoothed):
        lower = mlo.Problem("net", module=net, optimizer=SGD(net.parameters(), lr=0.1), loss=loss)
        upper = mlo.Problem(
            "up",
            module=up,
            optimizer=SGD(up.parameters(), lr=0.1),
            loss=lambda up, _, *, net: cross_entropy(net(x), y),
        )
        with pytest.raises((RuntimeError, TypeError)) as caught:
            mlo.MultilevelOptimizer([lower, upper]).step()
        whose, advice = caught.value.__notes__
        assert whose == "It was raised in the loss of problem 'net'."
        assert "(weight[y] * cross_entropy(output, y, reduction='none')).sum()" in advice


@pytest.mark.parametrize("engine", ["one_step", "unroll", "cg", "darts"])
@pytest.mark.parametrize("who", ["w", "x"])
def test_a_loss_that_freezes_what_it_reads_is_refused(who, engine):
    def training(w, batch, *, x):
        x.requires_grad_(who != "w")
        return (w["v"] - x["v"]).square().sum()

    def validation(x, batch, *, w):
        w.requires_grad_(who != "x")
        return (w["v"] + x["v"]).square().sum()

    modules = {name: nn.ParameterDict({"v": torch.ones(2)}) for name in ("w", "x")}
    problems = [
        mlo.Problem(
            name, module=module, loss=loss, optimizer=SGD(module.parameters(), lr=0.1), steps=steps
        )
        for (name, module), loss, steps in zip(
            modules.items(), (training, validation), (5, 1), strict=True
        )
    ]
    message = rf"problem '{who}' freezes parameters|parameter was frozen"
    with pytest.raises(mlo.ProblemError, match=message):
        mlo.MultilevelOptimizer(problems, engine).step()


def test_a_gradient_that_a_loss_takes_is_not_called_freezing():
    batch = torch.ones(2)

    def loss(w, batch):
        return torch.autograd.grad(w["v"] @ batch, batch, create_graph=True)[0].sum()

    w = nn.ParameterDict({"v": torch.ones(2)})
    problem = mlo.Problem(
        "w", module=w, loss=loss, data=[batch], optimizer=SGD(w.parameters(), lr=0.1)
    )
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        mlo.MultilevelOptimizer([problem]).step()
    assert caught.value.__notes__ == ["It was raised in the loss of problem 'w'."]


class Cached(nn.Module):
    """A module that makes a buffer when it first runs, unless it is `made` at once."""

    def __init__(self, made):
        super().__init__()
        self.inner, self.made = nn.Linear(3, 3), made
        if made == "at once":
            self.register_buffer("mask", torch.linspace(0.0, 1.0, 3))
        elif made == "in a place":
            self.register_buffer("mask", None, persistent=False)

    def forward(self, x):
        if getattr(self, "mask", None) is None:
            mask = torch.linspace(0.0, 1.0, 3).to(x)
            if self.made == "late":
                self.register_buffer("mask", mask)
            else:
                self.mask = mask
        return torch.tanh(self.inner(x)) * self.mask


@pytest.mark.parametrize("engine", ["one_step", mlo.Unroll(steps=2), "cg", "darts"])
@pytest.mark.parametrize("made", ["late", "in a place"])
def test_a_module_may_make_buffers_when_it_runs(engine, made):
    """A buffer that a module makes itself acts as if it had been there from the start."""
    found = []
    for way in ("at once", made):
        torch.manual_seed(0)
        net, up, x = Cached(way).double(), Cached(way).double(), torch.randn(4, 3).double()
        problems = [
            mlo.Problem(
                "net",
                module=net,
                loss=lambda net, x, *, up: (net(x) - up(x)).square().sum() + net(x).cosh().sum(),
                data=[x],
                steps=2,
                optimizer=SGD(net.parameters(), lr=0.1),
            ),
            mlo.Problem(
                "up",
                module=up,
                loss=lambda up, x, *, net: (net(x) - 2.0 * up(x)).square().sum(),
                data=[x],
                optimizer=SGD(up.parameters(), lr=0.1),
            ),
        ]
        optimizer = mlo.MultilevelOptimizer(problems, engine)
        optimizer.step(), optimizer.step()
        found.append(optimizer.gradient("up"))
    assert relative_error(found[1], found[0]) == 0.0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("offset", torch.linspace(-1.0, 1.0, 3))

    def forward(self, x):
        return self.inner(x) + self.offset


def by_attribute(net, x):
    return torch.tanh(x @ net.inner.weight.T + net.inner.bias + net.offset)


def by_get_parameter(net, x):
    weight, bias = net.get_parameter("inner.weight"), net.inner.get_parameter("bias")
    return torch.tanh(x @ weight.T + bias + net.get_buffer("offset"))


def by_named_parameters(net, x):
    named, (offset,) = dict(net.named_parameters()), net.buffers()
    return torch.tanh(x @ named["inner.weight"].T + named["inner.bias"] + offset)


def by_parameters(net, x):
    weight, bias = (p for p in net.parameters() if isinstance(p, nn.Parameter))
    return torch.tanh(x @ weight.T + bias + dict(net.named_buffers())["offset"])


def by_state_dict(net, x):
    state = net.state_dict(keep_vars=True)
    return torch.tanh(x @ state["inner.weight"].T + state["inner.bias"] + state["offset"])


def by_functional_call(net, x):
    named = {key: tensor * 1.0 for key, tensor in net.named_parameters()}
    return torch.tanh(torch.func.functional_call(net, named, x))


WAYS = [by_get_parameter, by_named_parameters, by_parameters, by_state_dict, by_functional_call]


def read_by(way, engine):
    """Gradient of `up`, where both losses reach the parameters of both modules in a given way."""
    torch.manual_seed(0)
    net, up = Scaled().double(), Scaled().double()
    x = torch.randn(8, 3, dtype=torch.float64)
    options = {"lr": 0.1, "momentum": 0.5}

    def net_loss(net, x, *, up):
        return (way(net, x) - way(up, x)).square().mean() + 0.1 * net.inner.weight.square().sum()

    problems = [
        mlo.Problem(
            "net", module=net, loss=net_loss, data=[x], optimizer=SGD(net.parameters(), **options)
        ),
        mlo.Problem(
            "up",
            module=up,
            loss=lambda up, x, *, net: (way(net, x) * way(up, x) - 1.0).square().mean(),
            data=[x],
            optimizer=SGD(up.parameters(), **options),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    list(optimizer.run(2))
    return optimizer.gradient("up")


ENGINES = ["one_step", "darts", mlo.ConjugateGradient(damping=1.0), mlo.Unroll(steps=2)]


@pytest.mark.parametrize("engine", ENGINES, ids=["one_step", "darts", "cg", "unroll"])
@pytest.mark.parametrize("way", WAYS)
def test_modules_give_their_parameters_inside_a_loss(way, engine):
    expected = read_by(by_attribute, engine)
    assert relative_error(read_by(way, engine), expected) < 1e-12
    assert all(float(tensor.norm()) > 0 for tensor in expected.values())


def test_a_plain_state_dict_inside_a_loss_holds_constants():
    """As outside of one: `state_dict()` detaches what it returns."""

    def constants(net, x):
        return torch.tanh(x @ net.state_dict()["inner.weight"].T) + by_attribute(net, x)

    def detached(net, x):
        return torch.tanh(x @ net.inner.weight.detach().T) + by_attribute(net, x)

    assert relative_error(read_by(constants, "one_step"), read_by(detached, "one_step")) == 0.0


def test_a_loss_that_is_a_parameter_is_reported_as_it_was():
    """The step moves the parameter in place."""
    module = torch.nn.ParameterDict({"p": torch.tensor(2.0)})
    problem = mlo.Problem(
        "p", module=module, optimizer=SGD(module.parameters(), lr=0.5), loss=lambda p, _: p["p"]
    )
    record = mlo.MultilevelOptimizer([problem]).step()
    assert record.losses == {"p": 2.0}
    assert module["p"].item() == 1.5


def upper_of(loss):
    """An optimizer of a problem w with that loss, which reads x, and x above it."""
    w, x = mlo.testing.Vector(torch.ones(2)), mlo.testing.Vector(torch.ones(2))
    return mlo.MultilevelOptimizer(
        [
            mlo.Problem("w", module=w, optimizer=SGD(w.parameters(), lr=0.1), loss=loss),
            mlo.Problem(
                "x",
                module=x,
                optimizer=SGD(x.parameters(), lr=0.1),
                loss=lambda x, _, *, w: (w.v**2).sum(),
            ),
        ]
    )


@pytest.mark.parametrize("engine", ["one_step", "darts", "cg"])
def test_a_loss_that_calls_backward_is_named(engine):
    def loss(w, _, *, x):
        value = ((w.v - x.v) ** 2).sum()
        value.backward()
        return value

    problems = upper_of(loss).problems
    with pytest.raises(mlo.ProblemError, match=r"Problem 'w'.*calls backward\(\) itself"):
        mlo.MultilevelOptimizer(problems, engine).step()


def test_a_loss_with_the_graph_of_an_earlier_call_is_named():
    kept = []

    def loss(w, _, *, x):
        kept.append((w.v - x.v).exp().sum())
        return torch.stack(kept[-2:]).sum()

    problems = upper_of(loss).problems
    optimizer = mlo.MultilevelOptimizer(problems, {"w": "first_order"})
    message = r"Problem 'w'.*graph of an earlier call"
    with pytest.warns(mlo.SolveWarning), pytest.raises(mlo.ProblemError, match=message):
        list(optimizer.run(4))  # its two last calls are of one round in rounds without checks


def test_an_error_in_a_loss_has_a_note_whose_loss_it_was():
    optimizer = upper_of(lambda w, _, *, x: w.v @ torch.ones(3))
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert caught.value.__notes__ == ["It was raised in the loss of problem 'w'."]


def dropout_regression(engine, *, mode_set_by=(), lower_sets=None):
    """Dropout and BatchNorm below a decay; which losses set the mode, and the modes they found."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    net, decay = net.double(), nn.ParameterDict({"log": torch.zeros((), dtype=torch.float64)})
    x = torch.randn(8, 3, dtype=torch.float64)
    found = []

    def net_loss(net, batch, *, decay):
        found.append(net.training)
        if lower_sets is not None:
            net.train(lower_sets)
        penalty = decay["log"].exp() * sum(p.square().sum() for p in net.parameters())
        return (net(batch) - batch[:, :1]).square().mean() + 0.1 * penalty

    def decay_loss(decay, batch, *, net):
        if "decay" in mode_set_by:
            net.eval()
        return (net(batch) - batch[:, :1]).square().mean()

    problems = [
        mlo.Problem(
            "net", module=net, loss=net_loss, data=[x], optimizer=SGD(net.parameters(), lr=0.1)
        ),
        mlo.Problem(
            "decay",
            module=decay,
            loss=decay_loss,
            data=[x + 1.0],
            optimizer=SGD(decay.parameters(), lr=0.1),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), found


@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 1}, "identity"])
def test_a_mode_that_a_loss_sets_ends_with_that_loss(engine):
    optimizer, found = dropout_regression(engine, mode_set_by=("decay",))
    losses = [record.losses for record in optimizer.run(3)]
    net = optimizer.problems["net"].module
    assert net.training
    assert all(found)
    assert net[1].num_batches_tracked == 3
    # As if each loss set the mode that it needs.
    other, _ = dropout_regression(engine, mode_set_by=("decay",), lower_sets=True)
    assert [record.losses for record in other.run(3)] == losses
    # And not what a loss without a mode of its own computes.
    plain, _ = dropout_regression(engine)
    assert [record.losses for record in plain.run(3)] != losses


@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 1}, "identity"])
def test_a_mode_set_in_a_loss_evaluated_again_ends_with_it(engine):
    optimizer, found = dropout_regression(engine, lower_sets=False)
    optimizer.step()
    optimizer.gradient("decay")
    assert all(found)
    assert all(module.training for module in optimizer.problems["net"].module.modules())


def test_a_mode_ends_with_a_loss_that_fails():
    optimizer, _ = dropout_regression("one_step", mode_set_by=("decay",))
    optimizer.problems["decay"].data[0] = torch.zeros(2, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes"):
        optimizer.step()
    assert optimizer.problems["net"].module.training


# ------------------------------ metrics that not every batch or process returns


def test_a_metric_is_averaged_over_the_batches_that_returned_it():
    net = nn.Linear(1, 1)

    def loss(net, batch):
        metrics = {"value": batch, "name": f"batch {batch:g}"}
        if batch > 1:
            metrics["large"] = float(batch)
        return net.weight.sum(), metrics

    problem = mlo.Problem(
        "net",
        module=net,
        optimizer=SGD(net.parameters(), lr=0.1),
        loss=loss,
        data=list(torch.tensor([1.0, 2.0, 6.0])),
        accumulate=3,
    )
    found = mlo.MultilevelOptimizer([problem]).step().metrics["net"]
    assert found == {"value": 3.0, "name": "batch 6", "large": 4.0}


class Processes:
    """As many processes as threads, in place of `torch.distributed`."""

    def __init__(self, size):
        self.size, self.given = size, [None] * size
        self.barrier = threading.Barrier(size)
        self.here = threading.local()

    def exchanged(self, value):
        self.given[self.here.rank] = value
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def get_rank(self, group=None):
        return self.here.rank

    def get_world_size(self, group=None):
        return self.size

    def all_reduce(self, tensor, group=None):
        every = self.exchanged(tensor.clone())
        assert len({(part.shape, part.dtype) for part in every}) == 1  # gloo would abort
        tensor.copy_(sum(every))

    def all_gather_object(self, into, value, group=None):
        into[:] = self.exchanged(value)

    def run(self, body):
        """What each process's body returned or raised."""

        def process(rank):
            self.here.rank = rank
            try:
                return body(rank)
            except mlo.ProblemError as error:
                return str(error)
            except BaseException:
                self.barrier.abort()  # so that the others do not wait
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(process, range(self.size)))


def reduced_metrics(monkeypatch, *rounds):
    """What each process has of its metrics, after each round in which they returned these."""
    processes = Processes(len(rounds[0]))
    for name in ("get_rank", "get_world_size", "all_reduce", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, getattr(processes, name))

    def body(rank):
        net = nn.Linear(1, 1)
        problem = mlo.Problem(
            "net", module=net, optimizer=SGD(net.parameters(), lr=0.1), loss=lambda net, _: None
        )
        kinds, found = {}, []
        for metrics in rounds:
            sums = GradientSums(problem, 1, (), kinds)
            own = list(net.parameters())
            sums.add("net", net.weight.sum(), own, retain_graph=False, create_graph=False)
            sums.add_metrics(metrics[rank])
            sums.average(mlo.DataParallel(), ())
            found.append({key: sums.metrics[key] for key in sorted(sums.metrics)})
        return found

    return processes.run(body)


def test_metrics_that_only_some_processes_return(monkeypatch):
    """Each is averaged over those that returned it, whatever their order and their first round."""
    first, second, third = reduced_metrics(
        monkeypatch,
        ({"a": 1.0, "b": 8.0}, {"b": 4.0, "a": 3.0}, {"b": 0.0, "a": 5.0}),
        ({}, {"c": torch.tensor([1.0, 2.0])}, {"a": 7.0}),
        ({"c": torch.tensor([3.0, 4.0])}, {"count": 2}, {"d": 1.0}),
        ({"c": 2.0}, {"c": 4.0}, {"a": 1.0}),
    )
    expected = [
        {"a": 3.0, "b": 4.0},
        {"a": 7.0, "c": torch.tensor([1.0, 2.0])},
        {"c": torch.tensor([3.0, 4.0]), "d": 1.0},
        {"a": 1.0, "c": 3.0},
    ]
    for found in (first, second, third):
        for metrics, means in zip(found, expected, strict=True):
            for name, mean in means.items():
                assert torch.allclose(metrics[name], torch.as_tensor(mean))
    # A count is the process's own.
    assert second[2]["count"] == 2 and "count" not in first[2]


def test_metrics_of_different_shapes_are_refused_by_all(monkeypatch):
    found = reduced_metrics(
        monkeypatch, ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, {"a": torch.zeros(2)})
    )
    assert len(set(found)) == 1
    assert re.search(r"metric 'a' as torch.float32 of shape \(3,\) on process 1", found[0])


def test_autocast_around_rounds_casts_weights_that_have_moved():
    """Autocast keeps casts until its outermost region ends: a loop inside would train on them."""

    def trained(around):
        torch.manual_seed(0)
        net, x = nn.Linear(3, 2), torch.randn(5, 3)
        decay = nn.ParameterDict({"v": torch.tensor(0.1)})
        problems = [
            mlo.Problem(
                "net",
                module=net,
                optimizer=SGD(net.parameters(), lr=0.1),
                loss=lambda net, batch, *, decay: (
                    net(x).float().square().mean() + decay["v"] * net.weight.square().sum()
                ),
                steps=3,
                precision=None if around else "bf16",
            ),
            mlo.Problem(
                "decay",
                module=decay,
                optimizer=SGD(decay.parameters(), lr=0.1),
                loss=lambda decay, batch, *, net: net(x).float().square().mean(),
                precision=None if around else "bf16",
            ),
        ]
        optimizer = mlo.MultilevelOptimizer(problems, "one_step")
        seen = []
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in optimizer.updates(rounds=3):
                # The program may look at the network, and move it.
                with torch.autocast("cpu", torch.bfloat16):
                    seen.append(net(x).float())
                with torch.no_grad():
                    net.weight.mul_(0.9)
        return [*seen, net.weight.detach(), decay["v"].detach()]

    for ours, plain in zip(trained(True), trained(False), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("engine", ["one_step", "cg"])
@pytest.mark.parametrize("what", ["batch", "constant"])
def test_a_loss_of_a_tensor_of_inference_mode_is_refused(what, engine):
    with torch.inference_mode():
        made = torch.ones(4, 3)
    net = nn.Linear(3, 1)
    problem = mlo.Problem(
        "net",
        module=net,
        optimizer=SGD(net.parameters(), lr=0.1),
        loss=lambda net, x: net(x if what == "batch" else made).square().mean(),
        data=[made],
    )
    optimizer = mlo.MultilevelOptimizer([problem], engine)
    with pytest.raises(mlo.ProblemError, match=r"Problem 'net': its loss uses.*inference_mode"):
        optimizer.step()
    with torch.inference_mode():
        with pytest.raises(mlo.ProblemError, match="A round of net cannot run under"):
            optimizer.step()
        with pytest.raises(mlo.ProblemError, match="gradient of problem 'net' cannot"):
            optimizer.gradient("net")
