"""A solve on one minibatch is biased: said once, and cured by batches of the solve's own.

Least squares with Gaussian features, at the exact solution of all examples, where the gradient is
known in closed form.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import mlo
from mlo.testing import identical, relative_error

EXAMPLES, DIM, UPPER = 1024, 20, 4
GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(EXAMPLES, DIM, generator=GENERATOR, dtype=torch.float64)
B = torch.randn(DIM, UPPER, generator=GENERATOR, dtype=torch.float64) / DIM**0.5
H = A.T @ A / EXAMPLES
START = torch.randn(UPPER, generator=GENERATOR, dtype=torch.float64)
SOLUTION = torch.linalg.solve(H, B @ START)
EXACT = B.T @ torch.linalg.solve(H, SOLUTION)
CG = {"name": "cg", "max_steps": 60, "tol": 1e-10}


def batches(size):
    return [A[start : start + size] for start in range(0, EXAMPLES, size)]


def make(engine, *, size, reduce="mean", **options):
    z = torch.nn.ParameterDict({"z": SOLUTION.clone()})
    x = torch.nn.ParameterDict({"x": START.clone()})

    def loss(z, a, *, x):
        losses = (a @ z["z"]) ** 2 / 2 - (B @ x["x"]) @ z["z"]
        return losses.mean() if reduce == "mean" else losses.sum()

    problems = [
        mlo.Problem(
            "z",
            module=z,
            optimizer=torch.optim.SGD(z.parameters(), lr=0.0),
            data=batches(size),
            loss=loss,
            **options,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, z: (z["z"] ** 2).sum() / 2,
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def mean_gradient(optimizer, rounds):
    found = []
    for _ in range(rounds):
        optimizer.step()
        found.append(optimizer.gradient("x")["x"])
    return torch.stack(found).mean(0)


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_the_mean_of_solves_on_batches_is_too_large():
    """By n / (n − d − 1), which is what the warning is about."""
    found = mean_gradient(make(CG, size=64), rounds=16)
    assert float(found @ EXACT / (EXACT @ EXACT)) == pytest.approx(64 / (64 - DIM - 1), rel=0.15)


@pytest.mark.parametrize("engine", [CG, "direct", {**CG, "name": "minres"}], ids=str)
def test_a_biased_solve_is_warned_of_once(engine):
    optimizer = make(engine, size=64)
    with pytest.warns(mlo.SolveWarning, match=r"one batch is biased.*solve_data") as seen:
        list(optimizer.run(4))
    assert len([w for w in seen if "biased" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"engine": CG, "size": EXAMPLES},
        {"engine": CG, "size": 64, "accumulate": EXAMPLES // 64},
        {"engine": "identity", "size": 64},
        {"engine": "one_step", "size": 64},
        {"engine": {**CG, "damping": 20.0}, "size": 64},
        {"engine": CG, "size": 64, "reduce": "sum"},
    ],
    ids=[
        "all examples",
        "all, in parts",
        "no inverse",
        "a step",
        "damped",
        "a sum, of which halves say nothing",
    ],
)
def test_no_bias_no_warning(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "No gradient reaches")  # (z makes no step here)
        make(**options).step()


def test_the_estimate_changes_nothing():
    """The check evaluates and solves on copies."""
    first, second = make(CG, size=64), make(CG, size=64)
    second._history.losses["z"].checks.dismiss("batch bias")
    list(second.run(3))
    with pytest.warns(mlo.SolveWarning, match="biased"):
        list(first.run(3))
    assert identical(first.state_dict(), second.state_dict())


# ------------------------------ batches of the solve's own


def test_a_solve_with_all_of_the_data_is_exact():
    optimizer = make(CG, size=64, solve_data=[A])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        assert relative_error(optimizer.gradient("x")["x"], EXACT) < 1e-8


def test_several_batches_are_averaged_before_the_solve():
    optimizer = make(CG, size=64, solve_data=batches(64), solve_batches=16)
    optimizer.step()
    assert relative_error(optimizer.gradient("x")["x"], EXACT) < 1e-8


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_each_solve_draws_anew_and_a_question_takes_nothing():
    optimizer = make(CG, size=64, solve_data=batches(128))
    optimizer.step()
    first = optimizer.gradient("x")["x"]
    assert torch.equal(optimizer.gradient("x")["x"], first)
    for a in (batches(128)[1],):  # the second batch is the next
        h = a.T @ a / len(a)
        exact = B.T @ torch.linalg.solve(h, SOLUTION)
        assert relative_error(first, exact) < 1e-6
    optimizer.step()
    assert not torch.equal(optimizer.gradient("x")["x"], first)


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_the_position_in_the_solves_data_is_part_of_the_state():
    optimizer, other = (make(CG, size=64, solve_data=batches(128)) for _ in range(2))
    list(optimizer.run(3))
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.gradient("x")["x"], other.gradient("x")["x"])


def test_wrong_declarations_are_refused():
    with pytest.raises(mlo.ProblemError, match="solve_batches=3 counts batches of solve_data"):
        make(CG, size=64, solve_batches=3)
    with pytest.raises(mlo.ProblemError, match="solve_batches must be an integer of at least 1"):
        make(CG, size=64, solve_data=[A], solve_batches=0)


# ------------------------------ soba


def test_sobas_report_tells_which_solve_follows():
    """Soba's report tells a solve that follows from one that does not.

    On minibatches single residuals are noise; in the beginning q is not there yet.
    """
    optimizer = make({"name": "soba", "step_size": 0.3}, size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = list(optimizer.run(150))
    residuals = [record.solves["z"].residual for record in records]
    assert min(residuals[:3]) > 0.5 > max(residuals[-50:])
    assert {record.solves["z"].outcome for record in records} == {"truncated"}


def test_soba_says_where_it_stays_behind():
    optimizer = make({"name": "soba", "step_size": 1e-4}, size=64)
    with pytest.warns(mlo.SolveWarning, match=r"lags behind.*solve_data"):
        records = list(optimizer.run(110))
    assert records[-1].solves["z"].failed
