"""Two problems on one frozen encoder, its running statistics included.

The oracle is the algorithm as a plain loop with `torch.autograd`. The encoder's output depends on a
buffer that every evaluation in training mode moves, so an evaluation at another buffer is seen.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from mlo.testing import relative_error

LR, ROUNDS = 0.3, 4


class Drifting(nn.Module):
    """tanh(xW) divided by a running scale, which a pass moves as BatchNorm moves its variance."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.register_buffer("scale", torch.ones(weight.shape[1], dtype=weight.dtype))

    def forward(self, x):
        out = torch.tanh(x @ self.weight) / self.scale.clone()
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.9).add_(0.1 * (1.0 + out.abs().mean(0)))
        return out


class Head(nn.Module):
    def __init__(self, encoder, start):
        super().__init__()
        self.encoder = encoder
        self.v = nn.Parameter(start.clone())

    def forward(self, x):
        return self.encoder(x) @ self.v


def data():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(4, 3), draw(3), draw(3), draw(20, 4), draw(20), draw(20, 4), draw(20)


def train_loss(h, r, x, y):
    return (torch.sigmoid(r(x)) * (h(x) - y) ** 2).mean() + 0.2 * h.v.square().sum()


def valid_loss(h, xv, yv):
    return ((h(xv) - yv) ** 2).mean()


def program(engine, steps=1, copied=False):
    """Weighted regression: `r` weighs the examples that `h` is trained on, both on one encoder."""
    weight, start_h, start_r, x, y, xv, yv = data()
    encoder = Drifting(weight)
    h = Head(encoder, start_h)
    r = Head(Drifting(weight) if copied else encoder, start_r)
    problems = [
        mlo.Problem(
            "h",
            module=h,
            optimizer=torch.optim.SGD([h.v], lr=LR),
            loss=lambda h, _, *, r: train_loss(h, r, x, y),
            steps=steps,
        ),
        mlo.Problem(
            "r",
            module=r,
            optimizer=torch.optim.SGD([r.v], lr=LR),
            loss=lambda r, _, *, h: valid_loss(h, xv, yv),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), h, r


def oracle(steps):
    """The plain loop; returns both heads, the encoder's scale, and the last gradient of r."""
    weight, start_h, start_r, x, y, xv, yv = data()
    encoder = Drifting(weight)
    h, r = start_h, start_r.requires_grad_()

    class Functional:
        def __init__(self, v):
            self.v = v

        def __call__(self, x):
            return encoder(x) @ self.v

    for _ in range(ROUNDS):
        h = h.detach().requires_grad_()
        w = h
        for _ in range(steps):
            loss = train_loss(Functional(w), Functional(r), x, y)
            w = w - LR * torch.autograd.grad(loss, w, create_graph=True)[0]
        h = w
        (g,) = torch.autograd.grad(valid_loss(Functional(h), xv, yv), r)
        r = (r - LR * g).detach().requires_grad_()
    return h.detach(), r.detach(), encoder.scale, g


@pytest.mark.parametrize(
    ("engine", "steps"),
    [
        ({"name": "one_step", "keep_graph": False}, 1),
        ({"name": "one_step", "keep_graph": True}, 1),
        (mlo.Unroll(steps=3), 3),
    ],
    ids=["one_step", "kept graph", "unroll"],
)
def test_updates_on_a_shared_encoder_are_those_of_the_plain_loop(engine, steps):
    optimizer, h, r = program(engine, steps)
    for record in optimizer.run(ROUNDS):
        norm = record.gradient_norms["r"]
    expected_h, expected_r, scale, g = oracle(steps)
    assert relative_error(h.v.detach(), expected_h) < 1e-12
    assert relative_error(r.v.detach(), expected_r) < 1e-12
    assert relative_error(h.encoder.scale, scale) < 1e-12
    assert abs(norm - float(g.norm())) < 1e-12


def test_an_implicit_gradient_is_of_the_buffers_as_they_stand():
    """`r` moves the statistics of `h`'s loss too, so the solution is made again after it moved."""
    optimizer, h, r = program("direct", 30)
    optimizer.step()
    optimizer.step()
    x, y, xv, yv = data()[3:]
    scale = h.encoder.scale.clone()
    found = optimizer.gradient("r")["v"]
    assert torch.equal(h.encoder.scale, scale)

    def loss(v, u):
        # As one pass of the loss: r's answers first, which move the scale for h's.
        h.encoder.scale.copy_(scale)
        weights = torch.sigmoid(h.encoder(x) @ u)
        return (weights * (h.encoder(x) @ v - y) ** 2).mean() + 0.2 * v.square().sum()

    v, u = h.v.detach().requires_grad_(), r.v.detach().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda v: loss(v, u.detach()), v)
    gradient = torch.autograd.grad(loss(v, u), v, create_graph=True)[0]
    h.encoder.scale.copy_(scale)
    cotangent = torch.autograd.grad(((h.encoder(xv) @ v - yv) ** 2).mean(), v)[0]
    exact = -torch.autograd.grad(gradient, u, torch.linalg.solve(hessian, cotangent))[0]
    assert relative_error(found, exact) < 1e-10


