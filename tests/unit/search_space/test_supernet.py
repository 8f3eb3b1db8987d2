"""The supernet: sizes, and the same values and derivatives as the module-per-edge formulation."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from reference_supernet import ReferenceSupernet, split_by_edge
from small_supernets import alternating, tiny
from supernet_pairs import SMALL, SPACES, pair
from torch.func import functional_call
from torch.nn import functional as F

import mlo
from lfmcw_app.batchnorm import give_statistics, recompute_statistics
from lfmcw_app.generators.blocks import normalize_spectrally
from lfmcw_app.search_space.candidates import Candidates, as_candidates
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Architecture, Supernet, reduction_layers
from mlo.testing import relative_error


def test_the_paper_sized_supernet_has_the_published_size():
    """Supernet and architecture of the size of the paper have the published sizes."""
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


ALL = as_candidates(DARTS_PRIMITIVES, 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": 8, "num_classes": 10}, 1_930_618),  # DARTS: 1.93 M
        ({"layers": 8, "num_classes": 10, "partial_channels": 4}, 299_578),
        # The PC-DARTS authors' program prints 0.956512 MB for its ImageNet supernet (their issue
        # 15).
        ({"layers": 8, "num_classes": 1000, "partial_channels": 2, "stem": "imagenet"}, 956_512),
        ({"layers": 5, "num_classes": 10}, 1_275_834),  # P-DARTS, first stage
        (
            {"layers": 11, "num_classes": 10, "primitives": alternating(DARTS_PRIMITIVES, 4, 5)},
            None,
        ),
        (
            {"layers": 17, "num_classes": 10, "primitives": alternating(DARTS_PRIMITIVES, 4, 3)},
            None,
        ),
    ],
    ids=["darts", "pc-darts", "pc-darts-imagenet", "p-darts-1", "p-darts-2", "p-darts-3"],
)
def test_supernets_have_the_parameters_counted_by_hand(options, expected):
    """Supernets of the papers' size have the parameters counted by hand."""
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


def test_architectures_have_one_row_per_edge():
    """With edge weights they have one scalar per edge besides."""
    arch = Architecture(edge_weights=True)
    assert {name: tuple(p.shape) for name, p in arch.named_parameters()} == {
        "normal": (14, 8), "reduction": (14, 8), "normal_edges": (14,), "reduction_edges": (14,),
    }  # fmt: skip
    assert all(0.0 < float(p.detach().abs().max()) < 0.01 for p in arch.parameters())
    fewer = Architecture(2, alternating(DARTS_PRIMITIVES, 2, 3))
    assert {name: tuple(p.shape) for name, p in fewer.named_parameters()} == {
        "normal": (5, 3),
        "reduction": (5, 3),
    }


def test_the_darts_architecture_draws_what_it_always_drew():
    """The DARTS architecture draws what it drew before, and has no other parameters."""
    torch.manual_seed(5)
    arch = Architecture(2)
    torch.manual_seed(5)
    normal, reduction = 1e-3 * torch.randn(5, 8), 1e-3 * torch.randn(5, 8)
    assert torch.equal(arch.normal, normal) and torch.equal(arch.reduction, reduction)
    assert list(arch.state_dict()) == ["normal", "reduction"]


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


@pytest.mark.parametrize("kind", ["p-darts", "pc-darts"])
def test_skip_dropout_is_replayed_under_a_seed(kind):
    """Skip dropout is replayed under a seed, and changes nothing of the supernet."""
    supernet, arch = tiny(kind)
    before = copy.deepcopy(supernet.state_dict())
    images, weights = torch.randn(2, 1, 8, 8, dtype=torch.float64), arch()

    def logits(seed):
        torch.manual_seed(seed)
        return supernet(images, weights)

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))
    after = supernet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", ["p-darts", "pc-darts"])
