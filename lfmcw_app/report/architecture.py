"""The evolution of α: frames for the page's slider, and a chart that needs no script."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup

from lfmcw_app.report.charts import Point, Series, line_chart
from lfmcw_app.report.reading import RunData
from lfmcw_app.search_space.cell_cards import kind_title
from lfmcw_app.search_space.cell_svg import primitive_label
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.spaces import Place, Space, space_named
from mlo.randomness import preserved

__all__ = ["Evolution", "Frame", "evolution"]

Rows = list[list[float | None]]
"""[edges, primitives]; None where a primitive was dropped."""
Places = dict[str, Sequence[Place] | None]
"""Kind of cell → the place of each edge; None where a space does not say it."""
MOST_FRAMES = 60
FLAT = 1.25
"""Weights hardly differ if the largest is below so many times the mean."""

PER_NODE = (
    "A node takes two edges: those whose best operation has the largest weights. An edge whose row "
    "has no outline was not taken."
)
NEVER_NONE = "“none” cannot be chosen, even where its weight is the largest."
PER_EDGE = "Each edge takes the operation with the largest weight, which may be “none”."
RULES = {
    **dict.fromkeys(("darts", "pdarts", "pcdarts", "s1", "s2", "s3", "s4"), PER_NODE),
    "nasbench201": PER_EDGE,
}
"""Space → how a cell is derived from the weights."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The architecture after a round.

    Attributes:
        round: counted through all stages.
        weights: kind of cell → mixing weights, [edges, primitives], None where a primitive was
            dropped.
        relative: the same over the mean weight on edges into the same node: 1 where nothing is
            preferred.
        chosen: kind of cell → the [edge, primitive] places that a cell derived now would have.
    """

    stage: str
    round: int
    weights: dict[str, Rows]
    relative: dict[str, Rows]
    chosen: dict[str, list[list[int]]]

    def data(self) -> dict[str, Any]:
        """What the slider needs of it, in thousandths."""
        return {
            "round": self.round,
            "stage": self.stage,
            "weights": {kind: _thousandths(rows) for kind, rows in self.weights.items()},
            "relative": {kind: _thousandths(rows) for kind, rows in self.relative.items()},
            "chosen": self.chosen,
        }


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """What the page shows of α, by kind of cell.

    Attributes:
        pictures: of the last frame.
        charts: of all frames.
        ranges: the smallest and the largest relative weight in the run.
        titles: what people call the kind.
        rule: how a cell is derived from the weights, in words; empty for other spaces.
        nearly_even: a sentence if the weights at the end hardly differ, otherwise empty.
    """

    frames: Sequence[Frame]
    titles: dict[str, str]
    pictures: dict[str, Markup]
    charts: dict[str, Markup]
    ranges: dict[str, tuple[float, float]]
    rule: str
    nearly_even: str

    def data(self) -> dict[str, Any]:
        """What the slider needs, in thousandths."""
        return {"ranges": self.ranges, "frames": [frame.data() for frame in self.frames]}


def evolution(
    run: RunData, offsets: dict[str, int], boundaries: Sequence[tuple[float, str]]
) -> Evolution | None:
    """Makes the frames of a run's search in any space; None where no α was recorded.

    Args:
        run: the run.
        offsets: stage → the rounds before it.
        boundaries: where stages begin, for the charts.
    """
    space, stages = space_named(run.recipe.search.space), _candidates(run)
    names = _columns(run, stages)
    frames = _frames(run, space, stages, offsets, names)
    if not frames:
        return None

    # The slider has some of the frames; the charts have all.
    shown = _spread(frames)
    last = shown[-1]
    ranges = {kind: _range(kind, shown) for kind in last.weights}
    heads = {kind: _edge_names(space, len(rows)) for kind, rows in last.weights.items()}
    return Evolution(
        frames=shown,
        titles={kind: kind_title(kind) for kind in last.weights},
        pictures={
            kind: _picture(kind, last, ranges[kind], heads[kind], names) for kind in last.weights
        },
        charts={kind: _chart(kind, frames, boundaries, names) for kind in last.weights},
        ranges=ranges,
        rule=rule_of(run.recipe.search.space, names),
        nearly_even=_nearly_even(last),
    )


def relative(rows: Rows, nodes: Sequence[int]) -> Rows:
    """Weights over the mean weight on edges into the same node: 1 where nothing is preferred.

    Args:
        rows: the weights.
        nodes: the node that each edge enters.
    """
    present: dict[int, list[float]] = {}
    for node, row in zip(nodes, rows, strict=True):
        present.setdefault(node, []).extend(weight for weight in row if weight is not None)
    means = {node: sum(found) / len(found) for node, found in present.items() if found}

    def of_row(node: int, row: list[float | None]) -> list[float | None]:
        mean = means.get(node) or 1.0
        return [None if weight is None else weight / mean for weight in row]

    return [of_row(node, row) for node, row in zip(nodes, rows, strict=True)]


def _chart(
    kind: str,
    frames: Sequence[Frame],
    boundaries: Sequence[tuple[float, str]],
    names: Sequence[str],
) -> Markup:
    """The mean relative weight of each operation over the rounds."""
    points: dict[str, list[Point]] = {primitive: [] for primitive in names}
    for frame in frames:
        columns = zip(*frame.relative[kind], strict=True)
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


def rule_of(space: str, names: Sequence[str]) -> str:
    """How a space derives a cell; empty for a space of another package."""
    rule = RULES.get(space, "")
    return f"{rule} {NEVER_NONE}" if rule == PER_NODE and "none" in names else rule


def _nearly_even(last: Frame) -> str:
    """What weights that hardly differ say of the cell; empty where they differ."""
    found = [weight for rows in last.relative.values() for row in rows for weight in row]
    largest = max((weight for weight in found if weight is not None), default=math.inf)
    if largest >= FLAT:
        return ""
    return (
        f"At the end the weights hardly differ: the largest is only {100 * (largest - 1):.0f}% "
        "above the mean of its node. So small differences decide on the cell, and another seed "
        "may give another one. A longer search lets the weights part."
    )


def _columns(run: RunData, stages: Sequence[Any]) -> list[str]:
    """The primitives that some edge could have, in the order of their table."""
    logged = (entry.get("alpha", {}) for stage in run.searched for entry in stage.entries)
    kinds = {kind for alpha in logged for kind in alpha}
    edges = [edge for found in stages for kind in kinds for edge in getattr(found, kind, ())]
    names = {name for edge in edges for name in edge}
    return [name for name in PRIMITIVES if name in names]


def _candidates(run: RunData) -> list[Any]:
    """The candidates of each stage that has begun, as its space has them."""
    stages = []
    for stage in run.searched:
        found = space_named(run.recipe.search.space).candidates(run.recipe.search)
        for entry in stage.entries:
            if "candidates" in entry:
                cells = entry["candidates"].items()
                names = {kind: tuple(map(tuple, edges)) for kind, edges in cells}
                found = dataclasses.replace(found, **names)
        stages.append(found)
    return stages


def _frames(
    run: RunData,
    space: Space,
    stages: Sequence[Any],
    offsets: dict[str, int],
    names: Sequence[str],
) -> list[Frame]:
    frames = []
    # A stage logs its candidates in its first round; α has a column for each of them.
    for stage, candidates in zip(run.searched, stages, strict=True):
        recorded = [entry for entry in stage.entries if "alpha" in entry]
        if not recorded:
            continue
        with preserved():  # a new architecture draws its weights, which are not used
            mixing = space.architecture(run.recipe.search, candidates)()
        for entry in recorded:
            number = offsets[stage.name] + entry["round"]
            frames.append(
                _frame(stage.name, number, entry["alpha"], space, mixing, candidates, names)
            )
    return frames


def _frame(
    stage: str,
    number: int,
    alpha: dict[str, list[list[float]]],
    space: Space,
    mixing: Any,
    candidates: Any,
    columns: Sequence[str],
) -> Frame:
    """A frame from a line's α; `mixing` has its shape.

    A cell derived from it has the round's operations.
    """
    derived = space.derive_now(
        mixing._replace(**{kind: torch.tensor(rows) for kind, rows in alpha.items()}), candidates
    ).to_data()

    # A column for every primitive, also of edges that have lost some.
    weights: dict[str, Rows] = {}
    shares: dict[str, Rows] = {}
    chosen: dict[str, list[list[int]]] = {}
    for kind in (kind for kind in alpha if hasattr(candidates, kind)):
        weights[kind] = []
        for row, names in zip(alpha[kind], getattr(candidates, kind), strict=True):
            by_name = dict(zip(names, row, strict=False))
            weights[kind].append([by_name.get(primitive) for primitive in columns])
        places = space.edge_places(len(weights[kind]))
        # Where nothing is known of edges, each is compared with itself.
        nodes = [place[0] for place in places] if places else range(len(weights[kind]))
        shares[kind] = relative(weights[kind], nodes)
        chosen[kind] = _chosen(derived.get(kind, []), places or [], columns)
    return Frame(stage=stage, round=number, weights=weights, relative=shares, chosen=chosen)


def _chosen(
    nodes: Sequence[Sequence[Sequence[Any]]], places: Sequence[Place], columns: Sequence[str]
) -> list[list[int]]:
    """[row, column] of each edge of a derived cell, for each node [primitive, state]."""
    rows = {place: row for row, place in enumerate(places)}
    return [
        [rows[node, source], columns.index(primitive)]
        for node, edges in enumerate(nodes)
        for primitive, source in edges
        if (node, source) in rows
    ]


def _edge_names(space: Space, edges: int) -> list[str]:
    """What people call the edge of each row."""
    places, cells = space.edge_places(edges), space.genotype
    if places is None:
        return [f"edge {number}" for number in range(1, edges + 1)]
    last = max((node for node, _ in places), default=0)

    def entered(node: int) -> str:
        is_output = cells.output == "last" and node == last
        return "output" if is_output else cells.state_name(cells.inputs + node)

    return [f"{cells.state_name(source)} → {entered(node)}" for node, source in places]


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
        for row in frame.relative[kind]:
            values += [value for value in row if value is not None]
    return min(values), max(values)


def _picture(
    kind: str,
    frame: Frame,
    span: tuple[float, float],
    edges: Sequence[str],
    names: Sequence[str],
) -> Markup:
    """A row per edge, a column per primitive; the page's script changes the cells."""
    head = Markup('<th scope="col">{}</th>')
    heads = Markup("").join(head.format(primitive_label(name)) for name in names)
    chosen = {(row, column) for row, column in frame.chosen[kind]}
    cell = Markup('<td class="{}" style="--share:{:.0f}%">{}</td>')
    rows = []
    for row, edge in enumerate(edges):
        cells = []
        for column in range(len(names)):
            weight, shade = frame.weights[kind][row][column], frame.relative[kind][row][column]
            state = "w gone" if weight is None else "w"
            state = "w chosen" if (row, column) in chosen else state
            text = "" if weight is None else f"{100 * weight:.1f}"
            cells.append(cell.format(state, 100 * _share(shade, span), text))
        line = Markup('<tr><th scope="row">{}</th>{}</tr>')
        rows.append(line.format(edge, Markup("").join(cells)))
    table = Markup(
        '<table class="alpha" data-kind="{}"><thead><tr><th scope="col">edge</th>{}</tr></thead>'
        "<tbody>{}</tbody></table>"
    )
    return table.format(kind, heads, Markup("").join(rows))


def _share(value: float | None, span: tuple[float, float]) -> float:
    """Where a relative weight lies between the smallest and the largest of the run."""
    low, high = span
    return 0.0 if value is None or high <= low else (value - low) / (high - low)
