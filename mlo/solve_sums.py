"""Total gradients of an upper problem, summed over several solves of the problems below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mlo.loss_results import is_number
from mlo.problem import Tensors
from mlo.total_gradient import TotalGradient

__all__ = ["SolveSums"]


@dataclass(kw_only=True)
class SolveSums:
    """What was summed of one update's solves so far (`accumulate_solves`).

    Attributes:
        count: number of solves in the sums.
        gradient: parameter → sum of its gradients.
        losses: player → sum of its losses.
        metrics: name → sum, of metrics that are numbers.
        returned: name → number of solves that returned it.
        used: the parameters on which some loss or solution depended.
    """

    count: int = 0
    gradient: Tensors = field(default_factory=dict)
    losses: Tensors = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    returned: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add(self, found: TotalGradient) -> None:
        """Adds the total gradient of one solve."""
        self.count += 1
        self.used |= found.gradient.keys() - found.unused
        numbers = {key: value for key, value in found.metrics.items() if is_number(value)}
        for total, terms in (
            (self.gradient, found.gradient),
            (self.losses, found.losses),
            (self.metrics, numbers),
        ):
            for key, term in terms.items():
                total[key] = total[key] + term if key in total else term
        for key in numbers:
            self.returned[key] = self.returned.get(key, 0) + 1

    def mean(self, last: TotalGradient) -> TotalGradient:
        """The mean over the solves, as a total gradient; everything else is that of the last.

        A metric's is over the solves that returned it.
        """
        means = {key: total / self.returned[key] for key, total in self.metrics.items()}
        return replace(
            last,
            gradient={key: total / self.count for key, total in self.gradient.items()},
            losses={key: total / self.count for key, total in self.losses.items()},
            metrics=last.metrics | means,
            unused=frozenset(self.gradient).difference(self.used),
        )

    def state_dict(self) -> dict[str, Any]:
        """The sums as tensors and plain values."""
        return {
            "count": self.count,
            "gradient": dict(self.gradient),
            "losses": dict(self.losses),
            "metrics": dict(self.metrics),
            "returned": dict(self.returned),
            "used": sorted(self.used),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> SolveSums:
        """The sums that `state_dict` returned, on a device."""

        def moved(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }

        count, metrics = int(state["count"]), moved(state["metrics"])
        return cls(
            count=count,
            gradient=moved(state["gradient"]),
            losses=moved(state["losses"]),
            metrics=metrics,
            # (Earlier states have no such entry.)
            returned=dict(state.get("returned") or dict.fromkeys(metrics, count)),
            used=set(state["used"]),
        )
