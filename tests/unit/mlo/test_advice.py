"""Advice in messages: an engine that is named is one that the library accepts there."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mlo
from mlo.advice import EngineAdvice
from mlo.hypergradient import registry
from mlo.testing import Vector

ENGINES = sorted(registry._FACTORIES)


def data(rows=8, batches=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 5, generator=generator, dtype=torch.float64) for _ in range(batches)]


def errors(net, batch):
    return (net(batch[:, :4]) - batch[:, 4:]).square().mean()


def problem(name, module, loss, **options):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    return mlo.Problem(name, module=module, optimizer=optimizer, loss=loss, **options)


def weights(*shape):
    return nn.ParameterDict({"log": torch.full(shape, -1.0, dtype=torch.float64)})


def two_levels(**options):
    """A regression on small batches below its penalty."""
    torch.manual_seed(0)
    net, reg = nn.Linear(4, 1).double(), weights(4)

    def lower(net, batch, *, reg):
        return errors(net, batch) + (reg["log"].exp() * net.weight**2).sum()

    return [
        problem("net", net, lower, data=data(), **options),
        problem("reg", reg, lambda reg, batch, *, net: errors(net, batch), data=data(64, 1)),
    ]


def game():
    """Two players that pull apart, below a problem that reads one of them."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"a": nn.Linear(4, 1).double(), "b": nn.Linear(4, 1).double()})
    reg = weights(4)

    def lower(pair, batch, *, reg):
        difference = (pair["a"](batch[:, :4]) * pair["b"](batch[:, :4])).mean()
        penalty = (reg["log"].exp() * pair["a"].weight ** 2).sum()
        own = errors(pair["a"], batch) + penalty + difference
        return {"a": own, "b": errors(pair["b"], batch) - difference}

    return [
        problem("net", pair, lower, players={"a": "a", "b": "b"}, data=data()),
        problem("reg", reg, lambda reg, batch, *, net: errors(net["a"], batch), data=data(64, 1)),
    ]


def three_levels(players=False):
    """The same regression, or game, below noise strengths, below their penalty."""
    lower = game()[0] if players else two_levels()[0]
    net, noise, reg = lower.module, weights(4), weights()
    first = (lambda net: net["a"]) if players else (lambda net: net)

    def net_loss(net, batch, *, noise):
        return lower.loss(net, batch, reg=noise)

    def noise_loss(noise, batch, *, net, reg):
        return errors(first(net), batch) + reg["log"].exp() * noise["log"].square().sum()

    options = {"players": {"a": "a", "b": "b"}} if players else {}
    return [
        problem("net", net, net_loss, data=data(), **options),
        problem("noise", noise, noise_loss, data=data()),
        problem("reg", reg, lambda reg, b, *, net: errors(first(net), b), data=data(64, 1)),
    ]


def game_in_three_levels():
    return three_levels(players=True)


def projected():
    return two_levels(after_step=lambda parameters: {"weight": parameters["weight"].clamp(-1, 1)})


def learned_rate():
    return two_levels(settings=lambda: {"lr": 0.05})


class Foreign(torch.optim.Optimizer):
    """An optimizer whose step cannot be differentiated."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)


def foreign_optimizer():
    lower, upper = two_levels()
    foreign = Foreign(lower.module.parameters())
    lower = mlo.Problem("net", module=lower.module, optimizer=foreign, loss=lower.loss, data=data())
    return [lower, upper]


GRAPHS = [
    two_levels, game, three_levels, game_in_three_levels, projected, learned_rate,
    foreign_optimizer,
]  # fmt: skip


def choice_of(name):
    """An engine that soon has something to advise."""
    options = {"neumann": {"num_terms": 2, "tol": 1e-9}, "cg": {"max_steps": 1}}.get(name, {})
    if name == "soba":
        options = {"tol": 1e-9}
    return {"name": name, **options}


def messages_of(make, engines, rounds=1):
    """The error and the warnings of some rounds."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = []
        try:
            list(mlo.MultilevelOptimizer(make(), engines).run(rounds))
        except (mlo.EngineError, mlo.ProblemError) as error:
            found.append(str(error))
    return [*found, *[str(warning.message) for warning in said]]


def advised(message, own):
    """The engines that a message names beside the one that it is about."""
    quoted = set(re.findall(r"'([a-z_]+)'", message))
    return (quoted & set(ENGINES)) - {own, "first_order"}


