"""Products by finite differences of first gradients: their step, and what they equal."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import nn

import mlo
from mlo.testing import Vector, bilevel_quadratic, relative_error


@pytest.mark.parametrize("step", ["adaptive", "darts", 0.1])
def test_they_are_exact_on_a_quadratic(step):
    products = {"name": "finite_difference", "step": step}
    found = bilevel_quadratic().optimizer({"name": "one_step", "products": products})
    exact = bilevel_quadratic().optimizer("one_step")
    assert relative_error(found.gradient("x"), exact.gradient("x")) < 1e-6


@pytest.mark.parametrize("step", ["other", 0.0, -1.0])
def test_another_step_is_refused(step):
    with pytest.raises(mlo.EngineError, match="step must be"):
        mlo.FiniteDifference(step=step)


def test_the_adaptive_step_moves_no_tensor_too_far():
    """The adaptive step moves no tensor by more than its share."""
    theta = [torch.full((4,), 2.0).double(), torch.full((2,), 100.0).double()]
    u = [torch.ones(4).double(), torch.ones(2).double()]
    e = mlo.FiniteDifference().step_size(theta, u, torch.float64)
    share = math.cbrt(torch.finfo(torch.float64).eps)
    assert e == pytest.approx(share * 4.0 / 2.0)
    assert mlo.FiniteDifference().step_size(theta, [0 * t for t in u], torch.float64) == 0.0


def test_the_step_of_darts_is_a_hundredth_of_the_directions_norm():
    u = [torch.full((4,), 3.0)]
    e = mlo.FiniteDifference(step="darts").step_size([torch.zeros(4)], u, torch.float32)
    assert e == pytest.approx(0.01 / 6.0)


def test_displaced_points_stay_in_their_memory():
    """From one product to the next, unless the parameters are of another dtype then."""
    optimizer = bilevel_quadratic(dtype=torch.float32).optimizer("darts")
    losses = optimizer._history.losses
    optimizer.step()
    first = dict(losses["w"].displaced)
    optimizer.step()
    assert first and all(losses["w"].displaced[key] is tensor for key, tensor in first.items())
    losses["w"].displaced = {key: tensor.double() for key, tensor in first.items()}
    optimizer.step()
    assert all(tensor.dtype == torch.float32 for tensor in losses["w"].displaced.values())


@pytest.mark.parametrize(
    "engine", ["darts", "penalty", {"name": "cg", "products": "finite_difference"}]
)
def test_a_loss_may_freeze_and_thaw_its_parameters(engine, recwarn):
    """As adversarial training does around an attack on its own network."""

    def net_loss(net, _, *, up, thaws):
        for p in net.parameters() if thaws else ():
            p.requires_grad_(False)
        attack = 0.1 * net.weight.detach().sign()
        for p in net.parameters() if thaws else ():
            p.requires_grad_(True)
        return (net(up["x"] + attack) - 1.0).square().sum() + net.weight.square().sum()

    found = []
    for thaws in (False, True):
        torch.manual_seed(0)
        net, up = nn.Linear(2, 1).double(), nn.ParameterDict({"x": torch.ones(2).double()})
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        loss = partial(net_loss, thaws=thaws)
        optimizer = mlo.MultilevelOptimizer(
            [
                mlo.Problem("net", module=net, optimizer=sgd, loss=loss, steps=20),
                mlo.Problem(
                    "up",
                    module=up,
                    optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
                    loss=lambda up, _, *, net: net.weight.square().sum(),
                ),
            ],
            engine,
        )
        for _ in range(3):
            optimizer.step()
        found.append(optimizer.gradient("up"))
    assert torch.equal(found[0]["x"], found[1]["x"]) and bool(found[0]["x"].any())


@pytest.mark.parametrize("filters", [True, False])
def test_a_penalty_on_what_requires_gradients_is_seen(filters, recwarn):
    """Displaced parameters are constants, which `p.requires_grad` would leave out of a penalty."""

    def size(module):
        return sum(p.square().sum() for p in module.parameters() if p.requires_grad)

    def net_loss(net, _, *, up):
        penalty = size(net) if filters else net[1].weight.square().sum()
        return net[1].weight.sum().sin() + up["log"].exp() * penalty

    found = {}
    for engine in ("darts", "one_step"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
        net[0].requires_grad_(False)
        up = nn.ParameterDict({"log": torch.tensor(-1.0).double()})
        lower = mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.SGD(net[1].parameters(), lr=0.1),
            loss=net_loss,
        )
        upper = mlo.Problem(
            "up",
            module=up,
            optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
            loss=lambda up, _, *, net: net[1].weight.square().sum(),
        )
        optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
        found[engine] = [optimizer.gradient("up"), optimizer.step() and optimizer.gradient("up")]
        # The graphs of constants are kept for losses that need it alone.
        assert optimizer._history.losses["net"].lends == (engine == "darts" and filters)
    for ours, exact in zip(found["darts"], found["one_step"], strict=True):
        assert relative_error(ours, exact) < 1e-6
    assert not recwarn.list


# ------------------------------ losses that take gradients or hold on to them


X, Y = torch.linspace(-1.0, 1.0, 12).double().view(6, 2), torch.linspace(0.0, 1.0, 6).double()


def hidden(w, x=X):
    return torch.tanh(x @ w["a"])


def errors(w, h):
    return (h["c"].sigmoid() * (hidden(w) @ w["b"] - Y).square()).mean()


def sharpness_aware(w, batch, *, h):
    slope = torch.autograd.grad(errors(w, h), list(w.values()))
    return errors({k: p + 0.1 * g for (k, p), g in zip(w.items(), slope, strict=True)}, h)


def adapted(w, batch, *, h):
    slope = torch.autograd.grad(errors(w, h), list(w.values()), create_graph=True)
    return errors({k: p - 0.3 * g for (k, p), g in zip(w.items(), slope, strict=True)}, h)


def steep(w, batch, *, h):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad((hidden(w, x) @ w["b"]).sum(), x, create_graph=True)
    return errors(w, h) + h["c"].exp().mean() * slope.square().mean()


def slopes_in_read_values(w, batch, *, h):
    loss = errors(w, h)
    (slope,) = torch.autograd.grad(loss, h["c"], create_graph=True)
    return loss + slope.square().sum()


def shared_slopes(w, batch, *, h):
    (slope,) = mlo.once(lambda: torch.autograd.grad(h["c"].exp().sum(), h["c"], create_graph=True))
    return errors(w, {"c": slope})


def retained(w, batch, *, h):
    y = hidden(w)
    y.retain_grad()
    return (h["c"].sigmoid() * (y @ w["b"] - Y).square()).mean()


def hooked(w, batch, *, h):
    y = hidden(w)
    y.register_hook(lambda g: None)
    return (h["c"].sigmoid() * (y @ w["b"] - Y).square()).mean()


def validation(h, batch, *, w):
    return (hidden(w) @ w["b"] - Y.flip(0)).square().mean()


def weights():
    a = torch.linspace(-0.5, 1.0, 6).double().view(2, 3)
    return {"a": a, "b": torch.ones(3).double()}


def gradient(loss, engine):
    w = nn.ParameterDict(weights())
    h = nn.ParameterDict({"c": torch.linspace(-0.5, 0.5, 6).double()})
    lower = mlo.Problem("w", module=w, loss=loss, optimizer=torch.optim.SGD(w.parameters(), lr=0.5))
    upper = mlo.Problem(
        "h", module=h, loss=validation, optimizer=torch.optim.SGD(h.parameters(), lr=0.1)
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
    return optimizer.gradient("h")["c"]


def through_a_step(loss):
    """The same by hand."""
    w = {key: value.requires_grad_() for key, value in weights().items()}
    c = torch.linspace(-0.5, 0.5, 6).double().requires_grad_()
    slope = torch.autograd.grad(loss(w, None, h={"c": c}), list(w.values()), create_graph=True)
    after = {k: p - 0.5 * g for (k, p), g in zip(w.items(), slope, strict=True)}
    return torch.autograd.grad(validation(None, None, w=after), c)[0]


SLOPES = [adapted, steep, slopes_in_read_values, shared_slopes, retained, hooked]


@pytest.mark.filterwarnings("ignore:Engine 'penalty' did not converge")
@pytest.mark.parametrize("loss", SLOPES, ids=lambda loss: loss.__name__)
def test_losses_that_take_gradients_are_differenced(loss):
    exact = through_a_step(loss)
    assert relative_error(gradient(loss, "one_step"), exact) < 1e-12
    assert relative_error(gradient(loss, "darts"), exact) < 1e-6
    assert gradient(loss, "penalty").norm() > 0.0


def test_a_displacement_that_a_loss_detaches_is_warned_of():
    exact = through_a_step(sharpness_aware)
    assert relative_error(gradient(sharpness_aware, "one_step"), exact) < 1e-12
    with pytest.warns(mlo.SolveWarning, match=r"see through \.detach"):
        gradient(sharpness_aware, "darts")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["module", "loss"])
def test_compiled_code_is_compared_with_exact_products(part, recwarn):
    """The exact product is taken of the code as it was before it was compiled."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(8, 3)
    up = Vector(torch.zeros(1))

    def loss(net, _, *, up):
        return up.v.exp().sum() * (net(x) ** 2).mean()

    def gradient(net, loss, engine):
        lower = torch.optim.SGD(net.parameters(), lr=0.1)
        upper = torch.optim.SGD(up.parameters(), lr=0.1)
        problems = [
            mlo.Problem("net", module=net, optimizer=lower, loss=loss),
            mlo.Problem(
                "up",
                module=up,
                optimizer=upper,
                loss=lambda up, _, *, net: ((net(x) - 1) ** 2).mean(),
            ),
        ]
        return mlo.MultilevelOptimizer(problems, engine).gradient("up")["v"]

    expected = gradient(net, loss, "one_step")
    compiled = partial(torch.compile, backend="aot_eager")
    made = (compiled(net), loss) if part == "module" else (net, compiled(loss))
    assert torch.allclose(gradient(*made, "darts"), expected, rtol=1e-3)
    assert not [w for w in recwarn if issubclass(w.category, mlo.SolveWarning)]


def test_code_that_stays_compiled_is_not_compared(recwarn):
    """w* = 1 / (1 + exp(s)) = 1/2, from which one more step gives -lr · exp(s) w · w per entry."""
    penalty = aot_function(lambda w, s: s.exp() * (w**2).sum() / 2, fw_compiler=nop)
    # It is compiled once, for inputs like those of its first call.
    penalty(*(torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (2, 1)))
    w, s = (Vector(torch.zeros(n, dtype=torch.float64)) for n in (2, 1))
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.5),
            loss=lambda w, _, *, s: ((w.v - 1) ** 2).sum() / 2 + penalty(w.v, s.v).sum(),
            steps=3,
        ),
        mlo.Problem(
            "s",
            module=s,
            optimizer=torch.optim.SGD(s.parameters(), lr=0.0),
            loss=lambda s, _, *, w: (w.v**2).sum() / 2,
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "darts")
    optimizer.step()
    assert float(optimizer.gradient("s")["v"]) == pytest.approx(-0.25, rel=1e-6)
    assert not recwarn.list
