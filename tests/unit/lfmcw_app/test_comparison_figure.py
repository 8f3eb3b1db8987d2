"""The figure of a table."""

from __future__ import annotations

from made_arms import arm

from lfmcw_app.comparison_figure import draw_comparison


def test_a_figure_is_drawn_of_one_run_too(tmp_path):
    path = tmp_path / "figure.png"
    draw_comparison([arm("a long label of an arm", 1.0), arm("new", 2.0, 3.0)], "title", path)
    assert path.stat().st_size > 2000
