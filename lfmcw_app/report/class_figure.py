"""The mechanism as a picture file: class weights through a search, beside what W1 gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lfmcw_app.drawing import as_label, drawing
from lfmcw_app.errors import InputError

__all__ = ["draw_class_weights"]

PARTS = 10
"""A running mean is over a tenth of the rounds: a weight in a round is a loss on a few images."""

WARM = ("#d62728", "#e8702a", "#a8324b", "#c98f00")
COOL = ("#1f77b4", "#2ca02c", "#17a0b4")
GREY = "#9aa5b1"
GAP = 0.048
"""Least distance of names at the ends of lines, as a share of the axis."""

MOST_CLASSES = 25
"""More cannot be told apart."""


@drawing()
def draw_class_weights(
    weights: np.ndarray,
    confusion: Sequence[Sequence[int]],
    names: Sequence[str],
    path: Path,
    *,
    emphasised: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draws running means of class weights, and a confusion matrix in the order of the last ones.

    Args:
        weights: [classes, rounds].
        confusion: counts; rows: the right class, columns: the answer.
        names: of the classes.
        path: PNG file.
        emphasised: names of the classes that are drawn in colour: those that weigh more than the
            mean in the end in warm colours, the others in cool ones. By default the three heaviest
            and the two lightest.
        title: above the weights.

    Raises:
        InputError: for too many classes, or an emphasised one that there is not.
    """
    if len(names) > MOST_CLASSES:
        raise InputError(
            f"The picture has room for {MOST_CLASSES} classes, and there are {len(names)}. The "
            "report shows those that weigh most."
        )
    if unknown := sorted(set(emphasised) - set(names)):
        raise InputError(f"No class {unknown[0]!r}. There are: {', '.join(names)}.")
    window = max(1, weights.shape[1] // PARTS)
    smooth = np.lib.stride_tricks.sliding_window_view(weights, window, axis=1).mean(axis=2)
    order = np.argsort(-smooth[:, -1], kind="stable")
    chosen = [list(names).index(name) for name in emphasised]
    coloured = set(chosen or [*order[:3].tolist(), *order[-2:].tolist()])
    colours = _colours(smooth[:, -1], order, coloured)

    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    _draw_lines(left, smooth, window, order, names, colours)
    left.set_title(title or "class weights through the search", fontsize=11, loc="left")
    _draw_matrix(right, np.array(confusion, dtype=float), order, names, colours)
    figure.savefig(path, dpi=90)


def _colours(last: np.ndarray, order: np.ndarray, coloured: set[int]) -> list[str]:
    """A colour for each class: warm ones for heavy classes, cool ones for light ones."""
    colours = [GREY] * len(last)
    warm = [label for label in order if label in coloured and last[label] >= last.mean()]
    cool = [label for label in order[::-1] if label in coloured and last[label] < last.mean()]
    for labels, palette in ((warm, WARM), (cool, COOL)):
        for place, label in enumerate(labels):
            colours[label] = palette[place % len(palette)]
    return colours


def _draw_lines(
    axes: Axes,
    smooth: np.ndarray,
    window: int,
    order: np.ndarray,
    names: Sequence[str],
    colours: Sequence[str],
) -> None:
    rounds = np.arange(window, window + smooth.shape[1])
    for label in order[::-1]:
        grey = colours[label] == GREY
        width, level = (1.0, 2) if grey else (2.0, 3)
        axes.plot(rounds, smooth[label], color=colours[label], lw=width, zorder=level)

    # From the lightest to the heaviest, each name at least one line above the one before.
    low, high = axes.get_ylim()
    place = low - high
    for label in order[::-1]:
        place = max(float(smooth[label, -1]), place + GAP * (high - low))
        shade = "#626b77" if colours[label] == GREY else colours[label]
        axes.annotate(
            as_label(names[label], 14),
            (float(rounds[-1]), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=shade,
            annotation_clip=False,
        )
    if len(rounds) > 1:
        axes.set_xlim(float(rounds[0]), float(rounds[-1]))
    axes.set_xlabel("round")
    axes.set_ylabel(f"class weight (mean of {window} rounds)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_matrix(
    axes: Axes,
    counts: np.ndarray,
    order: np.ndarray,
    names: Sequence[str],
    colours: Sequence[str],
) -> None:
    """The shares of each row in %, the heaviest class first."""
    shares = 100.0 * counts / counts.sum(axis=1, keepdims=True).clip(min=1.0)
    shares = shares[order][:, order]
    axes.imshow(shares, cmap="Blues", vmin=0.0)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 1.0:
            shade = "white" if share > 0.55 * shares.max() else "#1b1f24"
            axes.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=shade
            )
    labels = [as_label(names[label], 14) for label in order]
    axes.set_xticks(range(len(order)), labels=labels, rotation=45, fontsize=9)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(order)), labels=labels, fontsize=9)
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        for text, label in zip(axis, order, strict=True):
            text.set_color("#626b77" if colours[label] == GREY else colours[label])
    axes.set_xlabel("W1's answer")
    axes.set_ylabel("class, the heaviest first")
    axes.set_title("what W1 takes images of D_val for, %", fontsize=11, loc="left")
    axes.tick_params(length=0)
