"""Pictures of derived cells."""

from __future__ import annotations

import pytest

from lfmcw_app.search_space.draw import cell_places, control_point, draw_genotype, edge_bend
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_cells_are_drawn_without_graphviz(tmp_path, suffix):
    path = tmp_path / f"cells.{suffix}"
    draw_genotype(NAMED_GENOTYPES["DARTS_V2"], path, "DARTS")
    assert path.stat().st_size > 5000


def test_equal_cells_are_equal_files(tmp_path):
    for name in ("first.svg", "second.svg"):
        draw_genotype(random_genotype(2, 0), tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_states_stand_in_columns_from_the_inputs_to_the_output():
    places = cell_places(4)
    assert len(places) == 2 + 4 + 1
    columns = [x for x, _ in places]
    assert columns == sorted(columns)
    assert len(set(places)) == len(places)


def test_an_arrow_bends_away_from_the_middle():
    """The further it goes, the wider it bends around the nodes that it passes."""
    upper, lower = (0.0, 1.0), (0.0, -1.0)
    assert edge_bend(upper, (1.0, 1.0)) < 0.0 < edge_bend(lower, (1.0, -1.0))
    assert abs(edge_bend(upper, (5.0, 1.0))) > abs(edge_bend(upper, (1.0, 1.0)))
    assert control_point((0.0, 0.0), (2.0, 0.0), 0.5) == (1.0, -1.0)
