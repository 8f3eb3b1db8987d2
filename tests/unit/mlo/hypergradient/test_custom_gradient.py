"""Tests that a loss whose gradient is not that of its value is told of."""

import pytest
import torch
from torch import nn

import mlo
from mlo.testing import Vector

MATRIX = torch.tensor([[0.8, -0.3], [0.5, 0.6]], dtype=torch.float64)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def reversal(w, batch, *, h):
    """A descends, b ascends, as in domain-adversarial training."""
    a, b = w.v[:2], Reversed.apply(w.v[2:])
    return (a**2).sum() - (b**2).sum() + a @ MATRIX @ b + h.v @ w.v


def semi_gradient(w, batch, *, h):
    """Temporal differences: the target is a constant for the step."""
    value = torch.cat([MATRIX, MATRIX.T], 1) @ w.v
    return ((h.v[:2] + 0.9 * value.detach().flip(0) - value) ** 2).sum() + 0.1 * (w.v**2).sum()


def solved(loss, engine, *, steps=30, dtype=torch.float64):
    start = torch.tensor([0.4, -0.3, 0.2, 0.5], dtype=dtype)
    w, h = Vector(start), Vector(start.flip(0))
    sgd = torch.optim.SGD(w.parameters(), lr=0.1)
    up = torch.optim.SGD(h.parameters(), lr=0.0)
    problems = [
        mlo.Problem("w", module=w, optimizer=sgd, loss=loss, steps=steps),
        mlo.Problem("h", module=h, optimizer=up, loss=lambda h, _, *, w: ((w.v - 1.0) ** 2).sum()),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


@pytest.mark.parametrize("steps", [1, 200])  # at a solution every slope is zero
@pytest.mark.parametrize("engine", ["gmres", "direct"])
@pytest.mark.parametrize("loss", [reversal, semi_gradient])
def test_a_gradient_that_is_not_the_losss_is_told(loss, engine, steps):
    optimizer = solved(loss, engine, steps=steps)
    with pytest.warns(mlo.SolveWarning, match=r"its gradient is not that of its value.*players="):
        optimizer.step()
    optimizer.step()  # once per problem: warnings are errors in the tests


@pytest.mark.parametrize("engine", ["gmres", "neumann"])
def test_a_picard_iteration_with_a_detached_target_is_told(engine):
    """½‖z − T(z)‖² with a detached T: along q its slopes agree nearly, and T' is not symmetric."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()

    def residual(w, batch, *, h):
        target = (0.3 * w.v.detach() @ mix + h.v).tanh()
        return ((w.v - target) ** 2).sum() / 2

    with pytest.warns(mlo.SolveWarning, match="its gradient is not that of its value"):
        solved(residual, engine, steps=200).step()


class Adversaries(nn.Module):
    """A generator and a discriminator."""

    def __init__(self, activation):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.maker = nn.Sequential(nn.Linear(2, 6), activation(), nn.Linear(6, 2))
            self.judge = nn.Sequential(nn.Linear(2, 6), activation(), nn.Linear(6, 1))


def adversarial(*, activation=nn.Tanh, detached, apart=0.0, dtype=torch.float64):
    """A GAN below h, which weights the real examples."""
    noise, real = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0)).to(dtype)

    def losses(gan, batch, *, h):
        images = gan.maker(noise)
        shown = images.detach() if detached else images
        known = h.v.sigmoid() * nn.functional.softplus(-gan.judge(real))[:, 0]
        # A term without the judge's own parameters, which do not follow it.
        reported = apart * (images.detach() ** 2).mean()
        return {
            "maker": nn.functional.softplus(-gan.judge(images)).mean(),
            "judge": known.mean() + nn.functional.softplus(gan.judge(shown)).mean() + reported,
        }

    gan, h = Adversaries(activation).to(dtype), Vector(torch.zeros(8, dtype=dtype))
    sgd, up = (torch.optim.SGD(module.parameters(), lr=lr) for module, lr in ((gan, 0.1), (h, 0.0)))
    players = {"maker": "maker", "judge": "judge"}
    problems = [
        mlo.Problem("gan", module=gan, optimizer=sgd, loss=losses, players=players, steps=5),
        mlo.Problem(
            "h", module=h, optimizer=up, loss=lambda h, _, *, gan: (gan.judge(real) ** 2).mean()
        ),
    ]
    return mlo.MultilevelOptimizer(problems, {"name": "direct", "damping": 0.1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_player_that_detaches_another_is_told(dtype):
    """The usual `fake.detach()`: A lacks the block by which the judge follows the maker."""
    with pytest.warns(mlo.SolveWarning, match="player 'judge': do not detach what comes from them"):
        adversarial(detached=True, dtype=dtype).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_players_that_are_in_the_gradient_are_not_told_of(dtype):
    adversarial(detached=False, dtype=dtype).step()
    adversarial(detached=False, activation=nn.ReLU, dtype=dtype).step()
    adversarial(detached=False, apart=3.0, dtype=dtype).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 200])
def test_kinks_and_constants_above_are_no_custom_gradient(steps, dtype):
    def in_dtype(w, batch, *, h):
        kinked = (torch.cat([MATRIX, -MATRIX], 1).to(dtype) @ w.v - 0.1).relu()
        smooth = (w.v**2).sum() + h.v @ w.v + h.v.detach().sum()
        return (kinked**2).sum() + (w.v - 0.3).abs().sum() + smooth

    solved(in_dtype, "cg", steps=steps, dtype=dtype).step()


@pytest.mark.parametrize("frequency", [30.0, 37.0, 50.0])
def test_a_loss_that_oscillates_within_a_step_is_none(frequency):
    """Differences over many periods agree with each other, and with no slope."""
    times = torch.linspace(0.0, 10.0, 60, dtype=torch.float64)

    def loss(w, batch, *, h):
        fit = ((w.v[:1] * times).sin() - (frequency * times).sin()).square().mean()
        return fit + 1e-6 * h.v.exp()[0] * w.v[0] ** 2

    w, h = Vector(torch.tensor([frequency]).double()), Vector(torch.zeros(1).double())
    sgd, up = (torch.optim.SGD(module.parameters(), lr=0.0) for module in (w, h))
    problems = [
        mlo.Problem("w", module=w, optimizer=sgd, loss=loss),
        mlo.Problem("h", module=h, optimizer=up, loss=lambda h, _, *, w: (w.v**2).sum()),
    ]
    mlo.MultilevelOptimizer(problems, "gmres").step()


def test_a_loss_may_be_undefined_beside_its_solution():
    data = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64)

    def loss(w, batch, *, h):
        normal = torch.distributions.Normal(h.v[:1], w.v)
        return -normal.log_prob(data[:, None]).mean() + 0.1 * (w.v**2).sum()

    w, h = (Vector(torch.tensor(start).double()) for start in ([5.0, 2.0, 0.05], [0.0]))
    sgd, up = (torch.optim.SGD(module.parameters(), lr=0.0) for module in (w, h))
    problems = [
        mlo.Problem("w", module=w, optimizer=sgd, loss=loss),
        mlo.Problem("h", module=h, optimizer=up, loss=lambda h, _, *, w: -w.v[2]),
    ]
    mlo.MultilevelOptimizer(problems, "direct").step()


def test_the_game_that_the_warning_advises_is_exact():
    """The fixed point of temporal differences, with the target as a player of its own."""

    def losses(c, batch, *, h):
        value = MATRIX @ c["value"].v
        target = h.v[:2] + 0.5 * (MATRIX @ c["target"].v).flip(0)
        return {
            "value": ((target - value) ** 2).sum() / 2,
            "target": ((c["target"].v - c["value"].v) ** 2).sum() / 2,
        }

    c = nn.ModuleDict({key: Vector(torch.zeros(2).double()) for key in ("value", "target")})
    h = Vector(torch.tensor([0.4, -0.3]).double())
    sgd, up = (torch.optim.SGD(module.parameters(), lr=lr) for module, lr in ((c, 0.5), (h, 0.0)))
    players = {"value": "value", "target": "target"}
    problems = [
        mlo.Problem("c", module=c, optimizer=sgd, loss=losses, players=players, steps=300),
        mlo.Problem("h", module=h, optimizer=up, loss=lambda h, _, *, c: (c["value"].v ** 2).sum()),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "gmres")
    optimizer.step()
    v = h.v.detach().clone().requires_grad_()
    flip = torch.eye(2).double().flip(0)  # M w = v + F M w / 2
    found = torch.linalg.solve((torch.eye(2).double() - 0.5 * flip) @ MATRIX, v)
    (expected,) = torch.autograd.grad((found**2).sum(), v)
    torch.testing.assert_close(optimizer.gradient("h")["v"], expected, rtol=1e-6, atol=0.0)
