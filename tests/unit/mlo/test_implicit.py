"""`implicit_solution`: what it takes, what it refuses, and what it says."""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import mlo
from mlo.hypergradient import Solve
from mlo.testing import relative_error

DOUBLE = {"dtype": torch.float64}
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), **DOUBLE)
Y = torch.randn(20, generator=torch.Generator().manual_seed(1), **DOUBLE)


def ridge_loss(w, decay):
    return (X @ w - Y).square().sum() + decay * w.square().sum()


def ridge(decay):
    return torch.linalg.solve(X.T @ X + decay * torch.eye(4, **DOUBLE), X.T @ Y)


def decay_of(value=2.0):
    return torch.tensor(value, requires_grad=True, **DOUBLE)


def slope(solution, decay):
    return torch.autograd.grad(solution.pow(3).sum(), decay)[0]


# ------------------------------ structures


Pair = namedtuple("Pair", ["a", "b"])


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda w: w, lambda p: p),
        (lambda w: {"a": w[:1], "b": w[1:]}, lambda p: torch.cat([p["a"], p["b"]])),
        (lambda w: OrderedDict(a=w[:1], b=w[1:]), lambda p: torch.cat([p["a"], p["b"]])),
        (lambda w: [w[:1], w[1:]], torch.cat),
        (lambda w: (w[:1], w[1:]), torch.cat),
        (lambda w: Pair(w[:1], w[1:]), lambda p: torch.cat([p.a, p.b])),
        (
            lambda w: {"a": {"b": w[:1]}, "a.b": [w[1:]]},
            lambda p: torch.cat([p["a"]["b"], p["a.b"][0]]),
        ),
    ],
    ids=["tensor", "dict", "ordered", "list", "tuple", "named", "nested"],
)
def test_the_structure_of_params_is_kept(pack, unpack):
    decay = decay_of()
    given = pack(ridge(decay.detach()))
    found = mlo.implicit_solution(given, decay, loss=lambda p, decay: ridge_loss(unpack(p), decay))
    assert type(found) is type(given)
    assert torch.equal(unpack(found), unpack(given))
    assert relative_error(slope(unpack(found), decay), slope(ridge(decay), decay)) < 1e-9


def test_parameter_containers_are_taken():
    decay = decay_of()
    w = ridge(decay.detach())
    as_dict = mlo.implicit_solution(
        nn.ParameterDict({"w": w}),
        nn.ParameterDict({"decay": decay}),
        loss=lambda p, r: ridge_loss(p["w"], r["decay"]),
    )
    as_list = mlo.implicit_solution(
        nn.ParameterList([w]), (decay,), loss=lambda p, r: ridge_loss(p[0], r[0])
    )
    assert type(as_dict) is dict
    assert type(as_list) is list
    assert torch.equal(as_dict["w"], w)
    assert torch.equal(as_list[0], w)


@pytest.mark.parametrize("kind", ["stationarity", "fixed_point"])
def test_the_structure_of_a_residual_is_that_of_params(kind):
    """By name, so that the order of a dict does not matter."""
    decay = decay_of()
    w = ridge(decay.detach())

    def residual(p, decay):
        w = torch.cat([p["a"], p["b"]])
        f = X.T @ (X @ w - Y) + decay * w
        f = f if kind == "stationarity" else w - 0.01 * f
        return {"b": f[1:], "a": f[:1]}

    found = mlo.implicit_solution(
        {"a": w[:1], "b": w[1:]}, decay, **{kind: residual}, engine="direct"
    )
    w = torch.cat([found["a"], found["b"]])
    assert relative_error(slope(w, decay), slope(ridge(decay), decay)) < 1e-9


def test_reads_may_hold_constants_beside_tensors():
    """Those that require no gradient have none, and neither have numbers, names and indices."""
    decay = decay_of()
    rows, scale = torch.arange(20), torch.tensor(1.0, **DOUBLE)
    reads = {"decay": decay, "rows": rows, "scale": scale, "factor": 1.0, "name": "w", "none": None}

    def loss(w, reads):
        assert reads["name"] == "w"
        fit = (X[reads["rows"]] @ w - Y).square().sum() * reads["scale"]
        return fit + reads["factor"] * reads["decay"] * w.square().sum()

    found = mlo.implicit_solution(ridge(decay.detach()), reads, loss=loss)
    found.pow(3).sum().backward()
    assert relative_error(decay.grad, slope(ridge(decay), decay)) < 1e-9
    assert scale.grad is None


