"""Betty side by side: its functions as engines, `mlo` graphs on its `Engine`, and what it cannot
do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from started_processes import finished
from torch import nn
from torch.optim import SGD

import mlo
import mlo.betty
from mlo.betty.engines import betty_version
from mlo.testing import (
    Vector,
    bilevel_quadratic,
    bilinear_game,
    diamond,
    layered,
    relative_error,
    trilevel_quadratic,
)

pytest.importorskip("betty", reason="betty-ml is not installed (make betty)")

NEUMANN = {"name": "betty-neumann", "iterations": 5, "alpha": 0.3}
OLD = betty_version().startswith("0.1.")


def parameters(closed):
    return {
        f"{problem.name}.{key}": p.detach()
        for problem in closed.problems
        for key, p in problem.parameters.items()
    }


def test_its_cg_does_not_converge_where_ours_does():
    closed = bilevel_quadratic()
    errors = [
        relative_error(closed.optimizer(engine).gradient("x")["v"], closed.exact)
        for engine in ({"name": "betty-cg", "iterations": 10}, "cg")
    ]
    assert errors[0] > 0.1
    assert errors[1] < 1e-6


def test_it_leaves_weight_decay_out_of_the_hessian():
    closed = bilevel_quadratic(weight_decay=0.3)
    found = closed.optimizer({"name": "betty-neumann", "iterations": 400}).gradient("x")["v"]
    assert relative_error(found, closed.exact) > 0.1
    assert (
        relative_error(
            closed.optimizer(mlo.Neumann(num_terms=401)).gradient("x")["v"], closed.exact
        )
        < 1e-8
    )


# ------------------------------ graphs on its engine


@pytest.mark.parametrize(
    "make",
    [bilevel_quadratic, diamond, lambda: layered(layers=3)],
    ids=["bilevel", "diamond", "dag"],
)
@pytest.mark.parametrize(
    "engine", ["betty-darts", NEUMANN, "betty-cg"], ids=["darts", "neumann", "cg"]
)
def test_one_declaration_moves_alike_on_both(make, engine, capsys):
    """One solve per problem here and one per path there add up to the same gradients, since each is
    linear in the cotangent.
    """
    ours, theirs = make(), make()
    if engine == "betty-cg" and len(ours.problems) > 4:
        pytest.skip("cg is not linear in the cotangent, so that paths do not add up to their sum")
    records = list(ours.optimizer(engine).run(3))
    their_records = mlo.betty.run(theirs.problems, steps=3, hypergradient=engine)
    assert f"Betty {betty_version()}" in capsys.readouterr().out
    error = relative_error(parameters(ours), parameters(theirs))
    if OLD and engine == "betty-darts":  # which leaves the lower parameters displaced
        assert 1e-6 < error < 0.1
        return
    assert error < 1e-9
    for one, other in zip(records, their_records, strict=True):
        assert one.round == other.round
        assert other.losses == pytest.approx(one.losses, rel=1e-9)
        assert other.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-9)


def network(**options):
    torch.manual_seed(0)
    net, scale = nn.Linear(3, 1).double(), Vector(torch.zeros(3).double())
    net.register_parameter("frozen", nn.Parameter(torch.ones(1).double(), requires_grad=False))
    data = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    return [
        mlo.Problem(
            "module",  # also an attribute of Betty's problems
            module=net,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
            loss=lambda net, x, *, scale: ((net(x * scale.v.exp()) - 1.0) ** 2).mean(),
            data=data,
            grad_clip=0.5,
            **options,
        ),
        mlo.Problem(
            "scale",
            module=scale,
            optimizer=SGD(scale.parameters(), lr=0.1),
            loss=lambda scale, x, *, module: (
                ((module(x) - x.sum(1, keepdim=True)) ** 2).mean(),
                {"seen": 1.0},
            ),
            data=data,
        ),
    ]


@pytest.mark.filterwarnings("ignore:.*decoupled weight decay")
def test_what_a_declaration_says_runs_as_here():
    """Batches, steps, schedulers, clipping, AdamW and frozen parameters run on Betty as here."""
    ours, theirs = network(steps=2), network(steps=2)
    list(mlo.MultilevelOptimizer(ours, NEUMANN).run(4))
    mlo.betty.run(theirs, steps=4, hypergradient=NEUMANN)
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(dict(one.parameters), dict(other.parameters)) < 1e-9
        assert [g["lr"] for o in one.optimizers.values() for g in o.param_groups] == [
            g["lr"] for o in other.optimizers.values() for g in o.param_groups
        ]


# ------------------------------ what it cannot do is said


def several_optimizers():
    first, second = network()
    net, parts = first.module, [SGD([p], lr=0.1) for p in first.parameters.values()]
    lower = mlo.Problem("module", module=net, optimizer=parts, loss=first.loss, data=first.data)
    return [lower, second]


@pytest.mark.parametrize(
    ("problems", "engine", "message"),
    [
        (
            lambda: bilinear_game().problems,
            "betty-darts",
            "cannot run problem 'game': it is a game",
        ),
        (lambda: diamond().problems, "one_step", "its engine is 'one_step'; choose betty-darts"),
        (
            lambda: trilevel_quadratic().problems,
            "betty-cg",
            "cannot run problem 'm': 'betty-cg' refuses",
        ),
        (several_optimizers, "betty-darts", "'module': it has 2 optimizers"),
        (lambda: network(accumulate=2), "betty-darts", "accumulate=2"),
        (lambda: network(warmup_steps=1), "betty-darts", "warmup_steps=1"),
        (lambda: network(precision="bf16"), "betty-darts", "precision='bf16'"),
    ],
    ids=["game", "engine", "trilevel", "optimizers", "accumulate", "warmup", "bf16"],
)
def test_what_it_cannot_run_is_refused_before_a_step(problems, engine, message):
    made = problems()
    before = [p.detach().clone() for problem in made for p in problem.parameters.values()]
    with pytest.raises(mlo.EngineError, match=message.replace("(", "\\(")):
        mlo.betty.run(made, steps=1, hypergradient=engine)
    after = [p for problem in made for p in problem.parameters.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_it_leaves_out_is_printed(capsys):
    mlo.betty.run(trilevel_quadratic().problems, steps=1)
    assert (
        "leaves out of the gradient of 'x' that the solution of 'w' depends on the one of 'm'"
        in capsys.readouterr().out
    )


def test_an_unused_parameter_is_its_error_and_named():
    def problems():
        w, x = Vector(torch.ones(2)), nn.Linear(2, 2)
        return [
            mlo.Problem(
                "w",
                module=w,
                optimizer=SGD(w.parameters(), lr=0.1),
                loss=lambda w, _, *, x: w.v @ x.weight @ w.v,
            ),
            mlo.Problem(
                "x",
                module=x,
                optimizer=SGD(x.parameters(), lr=0.1),
                loss=lambda x, _, *, w: w.v.sum(),
            ),
        ]

    with pytest.raises(mlo.EngineError, match="behind 'betty-cg' failed"):
        mlo.MultilevelOptimizer(problems(), "betty-cg").gradient("x")
    if OLD:
        with pytest.raises(mlo.EngineError, match=r"Betty 0\.1\.1 failed: RuntimeError"):
            mlo.betty.run(problems(), steps=1, hypergradient="betty-cg")


def test_a_missing_betty_is_named_with_what_installs_it(monkeypatch):
    """The error names the command that installs Betty."""
    from importlib.metadata import PackageNotFoundError

    import mlo.betty.engines as engines

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(engines, "version", missing)
    with pytest.raises(
        mlo.EngineError, match=r"--ignore-requires-python --no-deps betty-ml==0\.2\.1"
    ):
        mlo.engine_from("betty-darts")


@pytest.mark.skipif(OLD, reason="runs 0.1.1 already")
def test_all_of_this_holds_for_the_release_that_pip_picks():
    other = Path(sys.prefix) / "betty-0.1.1"
    if not other.exists():
        pytest.skip("betty-ml 0.1.1 is not beside the environment (make betty)")
    result = finished(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "PYTHONPATH": str(other), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
