"""The evolution of α: a frame for each recorded round, which the page's slider moves through, and a
chart that needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup

from lfmcw_app.report.cells import primitive_label, state_label
from lfmcw_app.report.charts import Series, line_chart
from lfmcw_app.report.reading import RunData
from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.cell import edge_count, edge_index
from lfmcw_app.search_space.genotype import EDGES_PER_NODE, Edge, derive_genotype
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.search_space.supernet import MixingWeights

__all__ = ["KINDS", "Evolution", "Frame", "evolution"]

KINDS = ("normal", "reduction")
Rows = list[list[float | None]]
"""[edges, primitives]; None where a primitive was dropped."""
MOST_FRAMES = 60
LEFT, TOP, WIDTH, ROW = 92, 34, 360, 22


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The architecture after a round.

    Attributes:
        round: counted through all stages.
        weights: kind of cell → mixing weights, [edges, primitives], None where a primitive was
            dropped.
        chosen: kind of cell → the [edge, primitive] places that a cell derived now would have.
    """

    stage: str
    round: int
    weights: dict[str, Rows]
    chosen: dict[str, list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """What the page shows of α, by kind of cell.

    Attributes:
        pictures: of the last frame.
        charts: of all frames.
        ranges: the smallest and the largest relative weight in the run.
    """

    frames: Sequence[Frame]
    pictures: dict[str, Markup]
    charts: dict[str, Markup]
    ranges: dict[str, tuple[float, float]]

    def data(self) -> dict[str, Any]:
        """What the slider needs, in thousandths."""
        return {
            "ranges": self.ranges,
            "frames": [
                {
                    "round": frame.round,
                    "stage": frame.stage,
                    "weights": {kind: _thousandths(rows) for kind, rows in frame.weights.items()},
                    "relative": {
                        kind: _thousandths(relative(rows)) for kind, rows in frame.weights.items()
                    },
                    "chosen": frame.chosen,
                }
                for frame in self.frames
            ],
        }


def evolution(
    run: RunData, offsets: dict[str, int], boundaries: Sequence[tuple[float, str]]
) -> Evolution | None:
    """Makes the frames of a run's search; None where no α was recorded.

    Args:
        run: the run.
        offsets: stage → the rounds before it.
        boundaries: where stages begin, for the charts.
    """
    frames = _frames(run, offsets)
    if not frames:
        return None
    shown = _spread(frames)
    ranges = {kind: _range([relative(frame.weights[kind]) for frame in shown]) for kind in KINDS}
    return Evolution(
        frames=shown,
        pictures={
            kind: _picture(kind, shown[-1], ranges[kind], run.recipe.search.nodes) for kind in KINDS
        },
        charts={kind: _chart(kind, frames, boundaries) for kind in KINDS},
        ranges=ranges,
    )


def relative(rows: Rows) -> Rows:
    """Weights over the mean weight on the edges into the same node: 1 where no operation and no
    edge is preferred.
    """
    result: Rows = []
    node = 0
    while len(result) < len(rows):
        edges = rows[len(result) : len(result) + 2 + node]
        present = [weight for row in edges for weight in row if weight is not None]
        mean = sum(present) / len(present)
        result += [[None if weight is None else weight / mean for weight in row] for row in edges]
        node += 1
    return result


def _chart(kind: str, frames: Sequence[Frame], boundaries: Sequence[tuple[float, str]]) -> Markup:
    """The mean relative weight of each operation over the rounds."""
    means = [
        (
            frame.round,
            [_mean(column) for column in zip(*relative(frame.weights[kind]), strict=True)],
        )
        for frame in frames
    ]
    series = [
        Series(
            label=primitive_label(primitive),
            points=[
                (number, value) for number, values in means if (value := values[column]) is not None
            ],
            colour=f"op-{primitive}",
        )
        for column, primitive in enumerate(PRIMITIVES)
    ]
    return line_chart(
        "Mean over the edges", series, unit="× uniform", boundaries=boundaries, smooth=False
    )


def _frames(run: RunData, offsets: dict[str, int]) -> list[Frame]:
    nodes = run.recipe.search.nodes
    frames = []
    for stage in run.searched:
        candidates = as_candidates(PRIMITIVES, nodes)
        for entry in stage.entries:
            if "candidates" in entry:
                candidates = Candidates(
                    **{
                        kind: tuple(map(tuple, edges))
                        for kind, edges in entry["candidates"].items()
                    }
                )
            if "alpha" in entry:
                frames.append(
                    _frame(
                        stage.name, offsets[stage.name] + entry["round"], entry["alpha"], candidates
                    )
                )
    return frames


def _frame(
    stage: str, number: int, alpha: dict[str, list[list[float]]], candidates: Candidates
) -> Frame:
    genotype = derive_genotype(
        MixingWeights(**{kind: torch.tensor(alpha[kind]) for kind in KINDS}), candidates
    )
    weights: dict[str, Rows] = {}
    for kind in KINDS:
        names = getattr(candidates, kind)
        weights[kind] = [
            [row[edge.index(primitive)] if primitive in edge else None for primitive in PRIMITIVES]
            for row, edge in zip(alpha[kind], names, strict=True)
        ]
    chosen = {kind: _places(getattr(genotype, kind)) for kind in KINDS}
    return Frame(stage=stage, round=number, weights=weights, chosen=chosen)


def _places(edges: Sequence[Edge]) -> list[list[int]]:
    return [
        [edge_index(index // EDGES_PER_NODE, edge.source), PRIMITIVES.index(edge.primitive)]
        for index, edge in enumerate(edges)
    ]


def _spread(frames: Sequence[Frame]) -> list[Frame]:
    """At most `MOST_FRAMES`, evenly spread, the last one among them."""
    if len(frames) <= MOST_FRAMES:
        return list(frames)
    return [
        frames[round(index * (len(frames) - 1) / (MOST_FRAMES - 1))] for index in range(MOST_FRAMES)
    ]


def _thousandths(rows: Rows) -> list[list[int | None]]:
    return [[None if value is None else round(1000 * value) for value in row] for row in rows]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _range(pictures: Sequence[Rows]) -> tuple[float, float]:
    values = [value for rows in pictures for row in rows for value in row if value is not None]
    return min(values), max(values)


def _picture(kind: str, frame: Frame, span: tuple[float, float], nodes: int) -> Markup:
    """A row an edge, a column a primitive; the page's script changes its cells."""
    shades = relative(frame.weights[kind])
    column_width = (WIDTH - LEFT) / len(PRIMITIVES)
    parts = []
    for column, primitive in enumerate(PRIMITIVES):
        first, _, second = primitive_label(primitive).rpartition(" ")
        first, second = (first, second) if first else (second, "")
        first = first.removesuffix(" conv").removesuffix(" pool")
        parts += [
            Markup('<text class="head" x="{:.1f}" y="{}">{}</text>').format(
                LEFT + (column + 0.5) * column_width, y, text
            )
            for y, text in (
                (TOP - 20, first),
                (TOP - 8, {"connect": "", "conv": ""}.get(second, second)),
            )
            if text
        ]
    rows = [(node, source) for node in range(nodes) for source in range(2 + node)]
    for row, (node, source) in enumerate(rows):
        y = TOP + row * ROW
        parts.append(
            Markup('<text class="row" x="{}" y="{}">{} → {}</text>').format(
                LEFT - 6, y + 15, state_label(source), node
            )
        )
        for column in range(len(PRIMITIVES)):
            weight, shade = frame.weights[kind][row][column], _share(shades[row][column], span)
            classes = (
                "w gone"
                if weight is None
                else "w chosen"
                if [row, column] in frame.chosen[kind]
                else "w"
            )
            parts.append(
                Markup(
                    '<g class="{}"><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="3" '
                    'style="fill-opacity:{:.3f}"/><text x="{:.1f}" y="{}">{}</text></g>'
                ).format(
                    classes, LEFT + column * column_width + 1, y + 1, column_width - 2, ROW - 2, shade,
                    LEFT + (column + 0.5) * column_width, y + 15, "" if weight is None else f"{100 * weight:.1f}",
                )
            )  # fmt: skip
    height = TOP + edge_count(nodes) * ROW + 2
    return Markup('<svg class="alpha" viewBox="0 0 {} {}" data-kind="{}" role="img" aria-label="α, {} cell">{}</svg>').format(
        WIDTH, height, kind, kind, Markup("").join(parts)
    )  # fmt: skip


def _share(value: float | None, span: tuple[float, float]) -> float:
    """Where a relative weight lies between the smallest and the largest of the run."""
    low, high = span
    return 0.0 if value is None or high <= low else (value - low) / (high - low)
