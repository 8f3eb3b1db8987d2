"""Pictures of derived cells."""

from __future__ import annotations

import pytest

from lfmcw_app.search_space.draw import draw_genotype
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