def test_without_a_gradient_to_read_the_result_is_a_constant():
    found = mlo.implicit_solution(ridge(2.0), torch.tensor(2.0, **DOUBLE), loss=ridge_loss)
    assert torch.equal(found, ridge(2.0))
    assert not found.requires_grad
    decay = decay_of()
    with torch.no_grad():
        found = mlo.implicit_solution(ridge(2.0), decay, loss=lambda *given: 1 / 0)
    assert not found.requires_grad


def test_the_result_is_a_copy():
    """A solver that continues from its parameters does not disturb it."""
    decay = decay_of()
    w = ridge(decay.detach())
    found = mlo.implicit_solution(w, decay, loss=ridge_loss)
    w.zero_()
    assert torch.equal(found, ridge(decay.detach()))
    assert relative_error(slope(found, decay), slope(ridge(decay), decay)) < 1e-9


def test_frozen_parameters_and_integers_are_constants():
    decay = decay_of()
    net = nn.Linear(4, 1, **DOUBLE)
    net.bias.requires_grad_(False)
    with torch.no_grad():
        bias = net.bias.clone()
        eye = torch.eye(4, **DOUBLE)
        net.weight[0] = torch.linalg.solve(X.T @ X + decay * eye, X.T @ (Y - bias))
    params = {**dict(net.named_parameters()), "steps": torch.tensor(7)}

    def loss(params, decay):
        weights = {name: params[name] for name in ("weight", "bias")}
        found = torch.func.functional_call(net, weights, X)[:, 0]
        return (found - Y).square().sum() + decay * params["weight"].square().sum()

    found = mlo.implicit_solution(params, decay, loss=loss)
    assert not found["bias"].requires_grad
    assert torch.equal(found["bias"], bias)
    assert int(found["steps"]) == 7
    exact = torch.linalg.solve(X.T @ X + decay * eye, X.T @ (Y - bias))
    assert relative_error(slope(found["weight"], decay), slope(exact, decay)) < 1e-9


@pytest.mark.parametrize("engine", ["cg", "minres", "gmres", "neumann", "nystrom", "direct"])
@pytest.mark.parametrize("empty", [False, True])
def test_tensors_without_dimensions_or_entries(engine, empty):
    """w = x² as a solution of (w − x²)² + Σ e², with an e that has no entries."""
    x = decay_of(3.0)
    params = {"w": torch.tensor(9.0, **DOUBLE)}
    if empty:
        params["e"] = torch.zeros(0, 3, **DOUBLE)

    def loss(p, x):
        return (p["w"] - x**2) ** 2 + (p["e"].square().sum() if empty else 0.0)

    found = mlo.implicit_solution(params, x, loss=loss, engine=engine)
    assert found["w"].shape == ()
    (first,) = torch.autograd.grad(found["w"], x, create_graph=True)
    assert float(first.detach()) == pytest.approx(6.0)
    assert float(torch.autograd.grad(first, x)[0]) == pytest.approx(2.0)


@pytest.mark.parametrize("engine", ["cg", "gmres", "direct"])
def test_params_without_any_entry(engine):
    x = decay_of(3.0)
    found = mlo.implicit_solution(
        torch.zeros(0, **DOUBLE), x, loss=lambda w, x: x * w.square().sum(), engine=engine
    )
    (found.sum() + x).backward()
    assert float(x.grad) == 1.0


# ------------------------------ engines


@pytest.mark.parametrize("engine", ["cg", "minres", "gmres", "nystrom", "direct"])
def test_single_precision(engine):
    decay = torch.tensor(2.0, requires_grad=True)
    x, y = X.float(), Y.float()

    def loss(w, decay):
        return (x @ w - y).square().sum() + decay * w.square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mlo.implicit_solution(ridge(2.0).float(), decay, loss=loss, engine=engine)
        ours = slope(found, decay)
    exact = decay_of()
    assert ours.dtype == torch.float32
    assert relative_error(ours.double(), slope(ridge(exact), exact)) < 1e-5


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "cg", "products": "finite_difference", "tol": 1e-5},
        {"name": "penalty", "steps": 300, "warm_start": False},
        {"name": "soba"},
    ],
    ids=lambda engine: engine["name"],
)
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_engines_of_losses_serve_losses(engine):
    decay, memory = decay_of(), {}
    for _ in range(300 if engine["name"] == "soba" else 1):
        found = mlo.implicit_solution(
            ridge(decay.detach()), decay, loss=ridge_loss, engine=engine, memory=memory
        )
        ours = slope(found, decay)
    assert relative_error(ours, slope(ridge(decay), decay)) < 1e-4


