"""What cannot work is said before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from mlo.checks import check_engines
from mlo.distributed import DataParallel
from mlo.testing import bilevel_quadratic, trilevel_quadratic


def test_finite_differences_are_not_differentiated_again():
    """The engine is refused where its response would be differentiated twice."""
    with pytest.raises(mlo.EngineError, match=r"'w'.*differentiated twice.*'one_step'"):
        trilevel_quadratic().optimizer({"default": "one_step", "w": "darts"})
    with pytest.raises(mlo.EngineError, match=r"'m' contains the response of 'w'"):
        trilevel_quadratic().optimizer({"default": "one_step", "m": "darts"})


def test_a_compiled_problem_has_no_double_backward():
    """A compiled problem is refused where its engine needs double backward."""
    problem = bilevel_quadratic()
    lower = problem.problems[0]
    compiled = mlo.Problem(
        "w", module=lower.module, optimizer=lower.optimizers["w"], loss=lower.loss, compile=True
    )
    with pytest.raises(mlo.EngineError, match=r"compiled.*'darts'"):
        mlo.MultilevelOptimizer([compiled, problem.problems[1]], hypergradient="one_step")


def test_a_solver_on_finite_differences_warns():
    with pytest.warns(
        mlo.SolveWarning, match="'cg × finite_difference' solves with finite differences"
    ):
        bilevel_quadratic().optimizer(mlo.ConjugateGradient(products="finite_difference"))


def test_adamw_with_an_implicit_engine_warns():
    module, upper = nn.Linear(1, 1), nn.Linear(1, 1)
    problems = [
        mlo.Problem(
            "w",
            module=module,
            optimizer=torch.optim.AdamW(module.parameters(), weight_decay=0.1),
            loss=lambda w, _, *, x: (w.weight * x.weight).sum(),
        ),
        mlo.Problem(
            "x",
            module=upper,
            optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
            loss=lambda x, _, *, w: w.weight.sum(),
        ),
    ]
    with pytest.warns(mlo.SolveWarning, match="decoupled weight decay"):
        mlo.MultilevelOptimizer(problems, "direct")


def test_a_gradient_that_is_averaged_over_processes_is_refused():
    optimizer = bilevel_quadratic().optimizer({"name": "one_step", "keep_graph": True})
    check_engines(optimizer.graph, optimizer.engines)
    with pytest.raises(mlo.EngineError, match="averaged over processes"):
        check_engines(optimizer.graph, optimizer.engines, parallel=DataParallel())
