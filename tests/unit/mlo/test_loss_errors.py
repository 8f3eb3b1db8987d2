"""Errors in a loss, or in its derivatives, name its problem and say what is meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mlo


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
