"""A budget of the derived network: a penalty on its expected cost, and whether it was met.

The architecture descends Eq. 4 + μ Σ [E > limit or cost > limit] τ E / limit. The sum goes over the
limits (parameters, multiply-adds). `cost` is that of the cells which would be derived now, and E is
the expected cost when noise of scale τ is added before the derivation
(`search_space/expected_cost.py`), where τ is half the spread of the log mixing weights, treated as
constant. So E follows the derived cells closely throughout a search. The architecture moves towards
smaller cells only while the derived cells, or their neighbours, are too large. With τ = 1 E would
stay near the mean of all cells until the mixing weights are far apart, and its penalty would keep
pushing long after the derived cells meet the limit. The factor τ gives the penalty's gradient the
same size whatever the spread.

Reference: Polyak, A general method for solving extremal problems (1967): a constraint acts while it
is violated.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfmcw_app.data import Dataset
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.network_file import NetworkPlan
from lfmcw_app.recipe import Recipe
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cost import Cost, network_cost
from lfmcw_app.search_space.expected_cost import (
    UNITS,
    CellCosts,
    cell_costs,
    cost_range,
    expected_cost,
    present_cost,
    strength_spread,
)
from lfmcw_app.search_space.genotype import Cells, Genotype, random_genotype
from lfmcw_app.search_space.network import DerivedNetwork, ImageNetwork
from lfmcw_app.search_space.supernet import MixingWeights
from lfmcw_app.spaces import space_named

__all__ = ["BudgetPenalty", "budget_result", "check_budget", "make_penalty", "warn_of_excess"]

NOISE = 0.5
"""τ as a part of the spread. At 0.25 a search of 15 rounds did not meet its limits, at 1 the cells
of longer ones came out at half of them (digits, 24 searches each)."""

LEAST_NOISE = 1e-6
"""τ where all mixing weights are equal."""

Costs = Mapping[str, CellCosts]


@dataclass(frozen=True, kw_only=True, eq=False)
class BudgetPenalty:
    """The penalty that is added to the architecture's loss.

    Attributes:
        limits: unit → limit in millions.
        weight: μ.
        costs: unit → costs of the candidates.
    """

    limits: Mapping[str, float]
    weight: float
    costs: Costs

    def __call__(self, mixing: MixingWeights) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the penalty, a scalar, and as metrics the costs in millions.

        Args:
            mixing: the mixing weights, [edges, primitives] of each kind of cell.
        """
        total = mixing.normal.new_zeros(())
        metrics: dict[str, Tensor] = {}
        for unit, limit in self.limits.items():
            costs = self.costs[unit]
            noise = (NOISE * strength_spread(mixing, costs)).clamp(min=LEAST_NOISE)
            expected, present = expected_cost(mixing, costs, noise), present_cost(mixing, costs)
            exceeded = (expected > limit) | (present > limit)
            total = total + torch.where(exceeded, noise * expected / limit, 0.0)
            metrics |= {f"expected_{unit}": expected.detach(), f"derived_{unit}": present.detach()}
        return self.weight * total, metrics


def make_penalty(
    recipe: Recipe,
    dataset: Dataset,
    candidates: Candidates | Sequence[str],
    device: torch.device | str = "cpu",
) -> BudgetPenalty | None:
    """The penalty of a recipe's budget; None if there is no limit.

    Args:
        recipe: gives the budget and the derived network.
        dataset: gives image size, channels and classes.
        candidates: names of the columns of α, of all edges or of each.
        device: of the mixing weights.
    """
    limits = _limits(recipe)
    if not limits:
        return None
    costs = _costs(recipe, dataset, candidates)
    return BudgetPenalty(
        limits=limits,
        weight=recipe.search.budget.weight,
        costs={unit: costs[unit].to(device) for unit in limits},
    )


def check_budget(recipe: Recipe, dataset: Dataset, candidates: Candidates | Sequence[str]) -> None:
    """Refuses a budget below the smallest network that can be derived.

    A budget above the largest one has no effect, and a warning says so.

    Raises:
        InputError: with the range of what networks cost.
    """
    limits = _limits(recipe)
    space = space_named(recipe.search.space)
    if limits and not issubclass(space.genotype, Genotype):
        raise InputError(
            f"search.budget supports only networks of DARTS's cells, and the space {space.title} "
            "has other cells. Drop it."
        )
    costs = _costs(recipe, dataset, candidates) if limits else {}
    for unit, limit in limits.items():
        low, high = cost_range(costs[unit])
        between = f"The networks of this recipe have {low:.4g} to {high:.4g} {_named(unit)}."
        if limit < low:
            raise InputError(
                f"search.budget.{unit} is {limit:g} million, which no derived network meets. "
                f"{between} Raise it, or lower evaluation.channels or evaluation.layers."
            )
        if limit >= high:
            warnings.warn(
                f"search.budget.{unit} is {limit:g} million, which has no effect. {between}",
                NumbersWarning,
                stacklevel=2,
            )


def warn_of_excess(recipe: Recipe, genotype: Cells, dataset: Dataset) -> None:
    """Warns of each limit that the network of derived cells exceeds, and by how much."""
    limits = _limits(recipe)
    if not limits:
        return
    network = _network(recipe, dataset, genotype)
    cost = network_cost(network, dataset.image_size, dataset.channels)
    for unit, found in budget_result(recipe, cost).items():
        if not found["met"]:
            over = 100.0 * (found["actual"] / found["limit"] - 1.0)
            warnings.warn(
                f"The derived network has {found['actual']:.4g} {_named(unit)}, {over:.1f}% more "
                f"than search.budget.{unit} ({found['limit']:g}) allows. It is trained as it is. "
                "For a smaller network, search longer or raise search.budget.weight.",
                NumbersWarning,
                stacklevel=2,
            )


def budget_result(recipe: Recipe, cost: Cost) -> dict[str, dict[str, Any]]:
    """Unit → limit, what the derived network has (both in millions), and whether that is met.

    Empty if there is no limit.
    """
    found = {}
    for unit, limit in _limits(recipe).items():
        actual = getattr(cost, unit)
        found[unit] = {"limit": limit, "actual": actual, "met": actual <= limit}
    return found


def _limits(recipe: Recipe) -> dict[str, float]:
    """Unit → limit in millions, of the units that are limited."""
    given = {unit: getattr(recipe.search.budget, unit) for unit in UNITS}
    return {unit: limit for unit, limit in given.items() if limit is not None}


def _named(unit: str) -> str:
    return f"million {unit.replace('_', '-')}"


def _costs(recipe: Recipe, dataset: Dataset, candidates: Candidates | Sequence[str]) -> Costs:
    network = _network(recipe, dataset, random_genotype(recipe.search.nodes, 0))
    assert isinstance(network, DerivedNetwork)
    return cell_costs(network, dataset.image_size, dataset.channels, candidates)


def _network(recipe: Recipe, dataset: Dataset, genotype: Cells) -> ImageNetwork:
    """The derived network of a recipe on the meta device, without memory and without numbers."""
    with torch.device("meta"):
        return NetworkPlan.of(recipe, genotype, dataset).build()