def test_the_architectures_gradient_is_a_finite_difference(kind):
    """The gradient in the architecture is that of finite differences."""
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
def test_a_step_of_the_supernet_is_differentiated(kind):
    """`mlo` differentiates through a step of the supernet with the same dropout.

    The total gradient in α (and β) against plain autograd through one SGD step of W, with
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


def derivatives(network, arch, images, *, seed=7):
    """Features, gradients of a loss in weights and architecture, and the gradient of those
    gradients' size.
    """
    torch.manual_seed(seed)
    variables = {
        **dict(network.named_parameters()),
        **{f"arch.{n}": p for n, p in arch.named_parameters()},
    }
    variables = {name: p for name, p in variables.items() if not name.startswith("classifier")}
    features = network.features(images, arch())
    wanted = torch.linspace(-1.0, 1.0, features.numel(), dtype=features.dtype).view(features.shape)
    loss = ((features.contiguous() - wanted) ** 2).mean()
    gradient = torch.autograd.grad(
        loss, list(variables.values()), create_graph=True, allow_unused=True
    )
    size = sum((g**2).sum() for g in gradient if g is not None)
    second = torch.autograd.grad(size, list(variables.values()), allow_unused=True)

    def named(found):
        pairs = zip(variables.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in pairs}

    return features.detach(), named(gradient), named(second)


def assert_alike(supernet, reference, arch, images, tolerance):
    features, gradient, second = derivatives(supernet, arch, images)
    expected, expected_gradient, expected_second = derivatives(reference, arch, images)
    assert relative_error({"": features}, {"": expected}) < tolerance
    for ours, theirs in ((gradient, expected_gradient), (second, expected_second)):
        ours = split_by_edge(supernet, ours)
        assert ours.keys() == theirs.keys()
        assert relative_error(ours, theirs) < tolerance
        of_arch = {name for name in theirs if name.startswith("arch.")}
        assert (
            relative_error({n: ours[n] for n in of_arch}, {n: theirs[n] for n in of_arch})
            < tolerance
        )


@pytest.mark.parametrize("space", SPACES)
def test_derivatives_equal_those_of_the_reference(space):
    """First and second derivatives equal those of the reference."""
    supernet, reference, arch = pair(**SPACES[space])
    # At 12 pixels the last maps are 3×3.
    sizes = {"darts, odd halves": 12, "pc-darts, images of imagenet": 64, "instance norm": 16}
    size = sizes.get(space, 8)
    images = torch.randn(2, 2, size, size, dtype=torch.float64)
    assert_alike(supernet, reference, arch, images, 1e-12)
    assert sum(p.numel() for p in supernet.parameters()) == sum(
        p.numel() for p in reference.parameters()
    )


def test_single_precision_is_as_near_as_its_rounding():
    # With ReLU and max pooling a rounding can choose another branch; in a smooth supernet nothing
    # hides a mistake.
    smooth = {
        "style": OperationStyle(activation="silu"),
        "primitives": tuple(p for p in DARTS_PRIMITIVES if "max" not in p),
    }
    supernet, reference, arch = pair(torch.float32, channels=12, **smooth)
    assert_alike(supernet, reference, arch, torch.randn(4, 2, 8, 8), 1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_a_supernet_keeps_no_running_statistics(space):
    """Nothing but parameters is saved: it normalises by the batch, in evaluation too."""
    supernet, _, arch = pair(**SPACES[space])
    assert supernet.state_dict().keys() == dict(supernet.named_parameters()).keys()
    images = torch.randn(4, 2, 64, 64, dtype=torch.float64)
    trained = supernet(images, arch())
    assert torch.equal(supernet.eval()(images, arch()), trained)


@pytest.mark.parametrize("space", ["darts", "pc-darts", "p-darts, second stage"])
def test_settled_statistics_are_those_of_the_reference(space):
    """A supernet that is given running statistics evaluates by them as the reference does."""
    supernet, reference, arch = pair(**SPACES[space])
    give_statistics(supernet)
    images = torch.randn(4, 2, 16, 16, dtype=torch.float64)
    for network in (supernet, reference):
        recompute_statistics(network, [partial(network, images, arch())])
    others = torch.randn(4, 2, 16, 16, dtype=torch.float64)
    found = supernet.eval()(others, arch())
    assert torch.allclose(found, reference.eval()(others, arch()), rtol=1e-10)
    assert torch.allclose(found[:1], supernet(others[:1], arch()), rtol=1e-10)


def test_spectral_norm_divides_each_edges_own_weights():
    """The weights of each edge are divided by their own singular value."""
    supernet, reference, arch = pair(**SPACES["no norm"], nodes=1)
    for network in (supernet, reference):
        normalize_spectrally(network)
    convolutions = {
        f"{n}.weight": m for n, m in supernet.named_modules() if isinstance(m, torch.nn.Conv2d)
    }
    for layer in [
        *convolutions.values(),
        *(m for m in reference.modules() if isinstance(m, torch.nn.Conv2d)),
    ]:
        for _ in range(100):
            _ = layer.weight  # a power iteration
    split = split_by_edge(
        supernet.eval(), {name: layer.weight.detach() for name, layer in convolutions.items()}
    )
    values = [float(torch.linalg.matrix_norm(weight.flatten(1), 2)) for weight in split.values()]
    assert len(values) > 40 and values == pytest.approx([1.0] * len(values), abs=1e-3)
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    ours, theirs = supernet.features(images, arch()), reference.eval().features(images, arch())
    assert relative_error({"": ours.detach()}, {"": theirs.detach()}) < 1e-2


def test_weights_are_drawn_as_those_of_single_convolutions():
    torch.manual_seed(0)
    options = SMALL | {"channels": 16}
    ours = split_by_edge(supernet := Supernet(**options), dict(supernet.named_parameters()))
    for name, weight in ReferenceSupernet(**options).named_parameters():
        if weight.dim() == 4:
            assert float(ours[name].std()) == pytest.approx(float(weight.std()), rel=0.35)
            assert float(ours[name].abs().max()) == pytest.approx(
                float(weight.abs().max()), rel=0.2
            )


ONE_NODE = {
    "darts": {"nodes": 1, "channels": 12},
    "pc-darts": {"nodes": 1, "channels": 12, "partial_channels": 2},
    "p-darts": SPACES["p-darts, third stage"],
}


@pytest.mark.slow
@pytest.mark.parametrize("space", ONE_NODE)
def test_a_supernet_is_compiled_as_one_graph(space):
    """Without a break, with the same values and gradients."""
    supernet, _, arch = pair(**ONE_NODE[space])
    images, labels = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 3])
    found = []
    for network in (supernet, torch.compile(supernet, fullgraph=True, backend="aot_eager")):
        loss = F.cross_entropy(network(images, arch()), labels)
        variables = [*supernet.parameters(), *arch.parameters()]
        gradient = torch.autograd.grad(loss, variables)
        found.append(dict(enumerate((loss.detach(), *gradient))))
    assert relative_error(found[1], found[0]) < 1e-12


@pytest.mark.slow
def test_a_compiled_supernet_takes_a_gradient_of_some():
    """Of the architecture alone, as its update does."""
    supernet, _, arch = pair(**ONE_NODE["darts"])
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    compiled = torch.compile(supernet, fullgraph=True, backend="aot_eager")
    variables = list(arch.parameters())
    found, exact = (
        torch.autograd.grad(network(images, arch()).square().sum(), variables)
        for network in (compiled, supernet)
    )
    assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12
