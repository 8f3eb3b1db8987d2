"""What the generator's pictures are worth, through the rounds and class by class."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lfmcw_app.collapse import advised, doubts_about_pictures, last_quality
from lfmcw_app.generator_quality import Quality
from lfmcw_app.report.charts import Point, Series, line_chart
from lfmcw_app.report.curves import Pick, Rounds
from lfmcw_app.report.images import class_names
from lfmcw_app.report.reading import RunData

__all__ = ["MeasuredQuality", "QualityRow", "generator_quality", "last_measured", "quality_charts"]

MOST_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """The measures of a class, as text; "–" where there is none."""

    name: str
    gan_test: str
    gan_train: str
    real: str
    variety: str


@dataclass(frozen=True, kw_only=True)
class MeasuredQuality:
    """What was measured of a generator.

    Attributes:
        phase: in which it was last measured.
        round: of that phase.
        last: the last measures.
        doubts: what is wrong with the pictures, with advice.
        charts: the measures over the rounds; empty where they were taken once.
        rows: the last measures of the first `MOST_ROWS` classes.
        classes: how many there are.
    """

    phase: str
    round: int
    last: Quality
    doubts: Sequence[str]
    charts: Sequence[Markup]
    rows: Sequence[QualityRow]
    classes: int


def generator_quality(run: RunData, rounds: Rounds) -> MeasuredQuality | None:
    """The measures of a run's generator; None where there are none."""
    last = last_measured(run)
    if last is None:
        return None
    phase, number, quality, doubts = last
    by_class = quality.by_class
    columns = (by_class.gan_test, by_class.gan_train, by_class.real)
    percents = [[_text(value, 1) for value in column] for column in columns]
    varieties = [_text(value, 2) for value in by_class.variety]
    names = class_names(run, len(varieties))
    rows = [
        QualityRow(name=name, gan_test=test, gan_train=train, real=real, variety=variety)
        for name, test, train, real, variety in zip(names, *percents, varieties, strict=True)
    ]
    return MeasuredQuality(
        phase=phase,
        round=number,
        last=quality,
        doubts=advised(doubts, run.recipe),
        charts=quality_charts(rounds.points, rounds.boundaries),
        rows=rows[:MOST_ROWS],
        classes=len(rows),
    )


def last_measured(run: RunData) -> tuple[str, int, Quality, Sequence[str]] | None:
    """Phase, round, the measures there, and doubts about the pictures; None where there are none.

    Those of metrics.jsonl, unless search.json alone has the end: of real images, which are no
    player whose rounds are logged.
    """
    phases = (run.warmup, *run.searched)
    measured = [(phase.name, last_quality(phase.entries)) for phase in phases]
    found = [(phase, *last) for phase, last in measured if last is not None]
    end = run.search_end
    known = found[-1][:2] if found else None
    if end.get("generator") is None or known == (end["stage"], end["round"]):
        return found[-1] if found else None
    stage, number = str(end["stage"]), operator.index(end["round"])
    quality = Quality.from_data(end["generator"])
    doubts = list(doubts_about_pictures(quality, None).values())
    return stage, number, quality, doubts


def quality_charts(
    points: Callable[[Pick], Sequence[Point]], boundaries: Sequence[tuple[float, str]] = ()
) -> list[Markup]:
    """The measures over the rounds; none where they were taken less than twice.

    Args:
        points: gives (round, value) of every line that has a value.
        boundaries: where stages begin, and their names.
    """

    def series(label: str, colour: int, key: str) -> Series:
        return Series(label=label, points=points(_measure(key)), colour=f"series-{colour}")

    tested, variety = series("GAN-test", 1, "gan_test"), series("variety", 3, "variety")
    if len(tested.points) < 2:
        return []
    accuracies = [tested, series("GAN-train", 2, "gan_train"), series("real pictures", 8, "real")]

    def chart(title: str, lines: Sequence[Series], unit: str = "") -> Markup:
        return line_chart(title, lines, unit=unit, boundaries=boundaries, smooth=False)

    charts = [
        chart("GAN-test and GAN-train", accuracies, "%"),
        chart("Variety within a class", [variety]),
    ]
    return [one for one in charts if one]


def _measure(key: str) -> Pick:
    """Reads a measure of a round, as means over the classes; None where there is none."""

    def pick(entry: dict[str, Any]) -> float | None:
        if "quality" not in entry:
            return None
        value: float | None = getattr(Quality.from_data(entry["quality"]), key)
        return value

    return pick


def _text(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
