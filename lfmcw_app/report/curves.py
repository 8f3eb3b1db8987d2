"""The curves of a report: what was logged in every round, over the rounds of all stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lfmcw_app.report.charts import Point, Series, line_chart
from lfmcw_app.report.reading import RunData

__all__ = [
    "Pick", "Rounds", "error_charts", "gradient_charts", "loss_charts", "points_of",
    "training_charts", "w2_on_real", "warmup_charts",
]  # fmt: skip

Pick = Callable[[dict[str, Any]], float | None]
"""Reads a value out of a line of metrics.jsonl; None where the line lacks it."""

TERMS = {
    "direct": "direct",
    "w2": "through W2",
    "w1_w2": "through W1 → W2",
    "gan_w2": "through G → W2",
}


def at(*keys: str, percent_wrong: bool = False) -> Pick:
    """Reads a nested value; with `percent_wrong` an accuracy as an error in %."""

    def pick(entry: dict[str, Any]) -> float | None:
        value: Any = entry
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        if not isinstance(value, int | float):
            return None
        return 100.0 * (1.0 - value) if percent_wrong else float(value)

    return pick


def w2_on_real(entry: dict[str, Any]) -> float | None:
    """W2's loss on real training images alone, which every method has.

    Plain search has no other. That of LFM-CW has the loss on generated images added.
    """
    value = at("metrics", "w2", "real")(entry)
    if value is None and at("metrics", "w2", "synthetic")(entry) is None:
        value = at("losses", "w2")(entry)
    return value


class Rounds:
    """The rounds of a search, counted through its stages.

    Attributes:
        offsets: stage → rounds before it.
        boundaries: where each stage begins and its name; empty for one stage.
    """

    def __init__(self, run: RunData) -> None:
        self._run = run
        self.offsets: dict[str, int] = {}
        self.boundaries: list[tuple[float, str]] = []
        total = 0
        for stage in run.searched:
            self.offsets[stage.name] = total
            total += stage.entries[-1]["round"]
        if len(self.offsets) > 1:
            self.boundaries = [(float(before + 1), name) for name, before in self.offsets.items()]

    def points(self, pick: Pick) -> list[Point]:
        """(round, value) of every line that has the value."""
        return [
            (float(self.offsets[stage.name] + entry["round"]), value)
            for stage in self._run.searched
            for entry in stage.entries
            if (value := pick(entry)) is not None
        ]

    def series(self, label: str, pick: Pick, colour: int) -> Series:
        """A line of a chart."""
        return Series(label=label, points=self.points(pick), colour=f"series-{colour}")

    def all_series(self, picks: Mapping[str, Pick]) -> list[Series]:
        """The lines of a chart, label → what is read for it, in the order of the colours."""
        numbered = enumerate(picks.items(), start=1)
        return [self.series(label, pick, colour) for colour, (label, pick) in numbered]


def loss_charts(rounds: Rounds) -> list[Markup]:
    """A chart for each of the problems: w1, gan, w2, arch (those that the method has)."""
    one = rounds.series
    charts = [
        line_chart(
            "W1: loss on training data",
            [one("W1", at("losses", "w1"), 1)],
            boundaries=rounds.boundaries,
        ),
        line_chart(
            "GAN: losses of the players",
            [
                one("generator", at("losses", "gan", "generator"), 2),
                one("discriminator", at("losses", "gan", "discriminator"), 3),
            ],
            boundaries=rounds.boundaries,
        ),
        line_chart(
            "W2: loss with weighted classes",
            [
                one("total", at("losses", "w2"), 1),
                one("real images", at("metrics", "w2", "real"), 2),
                one("generated images", at("metrics", "w2", "synthetic"), 3),
            ],
            boundaries=rounds.boundaries,
        ),
        line_chart(
            "A: loss on validation data",
            [one("A", at("losses", "arch"), 4)],
            boundaries=rounds.boundaries,
        ),
    ]
    return [chart for chart in charts if chart]


def error_charts(rounds: Rounds) -> list[Markup]:
    """Errors on batches of real images, and of W2 on generated ones."""
    one = rounds.series
    real = [
        one("W1, training", at("metrics", "w1", "accuracy", percent_wrong=True), 1),
        one("W2, training", at("metrics", "w2", "accuracy", percent_wrong=True), 2),
        one("W2, validation", at("metrics", "arch", "accuracy", percent_wrong=True), 4),
    ]
    of_generated = at("metrics", "w2", "generated_accuracy", percent_wrong=True)
    generated = [one("W2, generated", of_generated, 3)]

    def chart(title: str, series: Sequence[Series]) -> Markup:
        return line_chart(title, series, unit="%", boundaries=rounds.boundaries)

    charts = [
        chart("Error on batches", real),
        chart("Generated images that W2 gets wrong", generated),
    ]
    return [chart for chart in charts if chart]


def gradient_charts(rounds: Rounds) -> list[Markup]:
    """Norms of total gradients, residuals of solves, and the parts of A's gradient if recorded."""
    problems = ("w1", "gan", "w2", "arch")
    norms = {name: at("gradient_norms", name) for name in problems}
    residuals = {name: at("solves", name, "residual") for name in problems[:3]}
    part_norms = {label: at("gradient_terms", key, "norm") for key, label in TERMS.items()}
    cosines = {label: at("gradient_terms", key, "cosine") for key, label in TERMS.items()}

    def chart(title: str, picks: Mapping[str, Pick], *, log: bool) -> Markup:
        series = rounds.all_series(picks)
        return line_chart(title, series, log=log, boundaries=rounds.boundaries)

    charts = [
        chart("Norm of the total gradient", norms, log=True),
        chart("Relative residual of the solves", residuals, log=True),
        chart("Parts of A's gradient: norms", part_norms, log=True),
        chart("Parts of A's gradient: cosine with the whole", cosines, log=False),
    ]
    return [chart for chart in charts if chart]


def points_of(entries: Sequence[dict[str, Any]], pick: Pick) -> list[Point]:
    """(round, value) of every line of one phase that has the value."""
    return [
        (float(entry["round"]), value) for entry in entries if (value := pick(entry)) is not None
    ]


def warmup_charts(entries: Sequence[dict[str, Any]]) -> list[Markup]:
    """Losses of the players, and the discriminator's scores, before the search."""

    def series(label: str, colour: int, *keys: str) -> Series:
        return Series(label=label, points=points_of(entries, at(*keys)), colour=f"series-{colour}")

    losses = [
        series(player, colour, "losses", "gan", player)
        for colour, player in ((2, "generator"), (3, "discriminator"))
    ]
    scores = [
        series("real images", 2, "metrics", "gan", "real_score"),
        series("generated images", 3, "metrics", "gan", "fake_score"),
    ]
    charts = [
        line_chart("Warm-up: losses of the players", losses),
        line_chart("Warm-up: mean scores of the discriminator", scores),
    ]
    return [chart for chart in charts if chart]


def training_charts(entries: Sequence[dict[str, Any]]) -> list[Markup]:
    """Loss and error of the derived network on training batches."""
    losses = points_of(entries, at("losses", "network"))
    error = at("metrics", "network", "accuracy", percent_wrong=True)
    charts = [
        line_chart("Loss on training batches", [Series(label="loss", points=losses)]),
        line_chart(
            "Error on training batches",
            [Series(label="error", points=points_of(entries, error), colour="series-2")],
            unit="%",
        ),
    ]
    return [chart for chart in charts if chart]