def test_identity_and_first_order_are_their_formulas():
    decay = decay_of()
    w = ridge(decay.detach())
    found = mlo.implicit_solution(w, decay, loss=ridge_loss, engine="identity")
    # −Bᵀ v, with B = 2 w and v = 3 w².
    assert float(slope(found, decay)) == pytest.approx(float(-(2 * w) @ (3 * w**2)))
    found = mlo.implicit_solution(w, decay, loss=ridge_loss, engine="first_order")
    assert not found.requires_grad


@pytest.mark.parametrize("engine", ["one_step", "darts", "unroll"])
def test_engines_of_optimizers_steps_are_refused(engine):
    with pytest.raises(mlo.EngineError, match="differentiates an optimizer's steps"):
        mlo.implicit_solution(ridge(2.0), decay_of(), loss=ridge_loss, engine=engine)


@pytest.mark.parametrize("engine", ["penalty", {"name": "cg", "products": "finite_difference"}])
@pytest.mark.parametrize("kind", ["stationarity", "fixed_point"])
def test_engines_that_need_a_loss_refuse_other_conditions(engine, kind):
    with pytest.raises(mlo.EngineError, match="evaluates a loss, but none was given"):
        mlo.implicit_solution(ridge(2.0), decay_of(), **{kind: ridge_loss}, engine=engine)


@dataclass(frozen=True, kw_only=True)
class OfAnother(mlo.Engine):
    """An engine of another package, which has a memory without an option for it."""

    name: ClassVar[str] = "of_another"

    @property
    def keeps_memory(self):
        return True

    def solve(self, system, cotangent):
        return Solve(q=list(cotangent), report=self.report(system.problem))


@pytest.mark.parametrize(
    ("engine", "otherwise"),
    [
        ("soba", r"in all calls\."),
        (OfAnother(), r"in all calls\."),
        ("penalty", "warm_start=False"),
        ({"name": "cg", "warm_start": True}, "warm_start=False"),
        ({"name": "sid", "warm_start": True}, "warm_start=False"),
    ],
    ids=str,
)
def test_engines_that_resume_need_a_memory(engine, otherwise):
    with pytest.raises(mlo.EngineError, match=f"as memory= .*{otherwise}"):
        mlo.implicit_solution(ridge(2.0), decay_of(), loss=ridge_loss, engine=engine)
    found = mlo.implicit_solution(ridge(2.0), decay_of(), loss=ridge_loss, engine=engine, memory={})
    assert found.requires_grad


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_resumes_from_the_memory():
    decay, memory, reports = decay_of(), {}, []
    engine = {"name": "cg", "max_steps": 2, "warm_start": True}
    for _ in range(6):
        found = mlo.implicit_solution(
            ridge(2.0), decay, loss=ridge_loss, engine=engine, memory=memory, reports=reports
        )
        slope(found, decay)
    residuals = [report.residual for report in reports if report.engine == "cg"]
    assert residuals[-1] < 1e-2 * residuals[0]


@pytest.mark.parametrize("engine", ["penalty", {"name": "cg", "products": "finite_difference"}])
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_engines_without_a_second_derivative_refuse_one(engine):
    decay = decay_of()
    found = mlo.implicit_solution(ridge(2.0), decay, loss=ridge_loss, engine=engine, memory={})
    with pytest.raises(mlo.EngineError, match="differentiated twice"):
        torch.autograd.grad(found.sum(), decay, create_graph=True)


# ------------------------------ what is said


def test_reports_are_appended():
    decay, reports = decay_of(), []
    found = mlo.implicit_solution(ridge(2.0), decay, loss=ridge_loss, reports=reports)
    assert [report.engine for report in reports] == ["stationarity"]
    assert reports[0].residual < 1e-12
    slope(found, decay)
    assert [report.engine for report in reports] == ["stationarity", "cg"]
    assert reports[1].iterations == 4
    assert all(report.converged for report in reports)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("off", "warns"), [(1e-6, False), (0.1, True)])
