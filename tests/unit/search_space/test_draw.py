"""Pictures of derived cells."""

from __future__ import annotations

import pytest
from matplotlib.patches import FancyBboxPatch
from one_cell_space import PLACES, OneCell

from lfmcw_app.search_space.draw import draw_genotype
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES
from lfmcw_app.search_space.nasbench201 import OPERATIONS, SumCell


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_cells_are_drawn_without_graphviz(tmp_path, suffix):
    path = tmp_path / f"cells.{suffix}"
    draw_genotype(NAMED_GENOTYPES["DARTS_V2"], path, "DARTS")
    assert path.stat().st_size > 5000


def test_equal_cells_are_equal_files(tmp_path):
    for name in ("first.svg", "second.svg"):
        draw_genotype(random_genotype(2, 0), tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_cells_of_other_spaces_are_drawn(tmp_path):
    from_sum, foreign = tmp_path / "sum.svg", tmp_path / "one.svg"
    draw_genotype(SumCell(OPERATIONS[1:] + OPERATIONS[:2]), from_sum, "NAS-Bench-201")
    draw_genotype(OneCell(("conv_3x3",) * len(PLACES)), foreign)
    assert from_sum.stat().st_size > 5000
    assert foreign.stat().st_size > 5000


def test_texts_of_a_picture_are_inside_of_their_boxes(tmp_path, monkeypatch):
    """As matplotlib sets them, so that no line can meet them."""
    found = []

    def measure(figure, path, title):
        figure.canvas.draw()
        for ax in figure.axes:
            boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
            ends = [box.get_window_extent() for box in boxes]
            for text in ax.texts:
                own = text.get_window_extent()
                found.append(any(
                    end.x0 <= own.x0 and own.x1 <= end.x1 and end.y0 <= own.y0 and own.y1 <= end.y1
                    for end in ends
                    if end.height < 80
                ))  # fmt: skip

    monkeypatch.setattr("lfmcw_app.search_space.draw._finish", measure)
    for nodes in (2, 6):
        draw_genotype(random_genotype(nodes, nodes), tmp_path / "cells.png")
    assert len(found) == 2 * (2 + 2 * 3 + 1) + 2 * (2 + 6 * 3 + 1)
    assert all(found)
