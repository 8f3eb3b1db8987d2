"""Cells of NAS-Bench-201: their notation, what is refused, and how they are derived and drawn."""

from __future__ import annotations

import json

import pytest
import torch

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.nasbench201 import (
    OPERATIONS,
    SumCandidates,
    SumCell,
    all_cells,
    derive_sum_cell,
    random_sum_cell,
    sum_edges,
)

PUBLISHED = (
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"
)
CELL = SumCell(
    ("nor_conv_3x3", "nor_conv_3x3", "avg_pool_3x3", "skip_connect", "none", "nor_conv_1x1")
)


def test_the_authors_notation_is_read_and_written():
    assert SumCell.from_text(PUBLISHED) == CELL
    assert CELL.notation() == PUBLISHED
    assert CELL.nodes == 4
    assert SumCell.from_text(f"  {PUBLISHED}\n") == CELL


def test_json_is_read_and_written():
    assert SumCell.from_text(CELL.to_json()) == CELL
    assert json.loads(CELL.to_json())["cell"][1] == [["nor_conv_3x3", 0], ["avg_pool_3x3", 1]]


def test_all_cells_are_different_and_as_many_as_published():
    small = list(all_cells(3))
    assert len(small) == len(set(small)) == 125
    assert sum(1 for _ in all_cells(4)) == 15_625
    assert small[1].operations == ("none", "none", "skip_connect")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "A cell is written"),
        ("|none~0", "A cell is written"),
        ("|none~0|+||", "A cell is written"),
        ("|none|", "A cell is written"),
        ("|none~0|+|none~0|", "reads the states 0 to 1"),
        ("|none~0|+|none~1|none~0|", "in this order"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|none~3|", "Node 3"),
        ("|conv~0|", "Unknown operation 'conv'.*nor_conv"),
        ("{", "JSON"),
        ("[]", "A cell is written"),
        ('{"normal": []}', "JSON object"),
        ('{"cell": []}', "got 0 operations"),
        ('{"cell": [[["none", true]]]}', "list of edges"),
        ('{"cell": [["none"]]}', "list of edges"),
        ('{"cell": [[[1, 0]]]}', "list of edges"),
        ('{"cell": 3}', "JSON object"),
    ],
)
def test_what_is_no_cell_is_refused(text, message):
    with pytest.raises(InputError, match=message) as raised:
        SumCell.from_text(text)
    assert len(str(raised.value)) < 500


def test_a_number_of_edges_that_no_cell_has_is_refused():
    with pytest.raises(InputError, match="got 2 operations"):
        SumCell(("none", "none"))


def test_the_strongest_operation_of_each_edge_is_kept():
    candidates = SumCandidates(cell=(OPERATIONS,) * 3)
    mixing = torch.full((3, 5), 0.1)
    mixing[0, 3], mixing[1, 0] = 0.6, 0.6  # `none` counts; of equal ones the first is kept
    derived = derive_sum_cell(mixing, candidates)
    assert derived.operations == ("nor_conv_3x3", "none", "none")
    with pytest.raises(ValueError, match="not finite"):
        derive_sum_cell(mixing.fill_(float("nan")), candidates)


def test_random_cells_cover_the_space_evenly():
    candidates = (OPERATIONS,) * 3
    drawn = [random_sum_cell(candidates, seed) for seed in range(400)]
    assert drawn[7] == random_sum_cell(candidates, 7)
    assert len(set(drawn)) > 110  # of 125; 120 are expected
    counts = [sum(name in cell.operations for cell in drawn) for name in OPERATIONS]
    assert min(counts) > 140  # 195 are expected
    assert len(sum_edges(4)) == 6


def test_nodes_have_the_numbers_that_tables_of_cells_give_them():
    nodes = CELL.to_data()["cell"]
    assert SumCell.state_name(0) == "the input"
    assert SumCell.state_name(nodes[1][1][1]) == "node 0"