def test_an_upper_problem_moves_the_statistics_it_shares():
    """As its own buffers in its own update, although it sees them in the module that it reads."""
    optimizer, h, _ = program("one_step")
    seen = [(update.problem, h.encoder.scale.clone()) for update in optimizer.updates(1)]
    assert [name for name, _ in seen] == ["h", "r"]
    assert not torch.equal(seen[0][1], seen[1][1])
    # With an encoder of its own, r's update reads h's statistics and leaves them alone.
    optimizer, h, _ = program("one_step", copied=True)
    seen = [(update.problem, h.encoder.scale.clone()) for update in optimizer.updates(1)]
    assert torch.equal(seen[0][1], seen[1][1])


def test_a_failed_update_puts_shared_statistics_back():
    optimizer, h, _ = program("one_step")
    optimizer.step()
    before = h.encoder.scale.clone()
    optimizer.problems["h"].loss = lambda h, _, *, r: train_loss(h, r, *data()[3:5]) * float("nan")
    with pytest.raises(mlo.NonFiniteError):
        optimizer.step()
    assert torch.equal(h.encoder.scale, before)


def test_a_state_with_a_shared_encoder_resumes():
    whole, _, r = program("one_step")
    for _ in whole.run(4):
        pass
    first, _, _ = program("one_step")
    for _ in first.run(2):
        pass
    second, h, resumed = program("one_step")
    second.load_state_dict(first.state_dict())
    for _ in second.run(2):
        pass
    assert torch.equal(resumed.v, r.v)
    assert torch.equal(h.encoder.scale, r.encoder.scale)


def test_a_solution_is_made_again_after_its_buffers_moved():
    """`r` reads h's solution, and its update moves the encoder before `a` reads that solution."""
    weight, start_h, start_r, x, y, xv, yv = data()
    encoder = Drifting(weight)
    h, r = Head(encoder, start_h), Head(encoder, start_r)
    a = nn.ParameterDict({"v": torch.zeros(20, dtype=torch.float64)})

    def h_loss(h, _, *, a):
        return (a["v"].exp() * (h(x) - y) ** 2).mean() + 0.2 * h.v.square().sum()

    losses = {
        "h": (h, h_loss),
        "r": (r, lambda r, _, *, h: valid_loss(r, x, y) + h.v.sum()),
        "a": (a, lambda a, _, *, h: valid_loss(h, xv, yv)),
    }
    problems = []
    for name, (module, loss) in losses.items():
        parameters = [p for p in module.parameters() if p.requires_grad]
        sgd = torch.optim.SGD(parameters, lr=0.0)
        problems.append(mlo.Problem(name, module=module, optimizer=sgd, loss=loss))
    optimizer = mlo.MultilevelOptimizer(problems, "direct")
    assert optimizer.graph.schedule() == ("h", "r", "a")
    record = optimizer.step()
    # No parameter has moved, and of the buffers none since r's update: the question is a's.
    asked = float(optimizer.gradient("a")["v"].norm())
    assert record.gradient_norms["a"] == pytest.approx(asked, rel=1e-12)
