"""The genotype: derivation, JSON, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_supernets import both

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.genotype import Edge, Genotype, derive_genotype, random_genotype
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture, MixingWeights


def mixing(rows):
    weights = torch.tensor(rows)
    return MixingWeights(normal=weights, reduction=weights)


def row(**values):
    return [values.get(primitive, 0.0) for primitive in DARTS_PRIMITIVES]


def test_derivation_takes_the_two_strongest_edges():
    """Derivation ignores `none`, and takes the two strongest edges."""
    rows = [
        row(none=0.9, sep_conv_3x3=0.1), row(none=0.1, skip_connect=0.4),
        row(max_pool_3x3=0.3), row(none=0.99, dil_conv_5x5=0.01), row(sep_conv_5x5=0.6),
    ]  # fmt: skip
    genotype = derive_genotype(mixing(rows))
    assert genotype.normal == (
        Edge("sep_conv_3x3", 0),
        Edge("skip_connect", 1),
        Edge("max_pool_3x3", 0),
        Edge("sep_conv_5x5", 2),
    )


def test_derivation_breaks_ties_by_order():
    rows = [row(**dict.fromkeys(DARTS_PRIMITIVES, 0.125))] * 5
    genotype = derive_genotype(mixing(rows))
    assert genotype.normal == tuple(Edge("max_pool_3x3", source) for source in (0, 1, 0, 1))


@given(st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_genotype_survives_json(nodes, seed):
    genotype = random_genotype(nodes, seed)
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert genotype.nodes == nodes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "must be JSON"),
        ("[]", "JSON object with the keys"),
        ('{"normal": [], "reduction": []}', "one entry per node"),
        ('{"normal": [[["sep_conv_3x3", 0]]], "reduction": []}', "needs 2 edges"),
        (
            '{"normal": [[["sep_conv_3x4", 0], ["none", 1]]], "reduction": []}',
            "Did you mean 'sep_conv_3x3'",
        ),
        (
            '{"normal": [[["sep_conv_3x3", 0], ["skip_connect", 2]]], "reduction": []}',
            "can read 0 to 1",
        ),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_a_damaged_genotype_is_refused_with_advice(text, message):
    with pytest.raises(InputError, match=message):
        Genotype.from_json(text)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_no_text_breaks_the_genotype_parser(text):
    with pytest.raises(InputError):
        Genotype.from_json(text)


def test_no_cell_is_derived_from_lost_numbers():
    with pytest.raises(ValueError, match="not finite"):
        derive_genotype(mixing([row(sep_conv_3x3=float("nan"))] * 5))


def test_a_genotype_is_named_by_each_edges_own_candidates():
    names = both([("skip_connect", "none"), ("max_pool_3x3", "dil_conv_5x5")])
    weights = torch.tensor([[0.1, 0.9], [0.3, 0.7]])
    genotype = derive_genotype(MixingWeights(normal=weights, reduction=weights), names)
    assert (
        genotype.normal == genotype.reduction == (Edge("skip_connect", 0), Edge("dil_conv_5x5", 1))
    )


def set_architecture(arch, alpha, beta):
    """Sets the logits of which `alpha` and `beta` are the softmax, in both kinds of cell."""
    with torch.no_grad():
        for logits in (arch.normal, arch.reduction):
            logits.copy_(torch.tensor(alpha).log())
        for logits in (arch.normal_edges, arch.reduction_edges):
            logits.copy_(torch.tensor(beta).log())


def test_derivation_ranks_by_the_product_of_both_softmaxes():
    arch = Architecture(2, ("none", "skip_connect", "sep_conv_3x3"), edge_weights=True).double()
    alpha = [
        [0.1, 0.3, 0.6], [0.98, 0.015, 0.005],  # both edges into node 0 are kept, `none` or not
        [0.05, 0.05, 0.9], [0.2, 0.5, 0.3], [0.6, 0.15, 0.25],
    ]  # fmt: skip
    set_architecture(arch, alpha, [0.01, 0.99, 0.1, 0.3, 0.6])
    # Into node 1: .9 · .1 = .09 < .5 · .3 and .25 · .6 = .15; without β the first would be the
    # strongest.
    kept = (
        Edge("sep_conv_3x3", 0),
        Edge("skip_connect", 1),
        Edge("skip_connect", 1),
        Edge("sep_conv_3x3", 2),
    )
    assert derive_genotype(arch(), arch.primitives).normal == kept
    assert derive_genotype(arch(), arch.primitives).reduction == kept
    set_architecture(arch, alpha, [0.01, 0.99, 1 / 3, 1 / 3, 1 / 3])
    assert derive_genotype(arch(), arch.primitives).normal[2:] == (
        Edge("sep_conv_3x3", 0),
        Edge("skip_connect", 1),
    )


def test_derivation_with_edge_weights_breaks_ties_by_order():
    arch = Architecture(2, DARTS_PRIMITIVES, scale=0.0, edge_weights=True)
    assert derive_genotype(arch(), arch.primitives).normal == tuple(
        Edge("max_pool_3x3", s) for s in (0, 1, 0, 1)
    )
