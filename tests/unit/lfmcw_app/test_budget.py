"""A budget: the penalty and its gradient, what is refused and warned of, and smaller networks."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.budget import (
    NOISE,
    BudgetPenalty,
    budget_result,
    check_budget,
    make_penalty,
    warn_of_excess,
)
from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.cost import Cost
from lfmcw_app.search_space.expected_cost import (
    CellCosts,
    cost_range,
    expected_cost,
    present_cost,
    strength_spread,
)
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture

NAMES = DARTS_PRIMITIVES


def smoke(**changes):
    return load_recipe("smoke", overrides={"dataset": "digits", **changes})


def limited(unit, limit, **changes):
    return smoke(**{f"search.budget.{unit}": limit}, **changes)


def penalty_of(arch, limit, weight=2.0):
    generator = torch.Generator().manual_seed(0)
    tables = [torch.rand(arch.normal.shape, generator=generator).double() for _ in range(2)]
    for table in tables:
        table[:, 0] = float("nan")
    costs = CellCosts(base=1.0, normal=tables[0], reduction=tables[1])
    return BudgetPenalty(limits={"parameters": limit}, weight=weight, costs={"parameters": costs})


def architecture(seed=0, **options):
    torch.manual_seed(seed)
    return Architecture(2, NAMES, scale=1.0, **options).double()


# ------------------------------ the penalty


@pytest.mark.parametrize("edge_weights", [False, True])
def test_above_the_limit_the_penalty_goes_down_the_expected_cost(edge_weights):
    arch = architecture(edge_weights=edge_weights)
    penalty = penalty_of(arch, 1.5)
    costs = penalty.costs["parameters"]
    noise = NOISE * strength_spread(arch(), costs)
    value, metrics = penalty(arch())
    expected = float(expected_cost(arch(), costs, noise).detach())
    assert float(value.detach()) == pytest.approx(2.0 * float(noise) * expected / 1.5)
    assert float(metrics["expected_parameters"]) == expected
    assert float(metrics["derived_parameters"]) == float(present_cost(arch(), costs).detach())

    # Finite differences with τ held, as it is in the gradient.
    leaves = list(arch.parameters())
    gradients = torch.autograd.grad(value, leaves)
    for parameter, gradient in zip(leaves, gradients, strict=True):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * gradient
                values.append(
                    2.0 * float(noise) * float(expected_cost(arch(), costs, noise).detach()) / 1.5
                )
                parameter -= step * gradient
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(
            float(gradient.square().sum()), rel=1e-6
        )


def test_below_the_limit_there_is_no_penalty():
    arch = architecture()
    value, _ = penalty_of(arch, 100.0)(arch())
    assert float(value.detach()) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in torch.autograd.grad(value, arch.parameters()))


@pytest.mark.parametrize("larger", ["expected", "derived"])
def test_either_cost_above_the_limit_is_enough(larger):
    """The expectation may be within a limit that its likeliest cells exceed, and the reverse."""
    for seed in range(50):
        arch = architecture(seed)
        _, metrics = penalty_of(arch, 1.0)(arch())
        expected = float(metrics["expected_parameters"])
        derived = float(metrics["derived_parameters"])
        if (expected > derived) == (larger == "expected"):
            value, _ = penalty_of(arch, (expected + derived) / 2)(arch())
            assert float(value.detach()) > 0.0
            return
    raise AssertionError("no seed has this case")


def test_equal_mixing_weights_have_a_finite_gradient():
    arch = Architecture(2, NAMES, scale=0.0)
    value, _ = penalty_of(arch, 1.0)(arch())
    gradients = torch.autograd.grad(value, arch.parameters())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(float(gradient.abs().max()) > 0.0 for gradient in gradients)


def test_both_units_may_be_limited_at_once():
    recipe = smoke(**{"search.budget.parameters": 0.005, "search.budget.multiply_adds": 0.15})
    penalty = make_penalty(recipe, load_dataset("digits"), NAMES)
    _, metrics = penalty(Architecture(2, NAMES)())
    assert set(metrics) == {
        "expected_parameters", "derived_parameters", "expected_multiply_adds",
        "derived_multiply_adds",
    }  # fmt: skip


def test_without_limits_there_is_no_penalty():
    assert make_penalty(smoke(), load_dataset("digits"), NAMES) is None


def test_measuring_costs_draws_no_random_numbers():
    before = torch.get_rng_state()
    make_penalty(limited("parameters", 0.005), load_dataset("digits"), NAMES)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------ what is said


def test_a_budget_that_no_network_meets_is_refused():
    with pytest.raises(InputError, match=r"no derived network meets.*have 0\.003698 to 0\.02655"):
        check_budget(limited("parameters", 0.003), load_dataset("digits"), NAMES)
    check_budget(limited("parameters", 0.0037), load_dataset("digits"), NAMES)


def test_a_budget_without_effect_is_warned_of():
    """Such as one in parameters instead of millions of them."""
    with pytest.warns(NumbersWarning, match=r"5000 million, which has no effect"):
        check_budget(limited("parameters", 5000), load_dataset("digits"), NAMES)


def test_cells_above_the_budget_are_warned_of_by_how_much():
    recipe, dataset = limited("parameters", 0.005), load_dataset("digits")
    with pytest.warns(NumbersWarning, match=r"0\.01\d+ million parameters, 1\d\d\.\d% more than"):
        warn_of_excess(recipe, random_genotype(2, 0), dataset)


def test_a_result_says_whether_each_limit_is_met():
    recipe = smoke(**{"search.budget.parameters": 0.1, "search.budget.multiply_adds": 0.2})
    cost = Cost(parameters=0.1, multiply_adds=0.25, elementwise=0.0)
    assert budget_result(recipe, cost) == {
        "parameters": {"limit": 0.1, "actual": 0.1, "met": True},
        "multiply_adds": {"limit": 0.2, "actual": 0.25, "met": False},
    }
    assert budget_result(smoke(), cost) == {}


# ------------------------------ searches


def searched(space, seed=0, limit=None):
    """Parameters (in millions) of the cells that a search of the smoke recipe ends at."""
    # The first orders of plain DARTS: what the penalty does is the same, in a tenth of the time.
    given = {"search.method": "darts", "search.order": "first", "seed": seed, "dataset": "digits"}
    given |= {"search.budget.parameters": limit}
    recipe = load_recipe("smoke", space=space, overrides=given)
    dataset = load_dataset("digits")
    train, validation = search_split(dataset, None, seed, (0.5, 0.5))
    torch.manual_seed(seed)
    modules = build_modules(recipe.search, dataset)
    optimizer = build_search(recipe, dataset, train, validation, modules)
    for _ in range(8):
        optimizer.step()
    costs = make_penalty(limited("parameters", 1.0), dataset, NAMES).costs["parameters"]
    return float(present_cost(modules.arch(), costs).detach())


@pytest.mark.parametrize("space", ["darts", "pcdarts"])
def test_a_tight_budget_makes_a_smaller_network(space):
    low, _ = cost_range(
        make_penalty(limited("parameters", 1.0), load_dataset("digits"), NAMES).costs["parameters"]
    )
    free, tight = searched(space), searched(space, limit=0.006)
    assert low - 1e-6 < tight <= 0.006 < free
