"""Averages of a problem's iterates: less noise than in the last one, without further gradients.

With a constant step size the iterates of a stochastic method wander around the solution, and their
mean is much nearer to it than any of them. An average changes nothing in the run.

Reference: Polyak and Juditsky, Acceleration of stochastic approximation by averaging (1992).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.errors import ConfigurationError, ProblemError, nearest
from mlo.tensors import are_plain, copies

__all__ = ["Average", "Averages", "Ema", "TailAverage", "average_from"]


Many = list[Tensor]
"""One tensor for each parameter, on which foreach operators work."""


@dataclass(frozen=True, kw_only=True)
class Average(ABC):
    """A rule of averaging, without state."""

    name: ClassVar[str]

    @abstractmethod
    def moved(self, kept: Mapping[str, Many], values: Many, count: int) -> dict[str, Many]:
        """Adds one more iterate.

        Args:
            kept: what the last call returned; empty at the first.
            values: the new iterate, one tensor for each parameter, which is not changed later.
            count: the number of iterates, this one included.

        Returns:
            what is kept, one tensor for each parameter; under "mean" the average.
        """


@dataclass(frozen=True, kw_only=True)
class Ema(Average):
    """The exponential mean: each iterate has `decay` times the weight of the next one.

    Weights sum to one from the first iterate on.

    Attributes:
        decay: between 0 and 1; about 1 / (1 − decay) iterates count.
    """

    decay: float = 0.999

    name: ClassVar[str] = "ema"

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ConfigurationError(
                f"The average 'ema' needs a decay of at least 0 and below 1, got {self.decay!r}."
            )

    def moved(self, kept: Mapping[str, Many], values: Many, count: int) -> dict[str, Many]:
        """The mean, moved by the weight of the newest iterate."""
        if count == 1:
            return {"mean": values}
        # Σ_k d^k over the iterates so far is (1 − dᵗ) / (1 − d), and the newest has weight 1.
        weight = (1.0 - self.decay) / (1.0 - self.decay**count)
        steps = list(torch._foreach_sub(values, kept["mean"]))
        torch._foreach_mul_(steps, weight)
        torch._foreach_add_(steps, kept["mean"])
        return {"mean": steps}


@dataclass(frozen=True, kw_only=True)
class TailAverage(Average):
    """The plain mean of the last iterates.

    Attributes:
        begin: number of updates after which it begins; until then it is the iterate itself. None:
            whenever it is read, it covers between the last half and the last three quarters of all
            updates.
    """

    begin: int | None = None

    name: ClassVar[str] = "tail"

    def __post_init__(self) -> None:
        if self.begin is not None and self.begin < 0:
            raise ConfigurationError(
                f"The average 'tail' must begin after 0 or more updates, got begin={self.begin!r}."
            )

    def moved(self, kept: Mapping[str, Many], values: Many, count: int) -> dict[str, Many]:
        """The mean since `begin`, or since the power of two before the last one."""
        if self.begin is not None:
            return {"mean": _mean(kept.get("mean"), values, max(1, count - self.begin))}
        # A new mean begins at each power of two; what is read is the one that began before it.
        latest = 1 << (count.bit_length() - 1)
        if count == 1:
            return {"mean": values, "next": values}
        if count == latest:
            mean = _mean(kept["next"], values, count - latest // 2 + 1)
            return {"mean": mean, "next": values}
        return {
            "mean": _mean(kept["mean"], values, count - latest // 2 + 1),
            "next": _mean(kept["next"], values, count - latest + 1),
        }


def _mean(mean: Many | None, values: Many, number: int) -> Many:
    """The mean of `number` values, given that of all but the last."""
    if mean is None or number == 1:
        return values
    # mean + (value − mean) / number
    steps = list(torch._foreach_sub(values, mean))
    torch._foreach_div_(steps, number)
    torch._foreach_add_(steps, mean)
    return steps


class Averages:
    """An average at work on one problem's parameters.

    Args:
        average: the rule.

    Attributes:
        count: the number of iterates so far.
        kept: parameter → what the rule keeps of it.
    """

    def __init__(self, average: Average) -> None:
        self.average = average
        self.count = 0
        self.kept: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def take(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes the parameters in, after an update."""
        self.count += 1
        values: dict[str, Tensor] = {}
        for key, copy in zip(parameters, copies(parameters.values()), strict=True):
            # In single precision at least, so that small weights count.
            values[key] = copy.to(torch.promote_types(copy.dtype, torch.float32))
        # One list cannot hold both sharded and plain tensors.
        together = [list(values)] if are_plain(values.values()) else [[key] for key in values]
        for keys in together:
            names = self.kept.get(keys[0], {})
            kept = {name: [self.kept[key][name] for key in keys] for name in names}
            moved = self.average.moved(kept, [values[key] for key in keys], self.count)
            for place, key in enumerate(keys):
                self.kept[key] = {name: tensors[place] for name, tensors in moved.items()}

    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter → its average, as a copy; the parameter itself before the first update."""
        return {
            key: self.kept[key]["mean"].to(parameter.dtype, copy=True)
            if key in self.kept
            else parameter.detach().clone()
            for key, parameter in parameters.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The state, as copies."""
        kept = {key: _copies(tensors) for key, tensors in self.kept.items()}
        return {"count": self.count, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes back to a state."""
        self.count = int(state["count"])
        self.kept = {key: _copies(tensors, device) for key, tensors in state["kept"].items()}


def _copies(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    return {key: t.to(device or t.device, copy=True) for key, t in tensors.items()}


_AVERAGES: dict[str, type[Average]] = {"ema": Ema, "tail": TailAverage}


def average_from(problem: str, choice: Average | str | None) -> Average | None:
    """Makes an average from its name; an average stays.

    Raises:
        ProblemError: for anything else.
    """
    if choice is None or isinstance(choice, Average):
        return choice
    if choice in _AVERAGES:
        return _AVERAGES[choice]()
    raise ProblemError(
        f"Problem {problem!r}: average must be an mlo.Ema, mlo.TailAverage or one of their names, "
        f"got {choice!r}. {nearest(str(choice), _AVERAGES)}"
    )
