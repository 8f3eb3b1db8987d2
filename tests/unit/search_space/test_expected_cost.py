"""The expected cost of cells: the costs are those of networks, the expectation a sum over draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_networks import network
from small_supernets import alternating

from lfmcw_app.search_space.candidates import as_candidates
from lfmcw_app.search_space.cost import network_cost
from lfmcw_app.search_space.expected_cost import (
    UNITS,
    CellCosts,
    cell_costs,
    cost_range,
    expected_cost,
    present_cost,
    strength_spread,
)
from lfmcw_app.search_space.genotype import derive_genotype, random_genotype
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture, MixingWeights

NAMES = DARTS_PRIMITIVES


def on_meta(genotype, stem="cifar"):
    with torch.device("meta"):
        return network(stem, genotype=genotype, layers=6)


def measured(candidates=NAMES, nodes=2, stem="cifar", size=16):
    return cell_costs(on_meta(random_genotype(nodes, 0), stem), size, 3, candidates)


def made_up(candidates, nodes, seed=0):
    """Costs drawn at random, so that no two cells cost the same."""
    generator = torch.Generator().manual_seed(seed)

    def table(names):
        costs = torch.rand(len(names), len(names[0]), generator=generator, dtype=torch.float64)
        for row, edge in enumerate(names):
            for column, name in enumerate(edge):
                costs[row, column] = math.nan if name == "none" else costs[row, column]
        return costs

    names = as_candidates(candidates, nodes)
    return CellCosts(base=0.7, normal=table(names.normal), reduction=table(names.reduction))


def mixing_of(candidates, nodes, seed=0, scale=1.0, *, edge_weights=False):
    torch.manual_seed(seed)
    arch = Architecture(nodes, candidates, scale=scale, edge_weights=edge_weights)
    return MixingWeights(*(weights.detach() for weights in arch.double()()))


# ------------------------------ what an operation costs


@pytest.mark.parametrize(("stem", "size"), [("cifar", 16), ("imagenet", 64)])
def test_costs_add_up_to_those_of_the_derived_network(stem, size):
    costs = measured(nodes=3, stem=stem, size=size)
    for seed in range(4):
        mixing = mixing_of(NAMES, 3, seed)
        counted = network_cost(on_meta(derive_genotype(mixing), stem), size)
        for unit in UNITS:
            assert float(present_cost(mixing, costs[unit])) == pytest.approx(
                getattr(counted, unit), rel=1e-12
            )


def test_costs_follow_the_candidates_of_each_edge():
    candidates = alternating(NAMES, 2, 3)
    costs = measured(candidates)
    mixing = mixing_of(candidates, 2)
    counted = network_cost(on_meta(derive_genotype(mixing, candidates)), 16)
    assert float(present_cost(mixing, costs["parameters"])) == pytest.approx(counted.parameters)


def test_the_range_is_that_of_all_networks():
    costs = made_up(NAMES, 3)
    low, high = cost_range(costs)

    # Cells whose strongest entries are the cheapest, or the dearest, ones of all.
    for sign, end in ((-1.0, low), (1.0, high)):
        tables = ((sign * table).exp().nan_to_num() for table in (costs.normal, costs.reduction))
        assert float(present_cost(MixingWeights(*tables), costs)) == pytest.approx(end)
    for seed in range(20):
        assert low < float(present_cost(mixing_of(NAMES, 3, seed), costs)) < high


# ------------------------------ the expectation


def enumerated(mixing, costs, temperature):
    """E[cost] by listing, for each node, all pairs of entries that can be drawn."""
    total = costs.base
    for weights, table in zip(mixing, (costs.normal, costs.reduction), strict=True):
        start = 0
        for node in range(10):
            rows = range(start, start + 2 + node)
            start += 2 + node
            if rows.stop > len(weights):
                break
            entries = [
                (edge, float(weights[edge, o]) ** (1 / temperature), float(table[edge, o]))
                for edge, o in itertools.product(rows, range(weights.shape[1]))
                if not math.isnan(table[edge, o])
            ]
            everything = sum(weight for _, weight, _ in entries)
            for first in entries:
                others = [entry for entry in entries if entry[0] != first[0]]
                rest = sum(weight for _, weight, _ in others)
                for second in others:
                    chance = first[1] / everything * second[1] / rest
                    total += chance * (first[2] + second[2])
    return total


@pytest.mark.parametrize("edge_weights", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_expectation_is_the_sum_over_all_draws(temperature, edge_weights):
    names = ("skip_connect", "none", "sep_conv_3x3", "max_pool_3x3")
    costs, mixing = made_up(names, 3), mixing_of(names, 3, edge_weights=edge_weights)
    expected = enumerated(mixing, costs, temperature)
    assert float(expected_cost(mixing, costs, temperature)) == pytest.approx(expected, rel=1e-12)


def test_the_expectation_follows_the_candidates_of_each_edge():
    candidates = alternating(NAMES, 3, 3)
    costs, mixing = made_up(candidates, 3), mixing_of(candidates, 3)
    assert float(expected_cost(mixing, costs)) == pytest.approx(enumerated(mixing, costs, 1.0))


def test_the_expectation_is_the_mean_under_gumbel_noise():
    """Adding Gumbel noise of scale τ before the derivation is what the expectation is over."""
    names = ("none", "skip_connect", "sep_conv_3x3")
    costs, mixing = made_up(names, 2), mixing_of(names, 2)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        noise = [
            -torch.rand(w.shape, generator=generator, dtype=torch.float64).log().neg().log()
            for w in mixing
        ]
        drawn = (w.log() + 0.5 * n for w, n in zip(mixing, noise, strict=True))
        found.append(float(present_cost(MixingWeights(*(d.exp() for d in drawn)), costs)))
    values = torch.tensor(found)
    error = float(values.std()) / math.sqrt(len(found))
    assert abs(float(values.mean()) - float(expected_cost(mixing, costs, 0.5))) < 4 * error


@pytest.mark.parametrize("edge_weights", [False, True])
def test_its_gradient_is_that_of_finite_differences(edge_weights):
    names = ("none", "skip_connect", "sep_conv_3x3")
    costs = made_up(names, 3)
    torch.manual_seed(0)
    arch = Architecture(3, names, scale=1.0, edge_weights=edge_weights).double()
    leaves = list(arch.parameters())
    gradients = torch.autograd.grad(expected_cost(arch(), costs, 0.7), leaves)
    for parameter, gradient in zip(leaves, gradients, strict=True):
        for index in range(parameter.numel()):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[index] += step
                    values.append(float(expected_cost(arch(), costs, 0.7)))
                    parameter.view(-1)[index] -= step
            assert float(gradient.view(-1)[index]) == pytest.approx(
                (values[0] - values[1]) / 2e-5, abs=1e-8
            )


@pytest.mark.parametrize("alpha", [0.0, 60.0, 1e4])
def test_it_is_finite_for_any_mixing_weights(alpha):
    """Also where a softmax leaves exactly nothing, or all to `none`."""
    arch = Architecture(2, NAMES, scale=0.0)
    with torch.no_grad():
        arch.normal[:, 0] = alpha
        arch.reduction[0, 3] = arch.reduction[2, 4] = alpha
    costs = made_up(NAMES, 2)
    spread = strength_spread(arch(), costs)
    for temperature in (1.0, 1e-6, spread.clamp(min=1e-6)):
        cost = expected_cost(arch(), costs, temperature)
        gradients = torch.autograd.grad(cost, [arch.normal, arch.reduction])
        low, high = cost_range(costs)
        assert low - 1e-6 <= float(cost.detach()) <= high + 1e-6
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_low_temperature_gives_the_cost_of_the_derived_cells():
    costs = made_up(NAMES, 3)
    for seed in range(5):
        mixing = mixing_of(NAMES, 3, seed)
        assert float(expected_cost(mixing, costs, 1e-4)) == pytest.approx(
            float(present_cost(mixing, costs))
        )


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_it_agrees_with_the_derived_cost_however_far_alpha_is(scale):
    """At a temperature in proportion to the spread the correlation does not depend on α's size."""
    costs = measured(nodes=3)["parameters"]
    pairs = []
    for seed in range(120):
        mixing = mixing_of(NAMES, 3, seed, scale)
        noise = 0.5 * strength_spread(mixing, costs)
        pairs.append((expected_cost(mixing, costs, noise), present_cost(mixing, costs)))
    both = torch.tensor(pairs).T
    assert float(torch.corrcoef(both)[0, 1]) > 0.8
    assert float(both[0].mean()) == pytest.approx(float(both[1].mean()), rel=0.03)


def test_the_spread_is_that_of_the_entries_of_a_node():
    names = ("none", "skip_connect", "sep_conv_3x3")
    rows = torch.tensor([[0.9, 0.01, 0.1]] * 2, dtype=torch.float64)
    mixing = MixingWeights(normal=rows, reduction=rows)
    assert float(strength_spread(mixing, made_up(names, 1))) == pytest.approx(math.log(10.0) / 2)
