"""What cannot work is said before the first step."""

from __future__ import annotations

import pytest
import torch
from small_blocks import Blocks
from small_graphs import three_vectors
from torch import nn

import mlo
from mlo.distributed import DataParallel
from mlo.engine_checks import check_engines
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


def test_a_torch_optimizer_may_lack_a_differentiable_step():
    """The advice names optimizers that have one: Adafactor is torch.optim's too."""
    net, up = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.Adafactor(net.parameters()),
            loss=lambda net, b, *, up: (net.weight * up.weight).sum(),
        ),
        mlo.Problem(
            "up",
            module=up,
            optimizer=torch.optim.SGD(up.parameters(), lr=0.1),
            loss=lambda up, b, *, net: net.weight.sum(),
        ),
    ]
    with pytest.raises(mlo.EngineError, match=r"Adafactor has no .* such as torch\.optim\.SGD"):
        mlo.MultilevelOptimizer(problems, "one_step")


def test_a_solver_on_finite_differences_warns():
    with pytest.warns(
        mlo.SolveWarning, match="'cg × finite_difference' solves with finite differences"
    ):
        bilevel_quadratic().optimizer(mlo.ConjugateGradient(products="finite_difference"))


class OnSphere(torch.optim.Optimizer):
    """Steps along the sphere through its parameters, or anywhere."""

    def __init__(self, parameters, *, free):
        super().__init__(parameters, {"lr": 0.1})
        self.free = free

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            norm = p.norm()
            p -= 0.1 * (p.grad if self.free else p.grad - (p.grad * p).sum() * p / norm**2)
            if not self.free:
                p *= norm / p.norm()


@pytest.mark.parametrize("size", [1e-6, 1.0])
@pytest.mark.parametrize("free", [True, False])
def test_an_optimizer_on_a_surface_is_warned_of(free, size, recwarn):
    """The gradient at its solution is normal to the surface, and not zero."""
    problems = list(bilevel_quadratic().problems)
    lower = problems[0]
    with torch.no_grad():
        for p in lower.module.parameters():
            p.fill_(size)
    problems[0] = mlo.Problem(
        lower.name,
        module=lower.module,
        optimizer=OnSphere(lower.module.parameters(), free=free),
        loss=lower.loss,
    )
    mlo.MultilevelOptimizer(problems, "cg")
    said = [str(w.message) for w in recwarn if issubclass(w.category, mlo.SolveWarning)]
    assert len(said) == (0 if free else 1)
    assert free or "OnSphere moves a parameter on a surface" in said[0]


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


def estimated(engine, *, lower=None, upper=None, **options):
    """A bilevel problem whose problems have estimators."""
    return Blocks().optimizer(
        engine, [0], [0], order="lower_first", alpha=0.1, gamma=0.1, z=lower or {}, x=upper or {}
    )


@pytest.mark.parametrize("engine", ["one_step", "unroll", "darts"])
def test_a_step_made_with_an_estimate_is_not_differentiated(engine):
    with pytest.raises(mlo.EngineError, match="as if it were made with the gradient of one batch"):
        estimated(engine, lower={"estimator": "saga"})


@pytest.mark.parametrize("estimator", ["spider", "storm"])
def test_no_step_is_differentiated_at_an_earlier_point(estimator):
    with pytest.raises(mlo.EngineError, match="repeats its gradient at an earlier point"):
        estimated("one_step", upper={"estimator": estimator})
    estimated("one_step", upper={"estimator": "saga"}).step()


def test_an_estimator_serves_a_single_process():
    optimizer = estimated("soba", lower={"estimator": "saga"})
    with pytest.raises(mlo.ProblemError, match="supports a single process"):
        check_engines(optimizer.graph, optimizer.engines, parallel=DataParallel(sync="exact"))


