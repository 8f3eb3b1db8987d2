"""The evolution of α: frames for the page's slider, and a chart that needs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup

from lfmcw_app.report.charts import Point, Series, line_chart
from lfmcw_app.report.reading import RunData
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cell import edge_count, edge_index
from lfmcw_app.search_space.cell_svg import primitive_label
from lfmcw_app.search_space.genotype import EDGES_PER_NODE, Edge, Genotype, derive_genotype
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.search_space.supernet import MixingWeights
from lfmcw_app.spaces import space_named

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

    def data(self) -> dict[str, Any]:
        """What the slider needs of it, in thousandths."""
        shares = {kind: relative(rows) for kind, rows in self.weights.items()}
        return {
            "round": self.round,
            "stage": self.stage,
            "weights": {kind: _thousandths(rows) for kind, rows in self.weights.items()},
            "relative": {kind: _thousandths(rows) for kind, rows in shares.items()},
            "chosen": self.chosen,
        }


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
        return {"ranges": self.ranges, "frames": [frame.data() for frame in self.frames]}


def evolution(
    run: RunData, offsets: dict[str, int], boundaries: Sequence[tuple[float, str]]
) -> Evolution | None:
    """Makes the frames of a run's search; None where no α was recorded, or cells are not DARTS's.

    Args:
        run: the run.
        offsets: stage → the rounds before it.
        boundaries: where stages begin, for the charts.
    """
    if not issubclass(space_named(run.recipe.search.space).genotype, Genotype):
        return None
    names = _columns(run)
    frames = _frames(run, offsets, names)
    if not frames:
        return None

    # The slider has some of the frames; the charts have all.
    shown, nodes = _spread(frames), run.recipe.search.nodes
    ranges = {kind: _range(kind, shown) for kind in KINDS}
    return Evolution(
        frames=shown,
        pictures={kind: _picture(kind, shown[-1], ranges[kind], nodes, names) for kind in KINDS},
        charts={kind: _chart(kind, frames, boundaries, names) for kind in KINDS},
        ranges=ranges,
    )


def relative(rows: Rows) -> Rows:
    """Weights over the mean weight on edges into the same node: 1 where nothing is preferred."""
    # Node i has 2 + i edges, whose rows follow one another.
    result: Rows = []
    node = 0
    while len(result) < len(rows):
        edges = rows[len(result) : len(result) + 2 + node]
        present = [weight for row in edges for weight in row if weight is not None]
        mean = sum(present) / len(present)
        for row in edges:
            result.append([None if weight is None else weight / mean for weight in row])
        node += 1
    return result


def _chart(
    kind: str,
    frames: Sequence[Frame],
    boundaries: Sequence[tuple[float, str]],
    names: Sequence[str],
) -> Markup:
    """The mean relative weight of each operation over the rounds."""
    points: dict[str, list[Point]] = {primitive: [] for primitive in names}
    for frame in frames:
        columns = zip(*relative(frame.weights[kind]), strict=True)
        for primitive, column in zip(names, columns, strict=True):
            mean = _mean(column)
            if mean is not None:
                points[primitive].append((frame.round, mean))
    series = [
        Series(label=primitive_label(primitive), points=line, colour=f"op-{primitive}")
        for primitive, line in points.items()
    ]
    return line_chart(
        "Mean over the edges", series, unit="× uniform", boundaries=boundaries, smooth=False
    )


def _columns(run: RunData) -> list[str]:
    """The primitives that some edge could have, in the order of their table."""
    found = {name for stage in _candidates(run) for cell in _cells(stage) for name in cell}
    return [name for name in PRIMITIVES if name in found]


def _cells(candidates: Candidates) -> list[tuple[str, ...]]:
    return [*candidates.normal, *candidates.reduction]


def _candidates(run: RunData) -> list[Candidates]:
    """The candidates of each stage that has begun."""
    stages = []
    for stage in run.searched:
        found = space_named(run.recipe.search.space).candidates(run.recipe.search)
        for entry in stage.entries:
            if "candidates" in entry:
                cells = entry["candidates"].items()
                found = Candidates(**{kind: tuple(map(tuple, edges)) for kind, edges in cells})
        stages.append(found)
    return stages


def _frames(run: RunData, offsets: dict[str, int], names: Sequence[str]) -> list[Frame]:
    frames = []
    # A stage logs its candidates in its first round; α has a column for each of them.
    for stage, candidates in zip(run.searched, _candidates(run), strict=True):
        for entry in stage.entries:
            if "alpha" in entry:
                number = offsets[stage.name] + entry["round"]
                frames.append(_frame(stage.name, number, entry["alpha"], candidates, names))
    return frames


def _frame(
    stage: str,
    number: int,
    alpha: dict[str, list[list[float]]],
    candidates: Candidates,
    columns: Sequence[str],
) -> Frame:
    mixing = MixingWeights(**{kind: torch.tensor(alpha[kind]) for kind in KINDS})
    genotype = derive_genotype(mixing, candidates)

    # A column for every primitive, also of edges that have lost some.
    weights: dict[str, Rows] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for row, names in zip(alpha[kind], getattr(candidates, kind), strict=True):
            by_name = dict(zip(names, row, strict=False))
            weights[kind].append([by_name.get(primitive) for primitive in columns])
    chosen = {kind: _places(getattr(genotype, kind), columns) for kind in KINDS}
    return Frame(stage=stage, round=number, weights=weights, chosen=chosen)


def _places(edges: Sequence[Edge], columns: Sequence[str]) -> list[list[int]]:
    return [
        [edge_index(index // EDGES_PER_NODE, edge.source), columns.index(edge.primitive)]
        for index, edge in enumerate(edges)
    ]


def _spread(frames: Sequence[Frame]) -> list[Frame]:
    """At most `MOST_FRAMES`, evenly spread, the last one among them."""
    if len(frames) <= MOST_FRAMES:
        return list(frames)
    last = len(frames) - 1
    return [frames[round(index * last / (MOST_FRAMES - 1))] for index in range(MOST_FRAMES)]


def _thousandths(rows: Rows) -> list[list[int | None]]:
    def of_row(row: list[float | None]) -> list[int | None]:
        return [None if value is None else round(1000 * value) for value in row]

    return list(map(of_row, rows))


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _range(kind: str, frames: Sequence[Frame]) -> tuple[float, float]:
    """The smallest and the largest relative weight of a kind of cell."""
    values: list[float] = []
    for frame in frames:
        for row in relative(frame.weights[kind]):
            values += [value for value in row if value is not None]
    return min(values), max(values)


def _picture(
    kind: str, frame: Frame, span: tuple[float, float], nodes: int, names: Sequence[str]
) -> Markup:
    """One row per edge, one column per primitive; the page's script changes its cells."""
    shades = relative(frame.weights[kind])
    wide = (WIDTH - LEFT) / len(names)
    parts = _column_heads(names, wide)
    rows = [(node, source) for node in range(nodes) for source in range(2 + node)]
    for row, (node, source) in enumerate(rows):
        y = TOP + row * ROW
        head = Markup('<text class="row" x="{}" y="{}">{} → {}</text>')
        parts.append(head.format(LEFT - 6, y + 15, Genotype.state_name(source), node))

        for column in range(len(names)):
            weight, shade = frame.weights[kind][row][column], _share(shades[row][column], span)
            classes = "w chosen" if [row, column] in frame.chosen[kind] else "w"
            if weight is None:
                classes = "w gone"
            box = Markup(
                '<g class="{}"><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="3" '
                'style="fill-opacity:{:.3f}"/><text x="{:.1f}" y="{}">{}</text></g>'
            )
            text = "" if weight is None else f"{100 * weight:.1f}"
            left, middle = LEFT + column * wide + 1, LEFT + (column + 0.5) * wide
            parts.append(
                box.format(classes, left, y + 1, wide - 2, ROW - 2, shade, middle, y + 15, text)
            )

    height = TOP + edge_count(nodes) * ROW + 2
    picture = Markup(
        '<svg class="alpha" viewBox="0 0 {} {}" data-kind="{}" role="img" '
        'aria-label="α, {} cell">{}</svg>'
    )
    return picture.format(WIDTH, height, kind, kind, Markup("").join(parts))


def _column_heads(names: Sequence[str], wide: float) -> list[Markup]:
    """The primitives' names over the columns, in one line or two."""
    parts = []
    for column, primitive in enumerate(names):
        first, _, second = primitive_label(primitive).rpartition(" ")
        first, second = (first, second) if first else (second, "")
        first = first.removesuffix(" conv").removesuffix(" pool")
        second = {"connect": "", "conv": ""}.get(second, second)
        for y, text in ((TOP - 20, first), (TOP - 8, second)):
            if text:
                head = Markup('<text class="head" x="{:.1f}" y="{}">{}</text>')
                parts.append(head.format(LEFT + (column + 0.5) * wide, y, text))
    return parts


def _share(value: float | None, span: tuple[float, float]) -> float:
    """Where a relative weight lies between the smallest and the largest of the run."""
    low, high = span
    return 0.0 if value is None or high <= low else (value - low) / (high - low)
