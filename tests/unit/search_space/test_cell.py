"""What the P-DARTS and PC-DARTS search spaces share: sizes, candidates, dropout on identities,
gradients.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import mlo
from lfmcw_app.generators import Discriminator
from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.cell import Cell, edge_count
from lfmcw_app.search_space.genotype import Edge, derive_genotype
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle
from lfmcw_app.search_space.pdarts import set_skip_drop_probability
from lfmcw_app.search_space.supernet import Architecture, MixingWeights, Supernet
from mlo.testing import relative_error

SMOOTH = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


def both(edges):
    """The same candidates for both kinds of cell."""
    edges = tuple(edges)
    return Candidates(normal=edges, reduction=edges)


def alternating(primitives, nodes, count):
    """Candidates that differ from edge to edge: a window of `count` primitives that moves on with
    each edge.
    """
    ring = itertools.cycle(primitives)
    return both(tuple(itertools.islice(ring, count)) for _ in range(edge_count(nodes)))


# ------------------------------ sizes


def operation_parameters(primitive, channels, stride):
    if primitive.startswith(("sep", "dil")):
        kernel = int(primitive[-1])
        once = kernel**2 * channels + channels**2  # depthwise and pointwise
        return 2 * once if primitive.startswith("sep") else once
    return channels**2 if primitive == "skip_connect" and stride == 2 else 0


def supernet_parameters(*, candidates, layers, num_classes, part=1, stem="cifar", channels=16):
    """The parameters of a supernet with four nodes, counted by hand: no layer in a cell has a bias
    or a learned norm.
    """
    width = 3 * channels
    total = 9 * 3 * width + 2 * width
    if stem == "imagenet":
        half = width // 2
        total = (
            (9 * 3 * half + 2 * half)
            + (9 * half * width + 2 * width)
            + (9 * width * width + 2 * width)
        )
    before = (width, width)
    for layer in range(layers):
        reduces = layer in (layers // 3, 2 * layers // 3)
        channels *= 2 if reduces else 1
        total += sum(before) * channels
        edges = [(node, source) for node in range(4) for source in range(2 + node)]
        names = candidates.reduction if reduces else candidates.normal
        for (_, source), primitives in zip(edges, names, strict=True):
            stride = 2 if reduces and source < 2 else 1
            total += sum(
                operation_parameters(primitive, channels // part, stride)
                for primitive in primitives
            )
        before = (before[1], 4 * channels)
    return total + (before[1] + 1) * num_classes


ALL = as_candidates(PRIMITIVES, 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": 8, "num_classes": 10}, 1_930_618),  # DARTS: 1.93 M
        ({"layers": 8, "num_classes": 10, "partial_channels": 4}, 299_578),
        # The PC-DARTS authors' program prints 0.956512 MB for its ImageNet supernet (their issue
        # 15).
        ({"layers": 8, "num_classes": 1000, "partial_channels": 2, "stem": "imagenet"}, 956_512),
        ({"layers": 5, "num_classes": 10}, 1_275_834),  # P-DARTS, first stage
        ({"layers": 11, "num_classes": 10, "primitives": alternating(PRIMITIVES, 4, 5)}, None),
        ({"layers": 17, "num_classes": 10, "primitives": alternating(PRIMITIVES, 4, 3)}, None),
    ],
    ids=["darts", "pc-darts", "pc-darts-imagenet", "p-darts-1", "p-darts-2", "p-darts-3"],
)
def test_supernets_of_the_papers_size_have_the_parameters_counted_by_hand(options, expected):
    with torch.device("meta"):
        supernet = Supernet(in_channels=3, **options)
    counted = supernet_parameters(
        candidates=options.get("primitives", ALL),
        layers=options["layers"],
        num_classes=options["num_classes"],
        part=options.get("partial_channels", 1),
        stem=options.get("stem", "cifar"),
    )
    assert sum(p.numel() for p in supernet.parameters()) == counted
    assert expected in (None, counted)


def test_architectures_have_a_row_an_edge_and_with_edge_weights_a_scalar_an_edge():
    arch = Architecture(edge_weights=True)
    assert {name: tuple(p.shape) for name, p in arch.named_parameters()} == {
        "normal": (14, 8), "reduction": (14, 8), "normal_edges": (14,), "reduction_edges": (14,),
    }  # fmt: skip
    assert all(0.0 < float(p.detach().abs().max()) < 0.01 for p in arch.parameters())
    fewer = Architecture(2, alternating(PRIMITIVES, 2, 3))
    assert {name: tuple(p.shape) for name, p in fewer.named_parameters()} == {
        "normal": (5, 3),
        "reduction": (5, 3),
    }


def test_the_darts_architecture_draws_what_it_drew_before_and_has_no_other_parameters():
    torch.manual_seed(5)
    arch = Architecture(2)
    torch.manual_seed(5)
    normal, reduction = 1e-3 * torch.randn(5, 8), 1e-3 * torch.randn(5, 8)
    assert torch.equal(arch.normal, normal) and torch.equal(arch.reduction, reduction)
    assert list(arch.state_dict()) == ["normal", "reduction"]


def test_the_imagenet_stem_reduces_to_an_eighth_and_feeds_the_first_cell_two_resolutions():
    supernet = Supernet(
        in_channels=3,
        num_classes=5,
        channels=4,
        layers=3,
        nodes=1,
        stem="imagenet",
        partial_channels=2,
    )
    images = torch.randn(2, 3, 64, 64)
    first = supernet.stem(images)
    assert first.shape == (2, 12, 16, 16)
    assert supernet.second_stem(first).shape == (2, 12, 8, 8)
    weights = Architecture(1, edge_weights=True)()
    assert supernet.features(images, weights).shape == (2, supernet.out_channels, 2, 2)
    with pytest.raises(ValueError, match="'cifar' or 'imagenet', got 'mnist'"):
        Supernet(in_channels=3, num_classes=5, stem="mnist")


# ------------------------------ candidates


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("none", "sep_conv_3x3"), ("skip_connect",)], r"same number of primitives, got \[1, 2\]"),
        ([("none", "sep_conv_3x4")], "Did you mean 'sep_conv_3x3'"),
        ([("none",)], "needs a primitive other than 'none'"),
        ([], "same number of primitives"),
    ],
)
def test_impossible_candidates_are_refused_with_advice(edges, message):
    with pytest.raises(ValueError, match=message):
        both(edges)


def test_candidates_for_another_number_of_nodes_are_refused():
    with pytest.raises(
        ValueError, match=r"3 nodes has 9 edges, but there are candidates for 5 \(normal\)"
    ):
        Architecture(3, alternating(PRIMITIVES, 2, 3))


def test_each_edge_of_a_supernet_has_its_own_candidates():
    names = Candidates(
        normal=(("none", "sep_conv_3x3"), ("skip_connect", "none")),
        reduction=(("max_pool_3x3",),) * 2,
    )
    supernet = Supernet(
        in_channels=1, num_classes=2, channels=4, layers=3, nodes=1, primitives=names
    )
    normal, reducing = supernet.cells[0], supernet.cells[1]
    assert [fan.edges for fan in normal.fans] == [{"sep_conv_3x3": (0,)}, {"skip_connect": (0,)}]
    assert [len(list(fan.parameters())) for fan in normal.fans] == [4, 0]
    assert [len(list(fan.parameters())) for fan in reducing.fans] == [0, 0]
    assert supernet(torch.randn(2, 1, 8, 8), Architecture(1, names)()).shape == (2, 2)


def test_a_genotype_is_named_by_each_edges_own_candidates():
    names = both([("skip_connect", "none"), ("max_pool_3x3", "dil_conv_5x5")])
    weights = torch.tensor([[0.1, 0.9], [0.3, 0.7]])
    genotype = derive_genotype(MixingWeights(normal=weights, reduction=weights), names)
    assert (
        genotype.normal == genotype.reduction == (Edge("skip_connect", 0), Edge("dil_conv_5x5", 1))
    )


# ------------------------------ dropout on identities


def bare_cell(primitives, *, reduces=False, part=1):
    """A cell with one node of four channels, whose inputs are passed on as they are."""
    cell = Cell(
        (4, 4), 4, nodes=1, reduces=reduces, reduced_before=False, primitives=[primitives] * 2, style=OperationStyle(),
        partial_channels=part,
    )  # fmt: skip
    cell.preprocess0 = cell.preprocess1 = torch.nn.Identity()
    return cell


def test_skip_dropout_zeroes_entries_of_an_identity_and_scales_the_others():
    torch.manual_seed(0)
    cell = bare_cell(("none", "skip_connect"))
    x, y = 1.0 + torch.rand(2, 8, 4, 16, 16)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    out = cell(x, y, weights, 0.3) / 0.5
    dropped = out == 0
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.allclose(out[~dropped], (x / 0.7)[~dropped])
    assert torch.equal(cell.eval()(x, y, weights, 0.3), 0.5 * x)


def test_skip_dropout_is_drawn_for_each_edge():
    cell = bare_cell(("none", "skip_connect"))
    x = torch.ones(8, 4, 16, 16)
    out = cell(x, x, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), 0.5)
    assert out.unique().tolist() == [0.0, 1.0, 2.0]  # one of the two, or both


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize(
    ("primitives", "reduces"),
    [(tuple(p for p in PRIMITIVES if p != "skip_connect"), False), (PRIMITIVES, True)],
)
def test_skip_dropout_leaves_everything_but_identities_alone(primitives, reduces, part):
    cell = bare_cell(primitives, reduces=reduces, part=part)
    x, y = torch.randn(2, 2, 4, 6, 6)
    weights = torch.rand(2, len(primitives))
    state = torch.get_rng_state()
    assert torch.equal(cell(x, y, weights, 0.9), cell(x, y, weights))
    assert torch.equal(torch.get_rng_state(), state)


def tiny(kind, *, style=None, dropout=0.3):
    """A supernet and an architecture of a space, in float64."""
    torch.manual_seed(1)
    names = SMOOTH if kind == "pc-darts" else alternating(SMOOTH, 2, 3)
    part = 2 if kind == "pc-darts" else 1
    supernet = Supernet(
        in_channels=1,
        num_classes=3,
        channels=4,
        layers=3,
        nodes=2,
        primitives=names,
        style=style,
        partial_channels=part,
    )
    supernet.skip_drop_probability = dropout
    return supernet.double(), Architecture(
        2, names, scale=0.5, edge_weights=kind == "pc-darts"
    ).double()


@pytest.mark.parametrize("kind", ["p-darts", "pc-darts"])
def test_skip_dropout_is_replayed_under_a_seed_and_changes_only_the_statistics_of_norms(kind):
    supernet, arch = tiny(kind)
    before = copy.deepcopy(supernet.state_dict())
    images, weights = torch.randn(2, 1, 8, 8, dtype=torch.float64), arch()

    def logits(seed):
        torch.manual_seed(seed)
        return supernet(images, weights)

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))
    changed = {
        name
        for name, value in supernet.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert {name.rsplit(".", 1)[1] for name in changed} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_one_call_sets_the_skip_dropout_of_all_supernets():
    first, second = tiny("p-darts")[0], tiny("pc-darts")[0]
    discriminator = Discriminator(second, num_classes=3, feature_size=2).double()
    set_skip_drop_probability(torch.nn.ModuleList([first, discriminator]), 0.25)
    assert first.skip_drop_probability == second.skip_drop_probability == 0.25
    images, weights = torch.randn(2, 1, 8, 8, dtype=torch.float64), tiny("pc-darts")[1]()
    assert discriminator(images, torch.tensor([0, 2]), weights).shape == (2,)


# ------------------------------ gradients


@pytest.mark.parametrize("kind", ["p-darts", "pc-darts"])
def test_the_gradient_in_the_architecture_is_that_of_finite_differences(kind):
    supernet, arch = tiny(kind, style=OperationStyle(norm="group", activation="silu"))
    images, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    names = [name for name, _ in arch.named_parameters()]
    assert len(names) == (4 if kind == "pc-darts" else 2)

    def loss(*logits):
        torch.manual_seed(2)  # the same dropout each time
        weights = functional_call(arch, dict(zip(names, logits, strict=True)), ())
        return F.cross_entropy(supernet(images, weights), labels)

    assert torch.autograd.gradcheck(loss, tuple(arch.parameters()))


@pytest.mark.parametrize("kind", ["p-darts", "pc-darts"])
def test_mlo_differentiates_through_a_step_of_the_supernet_with_the_same_dropout(kind):
    """The total gradient in α (and β) against plain autograd through one SGD step of W, with
    BatchNorm and dropout.
    """
    supernet, arch = tiny(kind)
    images, labels = (
        torch.randn(2, 4, 1, 8, 8, dtype=torch.float64),
        torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]]),
    )
    lr = 0.1

    def train_loss(w, batch, *, arch):
        return F.cross_entropy(w(images[0], arch()), labels[0])

    def valid_loss(arch, batch, *, w):
        return F.cross_entropy(w(images[1], arch()), labels[1])

    optimizer = mlo.MultilevelOptimizer(
        [
            mlo.Problem(
                "w",
                module=supernet,
                optimizer=torch.optim.SGD(supernet.parameters(), lr=lr),
                loss=train_loss,
            ),
            mlo.Problem(
                "arch", module=arch, optimizer=torch.optim.Adam(arch.parameters()), loss=valid_loss
            ),
        ],
        hypergradient="one_step",
    )
    torch.manual_seed(4)
    actual = optimizer.gradient("arch")

    torch.manual_seed(4)
    logits = {name: p.detach().clone().requires_grad_() for name, p in arch.named_parameters()}
    params = {name: p.detach().clone().requires_grad_() for name, p in supernet.named_parameters()}
    weights = functional_call(arch, logits, ())
    network = copy.deepcopy(supernet)
    loss = F.cross_entropy(functional_call(network, params, (images[0], weights)), labels[0])
    slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    moved = {name: p - lr * slope for (name, p), slope in zip(params.items(), slopes, strict=True)}
    loss = F.cross_entropy(functional_call(network, moved, (images[1], weights)), labels[1])
    expected = dict(zip(logits, torch.autograd.grad(loss, list(logits.values())), strict=True))
    assert relative_error(actual, expected) < 1e-10
