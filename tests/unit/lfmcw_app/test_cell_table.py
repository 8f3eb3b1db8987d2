"""A table of trained cells: error, regret and rank."""

from __future__ import annotations

import pytest

from lfmcw_app.cell_table import CellTable, TrainedCell
from lfmcw_app.errors import InputError
from lfmcw_app.search_space.nasbench201 import SumCell

NAMES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
CELLS = dict(zip(NAMES, (SumCell((name, name, name)) for name in NAMES), strict=True))
ERRORS = {
    "none": {0: 90.0, 1: 90.0},
    "skip_connect": {0: 40.0, 1: 44.0},
    "nor_conv_1x1": {0: 43.0, 1: 41.0},  # the mean of skip_connect
    "nor_conv_3x3": {0: 30.0, 1: 31.0},
    "avg_pool_3x3": {0: 29.0, 1: 33.0},  # the best single training
}


def table(*, seeds=2, expected=5, **errors):
    cells = {
        CELLS[name].notation(): TrainedCell(errors=of_seed, parameters=1, multiply_adds=1.0)
        for name, of_seed in {**ERRORS, **errors}.items()
    }
    return CellTable(
        name="made.csv", space="nasbench201", nodes=3, dataset="digits", expected=expected,
        seeds=seeds, cells=cells,
    )  # fmt: skip


def test_the_error_is_the_mean_over_the_seeds():
    assert table().error(CELLS["avg_pool_3x3"]) == 31.0


def test_regret_is_against_the_best_mean_not_the_best_training():
    made = table()
    assert made.best == CELLS["nor_conv_3x3"].notation()
    assert {name: made.regret(cell) for name, cell in CELLS.items()} == {
        "none": 59.5, "skip_connect": 11.5, "nor_conv_1x1": 11.5, "nor_conv_3x3": 0.0,
        "avg_pool_3x3": 0.5,
    }  # fmt: skip


def test_cells_of_one_error_share_the_best_of_their_ranks():
    made = table()
    assert {name: made.rank(cell) for name, cell in CELLS.items()} == {
        "nor_conv_3x3": 1, "avg_pool_3x3": 2, "skip_connect": 3, "nor_conv_1x1": 3, "none": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "complete"),
    [
        ({}, True),
        ({"expected": 6}, False),
        ({"none": {0: 90.0}}, False),
        ({"none": {0: 90.0}, "seeds": 1}, True),
    ],
)
def test_a_table_is_complete_with_all_cells_and_trainings(change, complete):
    assert table(**change).complete is complete


def test_a_cell_that_is_missing_is_said():
    other = SumCell(("none", "none", "skip_connect"))
    with pytest.raises(InputError, match=r"made\.csv does not hold the cell '\|none~0\|\+"):
        table().rank(other)