def test_a_solution_that_is_none_is_warned_of_whatever_the_units(scale, unit, off, warns):
    """Of the loss (`scale`), and of the parameters."""
    decay, reports = decay_of(), []
    w = ridge(2.0) * (1.0 + off) * unit

    def loss(w, decay):
        return scale * ridge_loss(w / unit, decay)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mlo.implicit_solution(w, decay, loss=loss, reports=reports)
    assert [str(entry.message) for entry in caught if "not a solution" in str(entry.message)] == (
        [str(caught[0].message)] if warns else []
    )
    assert reports[0].converged is not warns
    if warns:
        assert caught[0].filename == __file__
        # About the relative error of w.
        assert 0.3 * off < reports[0].residual < 3.0 * off


def test_a_solution_of_zero_is_one():
    """Up to the solver's tolerance, which has no scale there."""
    bias = torch.zeros(3, requires_grad=True, **DOUBLE)
    weight = 0.5 * torch.eye(3, **DOUBLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (0.0, 1e-9):
            mlo.implicit_solution(
                torch.full((3,), size, **DOUBLE),
                bias,
                fixed_point=lambda z, bias: torch.tanh(weight @ z + bias),
                engine="gmres",
            )


def test_a_solve_that_did_not_converge_is_warned_of():
    decay = decay_of()
    found = mlo.implicit_solution(
        ridge(2.0), decay, loss=ridge_loss, engine={"name": "cg", "max_steps": 1}
    )
    with pytest.warns(mlo.SolveWarning, match="'cg' did not converge .*Raise max_steps") as caught:
        slope(found, decay)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("default")
def test_a_training_loop_is_told_once(recwarn):
    decay = decay_of()
    for off in (0.1, 0.11, 0.12):
        found = mlo.implicit_solution(
            (1.0 + off) * ridge(2.0),
            decay,
            loss=ridge_loss,
            engine={"name": "cg", "max_steps": 1},
        )
        slope(found, decay)
    assert len(recwarn) == 2


def rotation(w, x):
    """F = w + Rw − x, whose Jacobian is not symmetric."""
    return w + torch.tensor([[0.0, 1.0], [-1.0, 0.0]], **DOUBLE) @ w - x


@pytest.mark.filterwarnings("ignore:.*did not converge")
def test_an_engine_that_needs_symmetry_says_where_there_is_none():
    x = torch.tensor([1.0, 2.0], requires_grad=True, **DOUBLE)
    w = torch.tensor([-0.5, 1.5], **DOUBLE)
    found = mlo.implicit_solution(w, x, stationarity=rotation, engine="cg")
    with pytest.warns(mlo.SolveWarning, match="not symmetric, which the engine 'cg' needs"):
        found.sum().backward()


@pytest.mark.filterwarnings("error")
def test_a_symmetric_residual_suits_an_engine_that_needs_one():
    decay = decay_of()
    found = mlo.implicit_solution(
        ridge(2.0), decay, stationarity=lambda w, decay: X.T @ (X @ w - Y) + decay * w
    )
    assert relative_error(slope(found, decay), slope(ridge(decay), decay)) < 1e-9


def test_a_kink_is_warned_of():
    """The subgradient of a lasso holds entries at zero, which its gradient would let go."""
    w = torch.tensor([1.0, 0.0], **DOUBLE)
    decay = torch.tensor(0.5, requires_grad=True, **DOUBLE)
    target = torch.tensor([1.5, 0.2], **DOUBLE)

    def loss(w, decay):
        return 0.5 * (w - target).square().sum() + decay * w.abs().sum()

    with pytest.warns(mlo.SolveWarning, match="not a solution"):
        found = mlo.implicit_solution(w, decay, loss=loss)
    with pytest.warns(mlo.SolveWarning, match="exactly 0"):
        found.sum().backward()


@pytest.mark.parametrize("kind", ["loss", "stationarity"])
def test_a_function_that_changes_between_calls_is_warned_of(kind):
    generator = np.random.default_rng(0)

    def loss(w, decay):
        return ridge_loss(w, decay) + float(generator.normal()) * 1e-3 * w.sum()

    def stationarity(w, decay):
        return 2 * X.T @ (X @ w - Y) + 2 * decay * w + float(generator.normal()) * 1e-3

    function = loss if kind == "loss" else stationarity
    with pytest.warns(mlo.SolveWarning, match=f"{kind}, evaluated again"):
        mlo.implicit_solution(ridge(2.0), decay_of(), **{kind: function})


def test_noise_of_the_global_generators_is_replayed():
    """Dropout in the loss: solved with a mask, differentiated with the same one."""
    decay = decay_of()

    def loss(w, decay):
        mask = (torch.rand(20, **DOUBLE) > 0.3).double()
        return (mask * (X @ w - Y)).square().sum() + decay * w.square().sum()

    torch.manual_seed(3)
    mask = (torch.rand(20, **DOUBLE) > 0.3).double()

    def exact(decay):
        m = X * mask[:, None]
        return torch.linalg.solve(m.T @ m + decay * torch.eye(4, **DOUBLE), m.T @ (mask * Y))

    torch.manual_seed(3)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mlo.implicit_solution(exact(decay.detach()), decay, loss=loss)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert relative_error(slope(found, decay), slope(exact(decay), decay)) < 1e-9


# ------------------------------ what is refused


def test_exactly_one_condition_is_taken():
    with pytest.raises(mlo.ProblemError, match=r"exactly one .* got none"):
        mlo.implicit_solution(ridge(2.0), decay_of())
    with pytest.raises(mlo.ProblemError, match="got loss and fixed_point"):
        mlo.implicit_solution(
            ridge(2.0), decay_of(), loss=ridge_loss, fixed_point=lambda w, decay: w
        )


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (np.zeros(4), "'params' is a ndarray"),
        ({"w": [np.zeros(4)]}, "'w.0' is a ndarray"),
        (nn.Linear(4, 1), "is a Linear.*named_parameters"),
        (nn.Linear(4, 1).parameters(), "is a generator"),
        ({"w": 1.0}, "'w' is a float"),
        ((), "no tensor to solve for"),
        (torch.arange(4), "no tensor to solve for"),
        (nn.Parameter(torch.zeros(4), requires_grad=False), "no tensor to solve for"),
        (torch.zeros(4, dtype=torch.complex64), "is complex"),
        ([torch.zeros(4), torch.zeros(4, **DOUBLE)], "torch.float32 on cpu and torch.float64"),
    ],
)
def test_params_that_are_no_tensors_to_solve_for_are_refused(params, match):
    with pytest.raises(mlo.ProblemError, match=match):
        mlo.implicit_solution(params, decay_of(), loss=ridge_loss)


