"""Which engine differentiates a problem's solution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
from small_betty_programs import Value
from torch.optim import SGD, Adam, RMSprop

import mlo
from mlo.betty import engines
from mlo.compat.betty import Config, HigherIterativeProblem, ImplicitProblem
from mlo.compat.betty.methods import engine_of


@pytest.fixture
def installed(monkeypatch):
    """As if Betty was installed: an engine that is only made does not call it."""
    monkeypatch.setattr(engines, "version", lambda package: "0.2.1")


def problem(kind=ImplicitProblem, optimizer=SGD, **config):
    made = kind("low", Config(**config), Value(1.0))
    made.optimizer = optimizer(made.module.parameters(), lr=0.1)
    return made


def upper(first_order=True):
    return ImplicitProblem("up", Config(first_order=first_order))


@pytest.mark.parametrize(
    ("config", "optimizer", "expected"),
    [
        ({}, SGD, mlo.Identity()),
        ({"type": "sama"}, SGD, mlo.Identity()),
        ({"type": "sama"}, Adam, mlo.OneStep()),
        ({"type": "sama"}, RMSprop, mlo.OneStep()),
        (
            {"type": "neumann", "neumann_iterations": 4, "neumann_alpha": 0.3},
            SGD,
            mlo.Neumann(num_terms=5, step_size=0.3, tol=1.0),
        ),
        (
            {"type": "cg", "cg_iterations": 3, "cg_alpha": 0.1},
            SGD,
            mlo.ConjugateGradient(max_steps=3),
        ),
        ({"type": {"name": "nystrom", "rank": 5}}, SGD, mlo.Nystrom(rank=5)),
        ({"type": mlo.darts()}, SGD, mlo.darts()),
    ],
    ids=["darts", "sama, SGD", "sama, Adam", "sama, RMSprop", "neumann", "cg", "named", "object"],
)
def test_a_type_is_its_inverse_with_exact_products(config, optimizer, expected):
    found = engine_of(problem(optimizer=optimizer, **config), "exact", [upper()])
    assert found == expected


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"darts_alpha": 0.2}, {"type": "darts", "darts_alpha": 0.2}),
        ({"type": "sama"}, {"type": "sama", "sama_adam_alpha": 1.0}),
        (
            {"type": "neumann", "neumann_iterations": 4, "neumann_alpha": 0.3},
            {"type": "neumann", "neumann_iterations": 4, "neumann_alpha": 0.3},
        ),
        (
            {"type": "cg", "cg_iterations": 3, "cg_alpha": 0.1},
            {"type": "cg", "cg_iterations": 3, "cg_alpha": 0.1},
        ),
    ],
)
def test_bettys_formulas_are_its_own_functions(config, expected):
    assert engine_of(problem(**config), "betty", [upper()]).config() == expected


def test_without_betty_its_formulas_are_refused(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(engines, "version", missing)
    with pytest.raises(mlo.EngineError, match=r"betty-ml, which is not installed\. Run: pip"):
        engine_of(problem(), "betty", [upper()])


def test_first_order_false_unrolls_iterative_problems_only():
    iterative = problem(HigherIterativeProblem, unroll_steps=7)
    assert engine_of(iterative, "exact", [upper(first_order=False)]) == mlo.Unroll(steps=7)
    assert engine_of(iterative, "exact", [upper()]) == mlo.Identity()
    assert engine_of(problem(), "exact", [upper(first_order=False)]) == mlo.FirstOrder()


def test_uppers_that_disagree_are_refused():
    with pytest.raises(
        mlo.ConfigurationError, match=r"'low' \(up, up\) have different first_order"
    ):
        engine_of(problem(), "exact", [upper(), upper(first_order=False)])


@pytest.mark.parametrize("kind", ["reinforce", "dart", "nystrom"])
def test_another_name_is_refused(kind):
    with pytest.raises(mlo.ConfigurationError, match=rf"type is '{kind}'.*as a mapping"):
        engine_of(problem(type=kind), "exact", [upper()])
