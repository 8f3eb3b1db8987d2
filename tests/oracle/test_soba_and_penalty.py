"""`soba` and `penalty`: what they keep between updates, what they cost, and where they need no
second derivative.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from squares import Square, SquareOnce
from torch import nn
from torch.optim import SGD

import mlo
from mlo.testing import Vector, identical, relative_error, snapshot

DIM = 6


class Fixed:
    """A lower quadratic ½ wᵀAw·s − wᵀB(x + y) and two upper losses wᵀv, none of which move: only an
    engine's memory does.
    """

    def __init__(self, engine):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis, _ = torch.linalg.qr(normal(DIM, DIM))
        self.matrix = (basis * torch.linspace(0.2, 1.0, DIM, dtype=torch.float64)) @ basis.T
        self.block, self.v = normal(DIM, 3), {"x": normal(DIM), "y": normal(DIM)}
        self.scale, self.calls = 1.0, 0

        def lower(w, _, *, x, y):
            self.calls += 1
            return self.scale * 0.5 * w.v @ self.matrix @ w.v - w.v @ (self.block @ (x.v + y.v))

        def problem(name, size, loss):
            module = Vector(torch.ones(size, dtype=torch.float64))
            return mlo.Problem(
                name, module=module, optimizer=SGD(module.parameters(), lr=0.0), loss=loss
            )

        self.optimizer = mlo.MultilevelOptimizer(
            [
                problem("w", DIM, lower),
                problem("x", 3, lambda x, _, *, w: w.v @ self.v["x"]),
                problem("y", 3, lambda y, _, *, w: w.v @ self.v["y"]),
            ],
            # y is judged at x's value, so that each asks for w's response alone.
            {"w": engine, "x": "first_order"},
        )

    def exact(self, name):
        return self.block.T @ torch.linalg.solve(self.scale * self.matrix, self.v[name])

    def gradient(self, name):
        return self.optimizer.gradient(name)["v"]

    def series(self, name, terms, alpha):
        total, term = torch.zeros(DIM, dtype=torch.float64), alpha * self.v[name]
        for _ in range(terms):
            total, term = total + term, term - alpha * self.matrix @ term
        return self.block.T @ total


# ------------------------------ memory between updates


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_soba_moves_one_step_per_update_to_the_inverse(rounds):
    fixed = Fixed(mlo.Soba(step_size=0.8))
    records = list(fixed.optimizer.run(rounds))
    for name in ("x", "y"):  # each upper problem's own solve; `gradient` looks one update further
        assert relative_error(fixed.gradient(name), fixed.series(name, rounds + 1, 0.8)) < 1e-12
    assert [record.solves["w"].iterations for record in records] == [0, 1, 1, 1, 1, 1, 1][:rounds]


@pytest.mark.parametrize("engine", [mlo.Soba(), mlo.Penalty(steps=1)], ids=["soba", "penalty"])
def test_persistent_engines_reach_every_exact_gradient(engine):
    """Persistent engines reach the exact hypergradient of every upper problem."""
    fixed = Fixed(engine)
    list(fixed.optimizer.run(150))
    for name in ("x", "y"):
        assert relative_error(fixed.gradient(name), fixed.exact(name)) < 1e-6


@pytest.mark.parametrize(
    "engine", [mlo.Soba(), mlo.Penalty(steps=1, multiplier=100.0)], ids=["soba", "penalty"]
)
def test_automatic_step_sizes_follow_a_curvature_that_grows(engine):
    fixed = Fixed(engine)
    list(fixed.optimizer.run(5))
    for fixed.scale in (3.0, 10.0, 30.0):
        list(fixed.optimizer.run(40))  # a solve that is lost warns, and a warning is an error
    list(fixed.optimizer.run(100))
    assert relative_error(fixed.gradient("x"), fixed.exact("x")) < 1e-4


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (mlo.Soba(step_size=30.0), "diverged and starts over"),
        (mlo.Penalty(step_size=30.0), "copies diverge"),
    ],
    ids=["soba", "penalty"],
)
def test_a_step_size_that_is_too_large_is_said(engine, message):
    """A step size that is too large is said, and nothing becomes infinite."""
    fixed = Fixed(engine)
    with pytest.warns(mlo.SolveWarning, match=message):
        records = list(fixed.optimizer.run(30))
    assert any(record.solves["w"].failed for record in records)
    assert fixed.gradient("x").isfinite().all()


def test_an_outlying_batch_does_not_stop_soba_for_good():
    fixed = Fixed(mlo.Soba())
    list(fixed.optimizer.run(3))
    fixed.scale = 1e4
    with pytest.warns(mlo.SolveWarning, match="diverged and starts over"):
        fixed.optimizer.step()
    fixed.scale = 1.0
    list(fixed.optimizer.run(250))
    assert relative_error(fixed.gradient("x"), fixed.exact("x")) < 1e-3


def test_a_soba_that_does_not_follow_says_so():
    """On an indefinite Hessian no step of either sign makes all of q converge."""
    fixed = Fixed(mlo.Soba(step_size=1e-6))
    with pytest.warns(mlo.SolveWarning, match="lags behind"):
        list(fixed.optimizer.run(130))


def test_the_kept_step_size_suits_an_indefinite_hessian():
    """On an indefinite Hessian the kept step size stays near the largest curvature."""
    fixed = Fixed(mlo.Soba())
    eigenvalues, basis = torch.linalg.eigh(fixed.matrix)
    eigenvalues[0] = -0.5
    fixed.matrix.copy_((basis * eigenvalues) @ basis.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlo.SolveWarning)
        list(fixed.optimizer.run(150))
    kept = [
        float(v)
        for k, v in fixed.optimizer.state_dict()["problems"]["w"]["memory"].items()
        if k.endswith("curvature")
    ]
    assert all(0.9 * float(eigenvalues.abs().max()) < value < 3.0 for value in kept)


@pytest.mark.parametrize("engine", ["soba", "penalty"])
def test_memory_is_part_of_the_state(engine, tmp_path):
    whole, resumed = Fixed(engine), Fixed(engine)
    list(whole.optimizer.run(3))
    mlo.save_checkpoint(whole.optimizer.state_dict(), tmp_path / "s.pt")
    resumed.optimizer.load_state_dict(mlo.load_checkpoint(tmp_path / "s.pt"))
    assert identical(whole.gradient("y"), resumed.gradient("y"))
    list(whole.optimizer.run(2))
    list(resumed.optimizer.run(2))
    assert identical(snapshot(whole.optimizer), snapshot(resumed.optimizer))


def test_penalty_costs_two_gradients_per_step():
    """Penalty costs two gradients per step, and three for the inputs and the solution."""
    fixed = Fixed(mlo.Penalty(steps=3))
    list(fixed.optimizer.run(2))  # estimates a step size, for each upper problem; has checks
    fixed.calls = 0
    fixed.optimizer.step()
    assert fixed.calls == 1 + 2 * (2 * 3 + 3)  # w's own loss, then for each of x and y


# ------------------------------ losses that are not quadratic, or not solved


def smooth_net(dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def regression(engine, *, net, steps, lr=0.5, compile=False):
    """A network with learned L2 penalties (one a tensor), after `steps` of gradient descent."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(net.parameters()).dtype
    x = torch.randn(32, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.sin(x.sum(1, keepdim=True))
    decay = Vector(torch.full((4,), -2.0, dtype=dtype))

    def train(net, _, *, decay):
        penalty = sum(
            (d.exp() * (p**2).sum()) for d, p in zip(decay.v, net.parameters(), strict=True)
        )
        return ((net(x[:16]) - y[:16]) ** 2).mean() + penalty

    def valid(decay, _, *, net):
        return ((net(x[16:]) - y[16:]) ** 2).mean()

    optimizer = SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        train(net, None, decay=decay).backward()
        optimizer.step()
    problems = [
        mlo.Problem("net", module=net, optimizer=optimizer, loss=train, compile=compile),
        mlo.Problem("decay", module=decay, optimizer=SGD(decay.parameters(), lr=0.0), loss=valid),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def test_penalty_agrees_with_the_dense_solve_on_a_network():
    torch.manual_seed(1)
    net = smooth_net()
    exact = regression("direct", net=net, steps=3000).gradient("decay")["v"]
    found = regression(mlo.Penalty(steps=1500), net=net, steps=0).gradient("decay")["v"]
    assert relative_error(found, exact) < 1e-5


def test_penalty_takes_the_derivative_at_the_current_point():
    """Penalty takes the derivative at the current point of a lower problem that has not
    converged.
    """
    torch.manual_seed(1)
    net = smooth_net()
    penalty = regression(mlo.Penalty(steps=8, step_size=0.3), net=net, steps=3).gradient("decay")[
        "v"
    ]
    series = regression(mlo.Neumann(num_terms=8, step_size=0.3), net=net, steps=0).gradient(
        "decay"
    )["v"]
    assert relative_error(penalty, series) < 1e-6


# ------------------------------ no second derivative


class Attention(nn.Module):
    """One head of scaled-dot-product attention, whose fused kernels have no double backward."""

    def __init__(self, backends=None):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.backends = backends

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.backends is None:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        with nn.attention.sdpa_kernel(self.backends):
            return nn.functional.scaled_dot_product_attention(q, k, v)


def attention(engine, module, *, compile=False):
    inputs = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(5))
    scale = Vector(torch.zeros(8))
    return mlo.MultilevelOptimizer(
        [
            mlo.Problem(
                "layer",
                module=module,
                optimizer=SGD(module.parameters(), lr=0.1, weight_decay=0.5),
                loss=lambda layer, _, *, scale: (
                    (layer(inputs) * torch.exp(scale.v) - 1.0).pow(2).mean()
                ),
                compile=compile,
            ),
            mlo.Problem(
                "scale",
                module=scale,
                optimizer=SGD(scale.parameters(), lr=0.1),
                loss=lambda scale, _, *, layer: layer(inputs).pow(3).mean(),
            ),
        ],
        engine,
    )


PAIRS = [("darts", "one_step"), ("penalty", mlo.Neumann(num_terms=5))]


@pytest.mark.parametrize(("engine", "exact"), PAIRS, ids=["darts", "penalty"])
def test_finite_differences_work_through_fused_attention(engine, exact):
    torch.manual_seed(0)
    fused = Attention()
    plain = Attention(backends=[nn.attention.SDPBackend.MATH])
    plain.load_state_dict(fused.state_dict())
    expected = attention(exact, plain).gradient("scale")["v"]
    assert relative_error(attention(engine, fused).gradient("scale")["v"], expected) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "exact"), PAIRS, ids=["darts", "penalty"])
