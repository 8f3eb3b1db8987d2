"""The candidate operations of every edge."""

from __future__ import annotations

import pytest
from small_supernets import alternating, both

from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("none", "sep_conv_3x3"), ("skip_connect",)], r"same number of primitives, got \[1, 2\]"),
        ([("none", "sep_conv_3x4")], "Did you mean 'sep_conv_3x3'"),
        ([("noise", "noise")], "names a primitive twice"),
        ([("none",)], "needs a primitive other than 'none'"),
        ([], "same number of primitives"),
    ],
)
def test_impossible_candidates_are_refused_with_advice(edges, message):
    with pytest.raises(ValueError, match=message):
        both(edges)


def test_candidates_for_another_number_of_nodes_are_refused():
    with pytest.raises(
        ValueError, match=r"3 nodes has 9 edges, but the candidates are for 5 \(normal\)"
    ):
        Architecture(3, alternating(DARTS_PRIMITIVES, 2, 3))