def test_an_estimator_takes_responses_of_one_kind():
    """Terms for soba, the whole for others: a gradient through both has no estimate."""

    def problem(name, loss, **options):
        module = nn.ParameterDict({"p": torch.ones(2)})
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return mlo.Problem(name, module=module, optimizer=optimizer, loss=loss, **options)

    def lower(m, _, *, x):
        return ((m["p"] - x["p"]) ** 2).sum()

    problems = [
        problem("a", lower),
        problem("b", lower),
        problem("x", lambda m, _, *, a, b: (a["p"] * b["p"]).sum(), estimator="storm"),
    ]
    with pytest.raises(mlo.EngineError, match=r"'a' \(soba\), 'b' \(cg\)"):
        mlo.MultilevelOptimizer(problems, {"a": "soba", "b": "cg"})
    mlo.MultilevelOptimizer(problems, {"a": "soba", "b": "soba"}).step()


def test_an_estimator_serves_no_extra_moves_of_players():
    module = nn.ModuleDict({"one": nn.Linear(1, 1), "two": nn.Linear(1, 1)})
    game = mlo.Problem(
        "game",
        module=module,
        players={"first": "one", "second": "two"},
        player_steps={"first": 2},
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        loss=lambda m, _: {p: m[k].weight.sum() for p, k in (("first", "one"), ("second", "two"))},
        estimator="storm",
    )
    with pytest.raises(mlo.ProblemError, match="all move together"):
        mlo.MultilevelOptimizer([game])


def test_saga_compares_products_on_single_blocks():
    data = {"solve_data": [Blocks().G(0)], "solve_batches": 2}
    with pytest.raises(mlo.ProblemError, match="solve_batches=2 averages several"):
        estimated("soba", lower={"estimator": "saga", **data})
    estimated("soba", lower={"estimator": "storm", **data}).step()


@pytest.mark.parametrize(
    "engine",
    [
        mlo.Soba(step_size=0.1, fresh_batches=True),
        mlo.Neumann(step_size=0.1, fresh_batches=True),
    ],
    ids=lambda engine: engine.name,
)
def test_fresh_batches_need_data_for_solves(engine):
    with pytest.raises(mlo.EngineError, match="takes each product on a fresh batch"):
        estimated(engine)


# ------------------------------ simultaneous rounds


def test_no_step_of_a_simultaneous_round_is_differentiated():
    with pytest.raises(mlo.EngineError, match="that step comes too late"):
        Blocks().optimizer("one_step", [0], [0], alpha=0.1, gamma=0.1)


def test_each_problem_moves_once_in_a_simultaneous_round():
    with pytest.raises(mlo.GraphError, match="each problem moves once"):
        Blocks().optimizer("soba", [0], [0], alpha=0.1, gamma=0.1, z={"steps": 2})


def test_no_value_that_has_moved_is_read_simultaneously():
    def problem(name, loss):
        module = nn.ParameterDict({"p": torch.ones(1)})
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return mlo.Problem(name, module=module, optimizer=optimizer, loss=loss)

    problems = [
        problem("a", lambda m, _, *, c: ((m["p"] - c["p"]) ** 2).sum()),
        problem("b", lambda m, _, *, a, c: (m["p"] * a["p"] * c["p"]).sum()),
        problem("c", lambda m, _: (m["p"] ** 2).sum()),
    ]
    with pytest.raises(mlo.GraphError, match="sees the value of 'c', which moves before it"):
        mlo.MultilevelOptimizer(problems, "soba", order="simultaneous")
    mlo.MultilevelOptimizer(
        [problems[2], problems[0], problems[1]], "first_order", order="simultaneous"
    )


def test_one_window_for_problems_of_unequal_steps_warns():
    window = {"name": "unroll", "steps": 3}
    order = ["net", "aug", "reg"]
    with pytest.warns(mlo.SolveWarning, match="3 steps of every problem, but 'aug' makes 2"):
        three_vectors(order, engine=window, steps=(3, 2, 1))
    with pytest.warns(mlo.SolveWarning, match="'aug' makes 1"):
        three_vectors(order, engine={"default": window, "reg": "one_step"}, steps=(5, 1, 1))
    # Chosen for each, or more than a round makes of any: an online method, perhaps.
    three_vectors(order, engine={"net": window, "aug": window}, steps=(3, 2, 1))
    three_vectors(order, engine=window, steps=(2, 2, 1))
    # A chain that restarts ends at its start.
    restarting = {"aug": {"restart_from": "reg"}}
    three_vectors(order, engine=window, steps=(3, 2, 1), **restarting)