def test_finite_differences_work_through_a_compiled_module(engine, exact):
    """Finite differences work through a compiled module with fused attention."""
    torch.manual_seed(0)
    fused = Attention()
    expected = attention(engine, copy.deepcopy(fused)).gradient("scale")["v"]
    found = attention(engine, fused, compile={"backend": "aot_eager"}).gradient("scale")["v"]
    assert relative_error(found, expected) < 2e-2


@pytest.mark.parametrize("engine", ["one_step", "cg", "unroll"])
def test_a_loss_without_double_backward_is_refused(engine):
    """A loss without double backward is refused before anything moves."""
    optimizer = attention(engine, Attention())
    before = snapshot(optimizer)
    with pytest.raises(mlo.EngineError, match=r"'layer'.*scaled_dot_product.*'darts' or 'penalty'"):
        optimizer.step()
    assert identical(
        before["problems"]["layer"]["module"], snapshot(optimizer)["problems"]["layer"]["module"]
    )


class OnceDifferentiable(SquareOnce):
    """x² whose derivative PyTorch takes for a constant."""


def custom(engine, function=OnceDifferentiable):
    w, x = Vector(torch.ones(3).double()), Vector(torch.full((3,), 0.5).double())
    return mlo.MultilevelOptimizer(
        [
            mlo.Problem(
                "w",
                module=w,
                optimizer=SGD(w.parameters(), lr=0.1),
                loss=lambda w, _, *, x: (function.apply(w.v * x.v)).sum(),
            ),
            mlo.Problem(
                "x",
                module=x,
                optimizer=SGD(x.parameters(), lr=0.1),
                loss=lambda x, _, *, w: (w.v**2).sum(),
            ),
        ],
        engine,
    )


class HiddenBelow(Square):
    """The same below another decorator."""

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_hidden_once_differentiable_function_is_refused():
    """A once-differentiable function below another decorator is refused."""
    with pytest.raises(mlo.EngineError, match=r"HiddenBelow\.backward is once_differentiable"):
        custom("one_step", HiddenBelow).gradient("x")


def test_a_once_differentiable_function_is_refused():
    """A once-differentiable function would be silently wrong, and is refused."""
    with pytest.raises(
        mlo.EngineError, match=r"OnceDifferentiable\.backward is once_differentiable"
    ):
        custom("one_step").gradient("x")
    # w' = w − 0.1 · 2 w x², so the gradient is 2 w' · dw'/dx.
    w, x = 1.0, 0.5
    expected = 2 * (w - 0.2 * w * x**2) * (-0.4 * w * x)
    assert torch.allclose(
        custom("darts").gradient("x")["v"], torch.full((3,), expected).double(), rtol=1e-6
    )