def test_reads_that_are_no_tensors_are_refused():
    with pytest.raises(mlo.ProblemError, match=r"reads takes .* 'data' is a ndarray"):
        mlo.implicit_solution(ridge(2.0), {"data": np.zeros(3)}, loss=ridge_loss)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda w, decay: X @ w, r"a tensor of shape \(20,\)"),
        (lambda w, decay: 1.0, "got 1.0"),
        (lambda w, decay: w.sum() > 0, "torch.bool"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused(value, match):
    with pytest.raises(mlo.ProblemError, match=f"floating-point scalar.*{match}"):
        mlo.implicit_solution(ridge(2.0), decay_of(), loss=value)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (
            lambda p, decay: p["w"],
            r"'w', of shape \(4,\), it has nothing. It returned a tensor of shape \(4,\)",
        ),
        (lambda p, decay: (p["w"],), "it has nothing. It returned a tuple of 1"),
        (lambda p, decay: {"v": p["w"]}, "it has nothing. It returned a dict of 'v'"),
        (lambda p, decay: 0.0, "it has nothing. It returned float"),
        (lambda p, decay: {"w": None}, "it has NoneType. It returned a dict of 'w'"),
        (lambda p, decay: {"w": p["w"][:2]}, r"it has a tensor of shape \(2,\)"),
    ],
)
def test_a_residual_of_another_structure_is_refused(value, match):
    with pytest.raises(mlo.ProblemError, match=match):
        mlo.implicit_solution({"w": ridge(2.0)}, decay_of(), stationarity=value)


