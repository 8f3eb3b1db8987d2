"""Betty's `EarlyStopping`: whether a metric of the validation has stopped improving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlo.errors import ConfigurationError, check_choice

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Says when to stop, from what each validation returns.

    Args:
        metric: the entry that is watched.
        tolerance: validations without an improvement after which to stop.
        mode: whether the metric is to become small ("min") or large ("max").

    Attributes:
        best_score: the best value so far; None before the first.
        counter: validations since then.
    """

    def __init__(self, metric: str = "loss", tolerance: int = 5, mode: str = "min") -> None:
        check_choice("early_stopping_mode", mode, ("min", "max"))
        self.metric, self.tolerance, self.mode = metric, tolerance, mode
        self.best_score: float | None = None
        self.counter = 0

    def __call__(self, validation_stats: Mapping[str, Any]) -> bool:
        """Notes a validation; returns whether to stop.

        Raises:
            ConfigurationError: if the metric is missing.
        """
        if self.metric not in validation_stats:
            raise ConfigurationError(
                f"early_stopping_metric is {self.metric!r}, which validation() did not return: it "
                f"returned {sorted(validation_stats) or 'nothing'}. Return it, or name another."
            )
        score = float(validation_stats[self.metric])
        best = self.best_score
        # A NaN is no improvement: neither comparison holds for it.
        if best is None or (score < best if self.mode == "min" else score > best):
            self.best_score, self.counter = score, 0
        else:
            self.counter += 1
        return self.counter >= self.tolerance
