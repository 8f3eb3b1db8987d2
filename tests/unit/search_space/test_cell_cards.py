"""Pictures of cells: no line meets a label, no label another, in any space and with any nodes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
from one_cell_space import OPERATIONS as ONE_CELL_OPERATIONS
from one_cell_space import PLACES, OneCell

from lfmcw_app.search_space.cell_cards import graphs_of, layout_of
from lfmcw_app.search_space.cell_svg import primitive_label
from lfmcw_app.search_space.genotype import Cells, Edge, Genotype, random_genotype
from lfmcw_app.search_space.nasbench201 import OPERATIONS, SumCell, sum_edges


def random_sum(nodes, seed):
    draw = random.Random(seed)
    return SumCell(tuple(draw.choice(OPERATIONS) for _ in sum_edges(nodes)))


def random_one(seed):
    draw = random.Random(seed)
    return OneCell(tuple(draw.choice(ONE_CELL_OPERATIONS) for _ in PLACES))


def layouts(cells, *, rename=primitive_label):
    for graph in graphs_of(cells):
        names = {name for _, edges in graph.nodes for name, _ in edges}
        yield graph, layout_of(graph, {name: rename(name) for name in names})


def shared(one, other):
    """The area that two boxes share, in square pixels."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def meets(line, box):
    """Whether a line goes through the inside of a box; its pieces are straight or upright."""
    for (x0, y0), (x1, y1) in pairwise(line.places):
        across = max(x0, x1) > box[0] + 0.01 and min(x0, x1) < box[2] - 0.01
        along = max(y0, y1) > box[1] + 0.01 and min(y0, y1) < box[3] - 0.01
        if across and along:
            return True
    return False


def check(cells, **how):
    for graph, layout in layouts(cells, **how):
        for label in layout.labels:
            assert 0 <= label.box[0] < label.box[2] <= layout.width
            assert 0 <= label.box[1] < label.box[3] <= layout.height
            assert not any(meets(line, label.box) for line in layout.lines)
        for one, other in combinations(layout.labels, 2):
            assert shared(one.box, other.box) == 0.0
        for line in layout.lines:
            for x, y in line.places:
                assert 0 <= x <= layout.width
                assert 0 <= y <= layout.height
        taps = [line for line in layout.lines if line.group == "tap"]
        assert len(taps) == sum(len(edges) for _, edges in graph.nodes)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 6, 9])
def test_no_line_meets_a_label_of_darts_cells(nodes):
    for seed in range(40):
        check(random_genotype(nodes, seed))


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 6, 16])
def test_no_line_meets_a_label_of_sum_cells(nodes):
    for seed in range(15):
        check(random_sum(nodes, seed))


def test_no_line_meets_a_label_of_foreign_cells():
    for seed in range(15):
        check(random_one(seed))


def test_no_line_meets_a_long_or_wide_label():
    for long in ("a_very_long_name_of_an_operation_" * 3, "分離可能な畳み込み三掛ける三"):
        check(random_genotype(6, 0), rename=lambda name, long=long: f"{long} {name}")


@pytest.mark.parametrize("seed", range(20))
def test_lines_of_two_states_share_no_stretch(seed):
    """Otherwise nobody could tell which state an operation reads."""
    for _, layout in layouts(random_genotype(6, seed)):
        upright = [
            (line, places)
            for line in layout.lines
            if line.group in ("bus", "join")
            for places in pairwise(line.places)
            if places[0][0] == places[1][0]
        ]
        for (one, first), (other, second) in combinations(upright, 2):
            if one.group == other.group == "join":
                continue
            if abs(first[0][0] - second[0][0]) < 5.0:
                (a, b), (c, d) = ((p[0][1], p[1][1]) for p in (first, second))
                assert b + 5.0 <= c or d + 5.0 <= a


def test_each_operation_is_reached_from_the_state_that_it_reads():
    cells = Genotype(
        normal=(Edge("sep_conv_3x3", 0), Edge("skip_connect", 1), Edge("max_pool_3x3", 2),
                Edge("dil_conv_3x3", 0)),
        reduction=(Edge("skip_connect", 1), Edge("skip_connect", 1), Edge("max_pool_3x3", 2),
                   Edge("dil_conv_3x3", 2)),
    )  # fmt: skip
    for graph, layout in layouts(cells):
        names = [label for label in layout.labels if label.group in ("input", "node")]
        outlets = [(label.box[1] + label.box[3]) / 2 for label in names]
        chips = [label for label in layout.labels if label.group == "op"]
        wanted = [edge for _, edges in graph.nodes for edge in edges]
        for label, (operation, source) in zip(chips, wanted, strict=True):
            assert label.operation == operation
            middle = (label.box[1] + label.box[3]) / 2
            (tap,) = [
                line for line in layout.lines
                if line.group == "tap" and line.places[-1][1] == middle
                and line.places[-1][0] in (label.box[0], label.box[2])
            ]  # fmt: skip
            lane = tap.places[0][0]
            above = [
                line.places[0][1] for line in layout.lines
                if line.group == "bus" and line.places[1][0] == lane
                and line.places[0][1] < middle <= line.places[-1][1] + 6.0
            ]  # fmt: skip
            assert above == [outlets[source]]


def test_four_and_six_nodes_fit_a_phone():
    for nodes in (4, 6):
        for seed in range(30):
            for _, layout in layouts(random_genotype(nodes, seed)):
                assert layout.width <= 380.0


def test_labels_of_operations_stand_in_two_columns():
    for _, layout in layouts(random_genotype(5, 3)):
        assert len({label.box[0] for label in layout.labels if label.group == "op"}) == 2


def test_an_edge_without_an_operation_is_left_out():
    (graph,) = graphs_of(SumCell(("none", "skip_connect", "none")))
    assert graph.nodes == (("node 0", ()), ("output", (("skip_connect", 0),)))
    check(SumCell(("none", "none", "none")))


@dataclass(frozen=True)
class Backwards(Cells):
    """A cell whose first node reads the second."""

    def to_data(self):
        return {"cell": [[["skip_connect", 2]], [["skip_connect", 0]]]}


def test_a_cell_that_reads_ahead_is_refused():
    with pytest.raises(ValueError, match="node 0 of 'cell' reads state 2"):
        graphs_of(Backwards())