@pytest.mark.parametrize("kind", ["loss", "stationarity", "fixed_point"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_tensor_that_is_read_but_not_declared_is_refused(kind, leaf):
    """Its derivative would be missing without a word."""
    secret = torch.ones(4, requires_grad=True, **DOUBLE)
    used = secret if leaf else secret.exp()

    def function(w, decay):
        f = X.T @ (X @ w - Y) + used * w
        return {"loss": (f * w).sum(), "stationarity": f, "fixed_point": w - f}[kind]

    with pytest.raises(mlo.ProblemError, match=r"shape \(4,\) that requires a gradient and is nei"):
        mlo.implicit_solution(ridge(2.0), decay_of(), **{kind: function}, engine="direct")
    # Detached it is a constant.
    used = used.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlo.SolveWarning)
        mlo.implicit_solution(ridge(2.0), decay_of(), **{kind: function}, engine="direct")


def test_tensors_that_are_used_beside_the_arguments_are_refused():
    decay = decay_of()
    with pytest.raises(mlo.ProblemError, match=r"passed as reads\['decay'\] itself"):
        mlo.implicit_solution(
            ridge(2.0), {"decay": decay}, loss=lambda w, reads: ridge_loss(w, decay)
        )
    w = ridge(2.0).requires_grad_()
    with pytest.raises(mlo.ProblemError, match=r"passed as params\['params'\] itself"):
        mlo.implicit_solution(w, decay, loss=lambda _, decay: ridge_loss(w, decay))
    with pytest.raises(mlo.ProblemError, match="does not depend on params"):
        mlo.implicit_solution(
            ridge(2.0), decay, loss=lambda _, decay: ridge_loss(ridge(2.0), decay)
        )
    with pytest.raises(mlo.ProblemError, match="does not depend on params"):
        mlo.implicit_solution(ridge(2.0), decay, stationarity=lambda w, decay: w.detach())


def test_a_loss_without_a_right_second_derivative_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, v):
            return 2 * v * ctx.saved_tensors[0]

    decay = decay_of()

    def loss(w, decay):
        return Once.apply(X @ w - Y).sum() + decay * w.square().sum()

    with pytest.raises(mlo.EngineError, match="no double backward"):
        mlo.implicit_solution(ridge(2.0), decay, loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlo.SolveWarning)
        found = mlo.implicit_solution(
            ridge(2.0),
            decay,
            loss=loss,
            engine={"name": "penalty", "steps": 300, "warm_start": False},
        )
    assert relative_error(slope(found, decay), slope(ridge(decay), decay)) < 1e-4


# ------------------------------ in use


def test_a_training_loop_learns_through_batches_of_solutions():
    """The regularisation is learned down the gradient of all solutions of a batch together."""
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), **DOUBLE)
    targets = weights @ X.T
    log_decay = torch.zeros(4, requires_grad=True, **DOUBLE)
    optimizer = torch.optim.SGD([log_decay], lr=0.05)

    def exact(log_decay):
        return torch.linalg.solve(X.T @ X + log_decay.exp().diag(), X.T @ targets.T).T

    def loss(w, log_decay):
        return (w @ X.T - targets).square().sum() + (log_decay.exp() * w.square()).sum()

    values = []
    for _ in range(5):
        w = mlo.implicit_solution(exact(log_decay.detach()), log_decay, loss=loss)
        upper = (w - weights).square().sum()
        expected = torch.autograd.grad((exact(log_decay) - weights).square().sum(), log_decay)[0]
        optimizer.zero_grad()
        upper.backward()
        assert relative_error(log_decay.grad, expected) < 1e-6
        optimizer.step()
        values.append(float(upper.detach()))
    assert values[-1] < values[0]


def test_one_backward_pass_may_go_through_several_solutions():
    decay = decay_of()
    w = nn.Parameter(ridge(2.0))
    found = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            w.copy_(ridge(factor * decay))
        found.append(mlo.implicit_solution(w, factor * decay, loss=ridge_loss))
    ours = torch.autograd.grad(found[0] @ found[1], decay)[0]
    naive = torch.autograd.grad(ridge(decay) @ ridge(3.0 * decay), decay)[0]
    assert relative_error(ours, naive) < 1e-9


def tensors_alive():
    return sum(issubclass(type(entry), torch.Tensor) for entry in gc.get_objects())


@pytest.mark.parametrize("kind", ["loss", "stationarity"])
@pytest.mark.parametrize("twice", [False, True])
def test_calls_leave_nothing_behind(kind, twice):
    """Without the garbage collector, which would hide a cycle for a while."""
    decay = decay_of()
    function = {
        "loss": ridge_loss,
        "stationarity": lambda w, decay: X.T @ (X @ w - Y) + decay * w,
    }[kind]

    def call(differentiate):
        found = mlo.implicit_solution(ridge(2.0), decay, **{kind: function})
        if differentiate:
            (first,) = torch.autograd.grad(found.sum(), decay, create_graph=twice)
            if twice:
                torch.autograd.grad(first, decay)

    call(True)
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        for _ in range(50):
            call(True)
            call(False)
        assert tensors_alive() <= before + 2
    finally:
        gc.enable()
