"""The figure of a table: the runs of its arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lfmcw_app.comparison import TEST_ERROR, Summary
from lfmcw_app.drawing import as_label, drawing

__all__ = ["draw_comparison"]


@drawing()
def draw_comparison(
    arms: Sequence[Summary], title: str, path: Path, measure: str = TEST_ERROR
) -> None:
    """Draws the runs of each arm, their mean and standard deviation."""
    figure = Figure(figsize=(1.6 + 1.25 * max(2, len(arms)), 4.2), layout="constrained")
    axes = figure.subplots()
    # Every run is a transparent dot, so that equal ones are darker.
    for position, arm in enumerate(arms):
        places, errors = [position] * len(arm.errors), list(arm.errors.values())
        axes.plot(places, errors, "o", color="#1f77b4", alpha=0.45)
        deviation = 0.0 if math.isnan(arm.deviation) else arm.deviation
        axes.errorbar(position, arm.mean, deviation, fmt="_", color="black", capsize=6, ms=18)
    axes.set_xticks(range(len(arms)), [_wrapped(as_label(arm.label)) for arm in arms])
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.set_ylabel(f"{measure}  (mean ± SD, runs)")
    axes.set_title(as_label(title, longest=90), fontsize=11, loc="left")
    figure.savefig(path, dpi=110, format="png")


def _wrapped(label: str, width: int = 14) -> str:
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
