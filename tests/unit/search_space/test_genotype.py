"""Primitives, cells, supernet, genotype and derived network of the DARTS space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.cell import edge_count, edge_index
from lfmcw_app.search_space.draw import draw_genotype
from lfmcw_app.search_space.genotype import Edge, Genotype, derive_genotype, random_genotype
from lfmcw_app.search_space.network import DerivedNetwork, drop_path
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle, make_operation
from lfmcw_app.search_space.supernet import Architecture, MixingWeights, Supernet, reduction_layers

# The cells that DARTS found on CIFAR-10 (second order), as published in its appendix.
DARTS_V2 = Genotype(
    normal=tuple(
        Edge(*edge)
        for edge in [
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2),
        ]
    ),
    reduction=tuple(
        Edge(*edge)
        for edge in [
            ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
            ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1),
        ]
    ),
)  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", PRIMITIVES[1:])
def test_every_primitive_keeps_or_halves_the_resolution(primitive, stride, norm):
    operation = make_operation(primitive, 6, stride, OperationStyle(norm=norm))
    assert operation(torch.randn(2, 6, 8, 8)).shape == (2, 6, 8 // stride, 8 // stride)


def test_the_paper_sized_supernet_and_architecture_have_the_published_sizes():
    supernet = Supernet(in_channels=3, num_classes=10)
    assert round(sum(p.numel() for p in supernet.parameters()) / 1e6, 2) == 1.93
    architecture = Architecture()
    assert architecture.normal.shape == architecture.reduction.shape == (14, 8)
    assert float(architecture.normal.detach().abs().max()) < 0.01
    assert reduction_layers(8) == (2, 5)


def test_the_supernet_halves_the_resolution_twice():
    supernet = Supernet(in_channels=1, num_classes=5, channels=4, layers=3, nodes=2)
    mixing = Architecture(2)()
    images = torch.randn(2, 1, 16, 16)
    assert supernet.features(images, mixing).shape == (2, supernet.out_channels, 4, 4)
    assert supernet(images, mixing).shape == (2, 5)


def test_edges_are_numbered_node_by_node():
    assert edge_count(4) == 14
    rows = [edge_index(node, source) for node in range(4) for source in range(2 + node)]
    assert rows == list(range(14))


# ------------------------------ genotype


def mixing(rows):
    weights = torch.tensor(rows)
    return MixingWeights(normal=weights, reduction=weights)


def row(**values):
    return [values.get(primitive, 0.0) for primitive in PRIMITIVES]


def test_derivation_ignores_none_and_takes_the_two_strongest_edges():
    rows = [
        row(none=0.9, sep_conv_3x3=0.1), row(none=0.1, skip_connect=0.4),
        row(max_pool_3x3=0.3), row(none=0.99, dil_conv_5x5=0.01), row(sep_conv_5x5=0.6),
    ]  # fmt: skip
    genotype = derive_genotype(mixing(rows))
    assert genotype.normal == (
        Edge("sep_conv_3x3", 0), Edge("skip_connect", 1), Edge("max_pool_3x3", 0), Edge("sep_conv_5x5", 2),
    )  # fmt: skip


def test_derivation_breaks_ties_by_order():
    rows = [row(**dict.fromkeys(PRIMITIVES, 0.125))] * 5
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
        ("nonsense", "is JSON"),
        ("[]", "JSON object with the keys"),
        ('{"normal": [], "reduction": []}', "one entry a node"),
        ('{"normal": [[["sep_conv_3x3", 0]]], "reduction": []}', "needs 2 edges"),
        (
            '{"normal": [[["sep_conv_3x4", 0], ["none", 1]]], "reduction": []}',
            "Did you mean 'sep_conv_3x3'",
        ),
        (
            '{"normal": [[["sep_conv_3x3", 0], ["skip_connect", 2]]], "reduction": []}',
            "can read 0 to 1",
        ),
        ("[" * 100_000, "is JSON"),
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


# ------------------------------ derived network


def test_the_published_darts_cell_has_the_published_number_of_parameters():
    network = DerivedNetwork(
        DARTS_V2, in_channels=3, num_classes=10, channels=36, layers=20, auxiliary=True
    )
    assert round(network.parameter_count() / 1e6, 1) == 3.3


def test_pools_are_normalised_in_the_supernet_only():
    supernet = Supernet(in_channels=1, num_classes=2, channels=4, layers=3, nodes=1)
    in_supernet = supernet.cells[0].fans[0].pools["max_pool_3x3"]
    assert [isinstance(layer, torch.nn.BatchNorm2d) for layer in in_supernet] == [False, True]
    assert isinstance(
        make_operation("max_pool_3x3", 4, 1, OperationStyle(affine=True)), torch.nn.MaxPool2d
    )


def test_no_cell_is_derived_from_lost_numbers():
    with pytest.raises(ValueError, match="not finite"):
        derive_genotype(mixing([row(sep_conv_3x3=float("nan"))] * 5))


def test_the_auxiliary_head_speaks_in_training_only():
    network = DerivedNetwork(
        random_genotype(2, 0), in_channels=3, num_classes=10, channels=4, layers=3, auxiliary=True
    )
    images = torch.randn(2, 3, 32, 32)
    logits, auxiliary = network(images)
    assert logits.shape == auxiliary.shape == (2, 10)
    assert network.eval()(images)[1] is None


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = drop_path(torch.ones(2000, 2, 3, 3), 0.3)
    per_example = out.flatten(1)
    assert bool(((per_example == 0).all(1) | (per_example == per_example[:, :1]).all(1)).all())
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)
    assert float((per_example[:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_cells_are_drawn_without_graphviz(tmp_path, suffix):
    path = tmp_path / f"cells.{suffix}"
    draw_genotype(DARTS_V2, path, "DARTS")
    assert path.stat().st_size > 5000
