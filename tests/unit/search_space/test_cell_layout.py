"""Where the states of a cell stand in pictures."""

from __future__ import annotations

from lfmcw_app.search_space.cell_layout import cell_places, control_point, edge_bend


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
