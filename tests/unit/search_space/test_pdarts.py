"""P-DARTS: stages, the operations that survive them, the schedule of the dropout, and the limit on
skip connections.
"""

from __future__ import annotations

import math

import pytest
import torch
from small_supernets import both, tiny

from lfmcw_app.generators import Discriminator
from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.genotype import Edge, derive_genotype
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.pdarts import (
    derive_restricted_genotype,
    pdarts_stages,
    set_skip_drop_probability,
    skip_drop_probability,
    surviving,
)
from lfmcw_app.search_space.supernet import MixingWeights, reduction_layers


def mixing(rows):
    weights = torch.tensor(rows, dtype=torch.float64)
    return MixingWeights(normal=weights, reduction=weights)


def test_the_stages_are_the_papers():
    assert [(stage.layers, stage.drops, stage.drops_none) for stage in pdarts_stages()] == [
        (5, 3, False), (11, 2, False), (17, 2, True),
    ]  # fmt: skip
    assert [reduction_layers(stage.layers) for stage in pdarts_stages()] == [
        (1, 3),
        (3, 7),
        (5, 11),
    ]
    assert [stage.layers for stage in pdarts_stages(3, added=(0, 2, 4))] == [3, 5, 7]


def test_the_weakest_operations_are_dropped_in_stages():
    """The weakest operations of each edge are dropped stage by stage."""
    first, second, third = pdarts_stages()
    names = as_candidates(DARTS_PRIMITIVES, 1)
    weights = mixing([
        [0.30, 0.02, 0.05, 0.20, 0.15, 0.13, 0.05, 0.10],
        [0.01, 0.02, 0.03, 0.04, 0.10, 0.20, 0.25, 0.35],
    ])  # fmt: skip
    # Of equally weak ones the first goes; `none` may stay, or go.
    names = surviving(weights, names, first)
    assert names.normal == (
        ("none", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_5x5"),
        ("skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
    )
    names = surviving(
        mixing([[0.40, 0.30, 0.05, 0.15, 0.10], [0.2, 0.2, 0.2, 0.2, 0.2]]), names, second
    )
    assert names.normal == (
        ("none", "skip_connect", "sep_conv_5x5"), ("sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
    )  # fmt: skip
    # Now `none` goes, however strong.
    names = surviving(mixing([[0.90, 0.04, 0.06], [0.2, 0.5, 0.3]]), names, third)
    assert names.normal == names.reduction == (("sep_conv_5x5",), ("dil_conv_3x3",))


def test_operations_are_dropped_for_each_kind_of_cell_by_itself():
    stage = pdarts_stages()[0]
    rising, falling = torch.arange(8.0).expand(2, 8), torch.arange(8.0).flip(0).expand(2, 8)
    names = surviving(
        MixingWeights(normal=rising, reduction=falling), as_candidates(DARTS_PRIMITIVES, 1), stage
    )
    assert names == Candidates(
        normal=(DARTS_PRIMITIVES[3:],) * 2, reduction=(DARTS_PRIMITIVES[:5],) * 2
    )


def test_nothing_is_dropped_by_lost_numbers():
    with pytest.raises(ValueError, match="not finite"):
        surviving(
            mixing([[math.nan] * 8] * 2), as_candidates(DARTS_PRIMITIVES, 1), pdarts_stages()[0]
        )


def test_dropping_that_would_leave_only_none_is_refused():
    names = both([("none", "skip_connect", "sep_conv_3x3")] * 2)
    with pytest.raises(ValueError, match="needs a primitive other than 'none'"):
        surviving(mixing([[0.8, 0.1, 0.1]] * 2), names, pdarts_stages()[1])


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 24 / 25), (9, 15 / 25), (10, 1.0), (11, 0.8187307530779818)]
)
def test_the_skip_dropout_falls_linearly_and_then_exponentially(epoch, factor):
    assert skip_drop_probability(0.4, epoch) == pytest.approx(0.4 * factor, rel=1e-12)


def test_the_skip_dropout_schedule_fits_other_lengths():
    assert [skip_drop_probability(1.0, epoch, epochs=4, frozen=2) for epoch in range(4)] == [
        0.75, 0.5, 1.0, pytest.approx(math.exp(-0.2)),
    ]  # fmt: skip


SKIPS = both([("none", "skip_connect", "sep_conv_3x3")] * 5)

SKIP_WEIGHTS = mixing([
    [0.10, 0.60, 0.30], [0.10, 0.70, 0.20],
    [0.10, 0.50, 0.40], [0.20, 0.45, 0.35], [0.40, 0.55, 0.05],
])  # fmt: skip


@pytest.mark.parametrize(
    ("max_skips", "into_node_1"),
    [
        (4, (Edge("skip_connect", 0), Edge("skip_connect", 2))),
        # The weakest, .50, becomes a convolution of .40, which the skip of .45 displaces; that
        # becomes one of .35.
        (3, (Edge("sep_conv_3x3", 0), Edge("skip_connect", 2))),
        # The weakest is now .55; the convolution of .05 on its edge gives way to that of .35.
        (2, (Edge("sep_conv_3x3", 0), Edge("sep_conv_3x3", 1))),
    ],
)
def test_the_weakest_skips_are_replaced_one_by_one(max_skips, into_node_1):
    """The weakest skips of the normal cell are replaced one by one."""
    genotype = derive_restricted_genotype(SKIP_WEIGHTS, SKIPS, max_skips)
    assert genotype.normal == (Edge("skip_connect", 0), Edge("skip_connect", 1), *into_node_1)
    assert genotype.reduction == derive_genotype(SKIP_WEIGHTS, SKIPS).reduction
    assert [edge.primitive for edge in genotype.reduction] == ["skip_connect"] * 4


def test_two_skips_are_kept_unless_told_otherwise():
    """Two skips are kept unless told otherwise, and the weights are left alone."""
    before = SKIP_WEIGHTS.normal.clone()
    genotype = derive_restricted_genotype(SKIP_WEIGHTS, SKIPS)
    assert sum(edge.primitive == "skip_connect" for edge in genotype.normal) == 2
    assert torch.equal(SKIP_WEIGHTS.normal, before)


def test_node_0_keeps_both_inputs_when_its_skips_are_replaced():
    genotype = derive_restricted_genotype(SKIP_WEIGHTS, SKIPS, 0)
    assert genotype.normal[:2] == (Edge("sep_conv_3x3", 0), Edge("sep_conv_3x3", 1))


def test_skips_that_nothing_can_replace_are_reported():
    names = both([("none", "skip_connect")] * 5)
    with pytest.raises(ValueError, match="4 of its edges have no other operation"):
        derive_restricted_genotype(mixing([[0.1, 0.9]] * 5), names)


def test_one_call_sets_the_skip_dropout_of_all_supernets():
    first, second = tiny("p-darts")[0], tiny("pc-darts")[0]
    discriminator = Discriminator(second, num_classes=3, feature_size=2).double()
    set_skip_drop_probability(torch.nn.ModuleList([first, discriminator]), 0.25)
    assert first.skip_drop_probability == second.skip_drop_probability == 0.25
    images, weights = torch.randn(2, 1, 8, 8, dtype=torch.float64), tiny("pc-darts")[1]()
    assert discriminator(images, torch.tensor([0, 2]), weights).shape == (2,)