@pytest.mark.parametrize("make", GRAPHS, ids=lambda make: make.__name__)
def test_every_engine_that_a_message_advises_is_accepted(make):
    accepted = {}

    def accepts(name, engine):
        if (name, engine) not in accepted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    mlo.MultilevelOptimizer(make(), {"default": "one_step", name: engine}).step()
                    accepted[name, engine] = True
                except (mlo.EngineError, mlo.ProblemError):
                    accepted[name, engine] = False
        return accepted[name, engine]

    seen = 0
    for name in [problem.name for problem in make()][:-1]:
        for engine in ENGINES:
            for message in messages_of(make, {"default": "one_step", name: choice_of(engine)}):
                for other in advised(message, engine):
                    seen += 1
                    assert accepts(name, other), (name, engine, other, message)
    assert seen > 0


def test_advice_on_another_problem_knows_the_order_of_the_round():
    """A simultaneous round makes no step before its gradients, so no engine of steps serves."""

    def refusal(inner):
        engines = {"default": "cg", "net": inner}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                mlo.MultilevelOptimizer(three_levels(), engines, order="simultaneous").step()
            except mlo.EngineError as error:
                return str(error)
        return ""

    told = {inner: advised(refusal(inner), inner) - {"cg"} for inner in ("darts", "soba")}
    assert all(others for others in told.values())
    for others in told.values():
        assert [other for other in others if refusal(other)] == []


def test_no_engine_is_advised_where_none_serves():
    nothing = EngineAdvice(serves=lambda name: False)
    assert nothing.phrase(", or use {}", "cg", "gmres") == ""


def test_engines_are_listed_as_in_a_sentence():
    some = EngineAdvice(serves=lambda name: name != "gmres")
    assert some.phrase(", or use {}", "cg", "gmres") == ", or use 'cg'"
    assert some.phrase("Use {}.", "cg", "gmres", "direct", "minres") == (
        "Use 'cg', 'direct' or 'minres'."
    )


def test_a_bias_in_three_levels_does_not_advise_soba():
    said = messages_of(three_levels, {"default": "one_step", "net": "cg"})
    (bias,) = [message for message in said if "a solve on one batch is biased" in message]
    assert "soba" not in bias
    said = messages_of(two_levels, "cg")
    (bias,) = [message for message in said if "a solve on one batch is biased" in message]
    assert bias.endswith("such as 'soba'.")


def test_a_slow_series_on_a_game_advises_no_cg():
    engine = {"name": "neumann", "num_terms": 2, "tol": 1e-9}
    (slow,) = [m for m in messages_of(game, engine) if "hardly begun" in m]
    assert "use 'gmres'" in slow and "'cg'" not in slow
    (slow,) = [m for m in messages_of(two_levels, engine) if "hardly begun" in m]
    assert "use 'cg' or 'gmres'" in slow


def test_direct_is_not_advised_for_a_large_problem():
    def large():
        wide = nn.Linear(4, 2000).double()
        reg = weights()
        return [
            problem("net", wide, lambda net, _, *, reg: errors(net, data()[0]) * reg["log"].exp()),
            problem("reg", reg, lambda reg, _, *, net: errors(net, data()[0])),
        ]

    engines = {"default": "one_step"}
    optimizer = mlo.MultilevelOptimizer(large(), engines)
    assert optimizer.problems["net"].size > mlo.Direct().max_parameters
    advice = optimizer._history.losses["net"].advice
    assert advice.phrase("{}", "direct", "gmres") == "'gmres'"


class OwnStep(torch.optim.AdamW):
    """Takes over the option `differentiable`, and makes a step that is not."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.data.sub_(group["lr"] * p.grad / p.grad.norm())


class Renamed(torch.optim.AdamW):
    pass


def hooked(parameters, **options):
    optimizer = torch.optim.AdamW(parameters, **options)
    optimizer.register_step_post_hook(lambda own, *_: own.param_groups[0]["params"][0].data.mul_(2))
    return optimizer


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [(torch.optim.AdamW, True), (Renamed, True), (OwnStep, False), (hooked, False)],
)
def test_an_engine_of_steps_is_advised_for_known_ones_only(kind, accepted):
    """Whether a step of another class has a derivative shows when it is made."""

    def pair(engine):
        w, x = Vector(torch.ones(2).double()), Vector(torch.ones(2).double())
        lower = mlo.Problem(
            "w",
            module=w,
            optimizer=kind(w.parameters(), lr=0.1, weight_decay=0.1),
            loss=lambda w, _, *, x: ((w.v - 2.0 * x.v) ** 2).sum(),
        )
        upper = mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, w: (w.v**2).sum(),
        )
        return mlo.MultilevelOptimizer([lower, upper], engine)

    with pytest.warns(mlo.SolveWarning, match="decoupled weight decay") as caught:
        pair("cg")
    assert ("or use 'one_step'" in str(caught[0].message)) == accepted
    with nullcontext() if accepted else pytest.raises(mlo.ProblemError):
        pair("one_step").step()
