"""The mechanism as a picture file: class weights through a search, beside what W1 gets wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lfmcw_app.drawing import as_lines, drawing
from lfmcw_app.errors import InputError
from lfmcw_app.search_space.cell_cards import text_units

__all__ = ["draw_class_weights"]

PARTS = 10
"""A running mean is over a tenth of the rounds: a weight in a round is a loss on a few images."""

WARM = ("#d62728", "#e8702a", "#a8324b", "#c98f00")
COOL = ("#1f77b4", "#2ca02c", "#17a0b4")
GREY = "#9aa5b1"
NAME_UNITS, MOST_LINES = 24, 4
"""Letters in a line of a name, unless it would have more lines than these."""

LETTER, LINE, CELL = 0.08, 0.17, 0.25
"""Inches of a letter of a name, of a line of it, and of a number in the matrix."""

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

    labels = _Labels.of(names)
    figure = Figure(figsize=labels.figure_size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=labels.widths)
    _draw_lines(left, smooth, window, order, labels, colours)
    left.set_title(title or "class weights through the search", fontsize=11, loc="left")
    _draw_matrix(right, np.array(confusion, dtype=float), order, labels, colours)
    figure.savefig(path, dpi=90)


@dataclass(frozen=True, kw_only=True)
class _Labels:
    """Whole names in lines, and how large a picture must be so that they fit.

    Attributes:
        texts: the names of the classes.
        lines: the most that one has.
        length: of the longest line, in inches.
    """

    texts: Sequence[str]
    lines: int
    length: float

    @classmethod
    def of(cls, names: Sequence[str]) -> _Labels:
        longest = max(map(text_units, names))
        widest = max(NAME_UNITS, math.ceil(longest / (MOST_LINES - 1)))
        texts = [as_lines(name, widest) for name in names]
        lines = [text.split("\n") for text in texts]
        return cls(
            texts=texts,
            lines=max(map(len, lines)),
            length=LETTER * max(text_units(line) for text in lines for line in text),
        )

    @property
    def side(self) -> float:
        """Inches that the names need one below the other."""
        return LINE * self.lines * len(self.texts)

    @property
    def widths(self) -> tuple[float, float]:
        """Inches of the lines with their names, and of the matrix with those of its rows."""
        matrix = max(3.9, self.side, CELL * len(self.texts))
        return 5.0 + self.length, matrix + self.length

    @property
    def height(self) -> float:
        """Inches of the axes, below which the columns' names stand."""
        return max(3.5, self.side)

    @property
    def figure_size(self) -> tuple[float, float]:
        """Inches."""
        return sum(self.widths) + 0.5, self.height + 0.7 + self.length


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
    labels: _Labels,
    colours: Sequence[str],
) -> None:
    rounds = np.arange(window, window + smooth.shape[1])
    for label in order[::-1]:
        grey = colours[label] == GREY
        width, level = (1.0, 2) if grey else (2.0, 3)
        axes.plot(rounds, smooth[label], color=colours[label], lw=width, zorder=level)

    low, high = axes.get_ylim()
    ends = {int(label): float(smooth[label, -1]) for label in order[::-1]}
    for label, place in _apart(ends, labels, (low, high)).items():
        shade = "#626b77" if colours[label] == GREY else colours[label]
        axes.annotate(
            labels.texts[label],
            (float(rounds[-1]), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=shade,
            annotation_clip=False,
        )
    axes.set_ylim(low, high)
    if len(rounds) > 1:
        axes.set_xlim(float(rounds[0]), float(rounds[-1]))
    axes.set_xlabel("round")
    of = "" if window == 1 else f" (mean of {window} rounds)"
    axes.set_ylabel(f"class weight{of}")
    axes.spines[["top", "right"]].set_visible(False)


def _apart(
    ends: dict[int, float], labels: _Labels, limits: tuple[float, float]
) -> dict[int, float]:
    """Class → the height of its name, near the end of its line, so that no two names meet.

    Args:
        ends: class → where its line ends, ascending.
        labels: the names.
        limits: of the axis.
    """
    low, high = limits
    inch = (high - low) / labels.height
    halves = {label: 0.5 * LINE * inch * (labels.texts[label].count("\n") + 1) for label in ends}
    places, floor = {}, low
    for label, end in ends.items():  # upwards, each above the one before
        places[label] = max(end, floor + halves[label])
        floor = places[label] + halves[label]
    ceiling = max(high, max(ends.values()))
    for label in reversed(places):  # and back, where the uppermost stand too high
        places[label] = min(places[label], ceiling - halves[label])
        ceiling = places[label] - halves[label]
    return places


def _draw_matrix(
    axes: Axes,
    counts: np.ndarray,
    order: np.ndarray,
    labels: _Labels,
    colours: Sequence[str],
) -> None:
    """The shares of each row in %, the heaviest class first."""
    shares = 100.0 * counts / counts.sum(axis=1, keepdims=True).clip(min=1.0)
    shares = shares[order][:, order]
    axes.imshow(shares, cmap="Blues", vmin=0.0, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        shade = "white" if share > 0.55 * shares.max() else "#1b1f24"
        shade = "#8b95a1" if share < 0.5 else shade  # of rounded zeros
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=shade)
    texts = [labels.texts[label] for label in order]
    turned = 90 if labels.lines > 1 else 45
    axes.set_xticks(range(len(order)), labels=texts, rotation=turned, fontsize=9)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
        if turned == 90:
            text.set(va="center")
    axes.set_yticks(range(len(order)), labels=texts, fontsize=9)
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        for text, label in zip(axis, order, strict=True):
            text.set_color("#626b77" if colours[label] == GREY else colours[label])
    axes.set_xlabel("W1's answer")
    axes.set_ylabel("class, the heaviest first")
    axes.set_title("what W1 takes images of D_val for, %", fontsize=11, loc="left")
    axes.tick_params(length=0)
