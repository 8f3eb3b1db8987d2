"""The supernet computes what the module-per-edge formulation does: values, gradients, second
derivatives.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from reference_supernet import ReferenceSupernet, split_by_edge
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lfmcw_app.generators.blocks import normalize_spectrally
from lfmcw_app.search_space import depthwise as depthwise_module
from lfmcw_app.search_space.candidates import Candidates
from lfmcw_app.search_space.cell import edge_count
from lfmcw_app.search_space.depthwise import depthwise
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle
from lfmcw_app.search_space.pointwise import DENSE_CHANNELS, PointwiseConv, grouped_linear
from lfmcw_app.search_space.supernet import Architecture, Supernet
from lfmcw_app.search_space.weighted_sum import weighted_sum
from mlo.testing import relative_error

SMALL = {"in_channels": 2, "num_classes": 4, "channels": 4, "layers": 3, "nodes": 2}


def windows(count):
    """Candidates that differ from edge to edge, as in the later stages of P-DARTS."""
    ring = itertools.cycle(PRIMITIVES)
    edges = tuple(tuple(itertools.islice(ring, count)) for _ in range(edge_count(2)))
    return Candidates(normal=edges, reduction=edges[::-1])


SPACES = {
    "darts": {},
    "darts, four nodes of 12 channels": {"channels": 12, "nodes": 4},
    "darts, odd halves": {"channels": 5},
    "p-darts, second stage": {"primitives": windows(5)},
    "p-darts, third stage": {"primitives": windows(3)},
    "pc-darts": {"partial_channels": 2},
    "pc-darts, images of imagenet": {"partial_channels": 4, "channels": 8, "stem": "imagenet"},
    "instance norm": {"style": OperationStyle(norm="instance")},
    "group norm": {"style": OperationStyle(norm="group")},
    "no norm": {"style": OperationStyle(norm="none")},
    "silu": {"style": OperationStyle(activation="silu")},
}


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def pair(dtype=torch.float64, **options):
    """A supernet, the reference with the same weights, and an architecture away from its start."""
    torch.manual_seed(0)
    options = SMALL | options
    supernet = Supernet(**options).to(dtype)
    reference = ReferenceSupernet(**options).to(dtype)
    reference.load_state_dict(split_by_edge(supernet, tensors(supernet)))
    edge_weights = options.get("partial_channels", 1) > 1
    arch = Architecture(
        options["nodes"],
        options.get("primitives", PRIMITIVES),
        scale=0.5,
        edge_weights=edge_weights,
    )
    return supernet, reference, arch.to(dtype)


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
def test_first_and_second_derivatives_equal_those_of_the_reference(space):
    supernet, reference, arch = pair(**SPACES[space])
    size = {"darts, odd halves": 12, "pc-darts, images of imagenet": 64, "instance norm": 16}.get(
        space, 8
    )  # 12: the last maps are 3×3
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
        "primitives": tuple(p for p in PRIMITIVES if "max" not in p),
    }
    supernet, reference, arch = pair(torch.float32, channels=12, **smooth)
    assert_alike(supernet, reference, arch, torch.randn(4, 2, 8, 8), 1e-5)


@pytest.mark.parametrize("space", ["darts", "pc-darts", "p-darts, second stage"])
def test_running_statistics_are_those_of_the_reference_and_are_used_in_evaluation(space):
    supernet, reference, arch = pair(**SPACES[space])
    for _ in range(2):
        images = torch.randn(4, 2, 16, 16, dtype=torch.float64)
        supernet(images, arch()), reference(images, arch())
    ours, theirs = (
        split_by_edge(supernet, dict(supernet.named_buffers())),
        dict(reference.named_buffers()),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-10, atol=1e-14) for name in theirs)
    assert torch.allclose(
        supernet.eval()(images, arch()), reference.eval()(images, arch()), rtol=1e-10
    )


def test_spectral_norm_divides_the_weights_of_each_edge_by_their_own_singular_value():
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


@pytest.mark.parametrize("space", ["darts", "no norm", "p-darts, second stage"])
def test_checkpointing_changes_no_gradient_and_moves_buffers_once(space):
    """With BatchNorm, spectral norm (whose vectors move between two passes) and dropout, to second
    order.
    """
    supernet, _, arch = pair(**SPACES[space])
    if space == "no norm":
        normalize_spectrally(supernet)
    supernet.skip_drop_probability = 0.3
    images = torch.randn(2, 2, 2, 8, 8, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        network = copy.deepcopy(supernet)
        network.checkpointing = checkpointing
        torch.manual_seed(3)
        variables = [p for p in network.parameters() if p is not network.classifier.weight] + list(
            arch.parameters()
        )
        out = (
            network.features(images[0], arch()).square().mean()
            + network.features(images[1], arch()).sin().mean()
        )
        first = torch.autograd.grad(out, variables, create_graph=True, allow_unused=True)
        size = sum(g.square().sum() for g in first if g is not None)
        second = torch.autograd.grad(size, variables, allow_unused=True)
        tensors_found = [out, *(g for g in (*first, *second) if g is not None), *network.buffers()]
        results.append({str(k): tensor.detach().double() for k, tensor in enumerate(tensors_found)})
    assert relative_error(results[1], results[0]) < 1e-13


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


# ------------------------------ the functions that it is made of


def nested(function, inputs):
    """Values, and three gradients of one another."""
    out = function(*inputs)
    found = [out]
    scalar = out.sin().sum()
    for _ in range(3):
        gradients = torch.autograd.grad(scalar, inputs, create_graph=True)
        found += gradients
        scalar = sum((g**3).sum() for g in gradients)
    return {str(k): tensor.detach() for k, tensor in enumerate(found)}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_depthwise_convolution_has_pytorchs_derivatives_of_every_order(
    kernel, stride, dilation, size, large, monkeypatch
):
    if large:  # which takes other ways
        monkeypatch.setattr(depthwise_module, "LARGE", 0)
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    inputs = (
        x.requires_grad_(),
        torch.randn(3, 1, kernel, kernel, dtype=torch.float64, requires_grad=True),
    )
    padding = dilation * (kernel // 2)
    expected = nested(lambda x, w: F.conv2d(x, w, None, stride, padding, dilation, 3), inputs)

    def ours(x, w):
        return depthwise(x, w, stride=stride, dilation=dilation)

    assert relative_error(nested(ours, inputs), expected) < 1e-12
    for wanted in (inputs, inputs[:1], inputs[1:]):  # where no graph of the gradient is wanted
        found = torch.autograd.grad(ours(*inputs).sin().sum(), wanted)
        exact = torch.autograd.grad(
            F.conv2d(*inputs, None, stride, padding, dilation, 3).sin().sum(), wanted
        )
        assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_pointwise_convolution_in_groups_has_pytorchs_derivatives(groups, channels, stride):
    assert 4 * 3 <= DENSE_CHANNELS < 4 * 20  # both ways are taken
    torch.manual_seed(0)
    layer = PointwiseConv(channels, 6, groups=groups, stride=stride).double()
    x = torch.randn(2, groups * channels, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = nested(lambda x, w: F.conv2d(x, w, None, stride, groups=groups), (x, layer.weight))
    assert relative_error(nested(lambda x, w: layer(x), (x, layer.weight)), expected) < 1e-12


def test_a_product_in_groups_may_change_the_width():
    x = torch.randn(5, 2, 30, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 30, dtype=torch.float64, requires_grad=True)
    expected = nested(lambda x, w: torch.einsum("pgi,goi->pgo", x, w), (x, weight))
    assert relative_error(nested(grouped_linear, (x, weight)), expected) < 1e-12


@pytest.mark.parametrize(("plain", "weighted"), [(0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (3, 0)])
def test_a_weighted_sum_is_the_sum(plain, weighted):
    torch.manual_seed(0)
    weights = torch.randn(weighted, dtype=torch.float64, requires_grad=True)
    maps = tuple(
        torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(plain + weighted)
    )
    inputs = (weights, *maps) if weighted else maps

    def ours(*_):
        return weighted_sum(maps[:plain], weights, maps[plain:])

    def theirs(*_):
        return sum(maps[:plain]) + sum(
            w * m for w, m in zip(weights.unbind(), maps[plain:], strict=True)
        )

    assert relative_error(nested(ours, inputs), nested(theirs, inputs)) < 1e-12
    for count in range(1, len(inputs)):
        for some in itertools.combinations(inputs, count):
            found, exact = (
                torch.autograd.grad(function().sin().sum(), some) for function in (ours, theirs)
            )
            assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12
            # Of the gradient in all inputs, differentiated in some of them.
            found, exact = (
                torch.autograd.grad(
                    sum(
                        (g**3).sum()
                        for g in torch.autograd.grad(
                            function().sin().sum(), inputs, create_graph=True
                        )
                    ),
                    some,
                )
                for function in (ours, theirs)
            )
            assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **kwargs or {})


def operators_of_gradient(out, inputs, *, create_graph):
    with Operators() as found:
        torch.autograd.grad(out.sum(), inputs, create_graph=create_graph)
    return found.names


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_are_not_asked_for_are_not_computed(create_graph, monkeypatch):
    """A generator's loss is differentiated through a discriminator whose weights require gradients,
    but not theirs.
    """
    monkeypatch.setattr(depthwise_module, "LARGE", 0)
    x = torch.randn(2, 40, 6, 6).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.nn.Parameter(torch.randn(40, 1, 5, 5))
    # The gradient in x is a convolution itself, the one in the weight is made of PyTorch's own
    # gradients.
    named = operators_of_gradient(
        depthwise(x.sin(), weight), (x, weight), create_graph=create_graph
    )
    assert {"convolution", "convolution_backward"} <= set(named)
    alone = operators_of_gradient(depthwise(x.sin(), weight), x, create_graph=create_graph)
    assert "convolution" in alone and "convolution_backward" not in alone
    alone = operators_of_gradient(depthwise(x.sin(), weight), weight, create_graph=create_graph)
    assert "convolution" not in alone and "convolution_backward" in alone

    pointwise = PointwiseConv(20, 20, groups=2)
    both, of_x, of_weight = (
        operators_of_gradient(pointwise(x.sin()), inputs, create_graph=create_graph).count("bmm")
        for inputs in ((x, pointwise.weight), x, pointwise.weight)
    )
    assert (both, of_x, of_weight) == (2, 1, 1)

    scalars = torch.randn(2, requires_grad=True)

    def mixed():
        return weighted_sum([], scalars.sin(), [x.sin(), x.cos()])

    assert "dot" in operators_of_gradient(mixed(), (x, scalars), create_graph=create_graph)
    assert "dot" not in operators_of_gradient(mixed(), x, create_graph=create_graph)


def test_an_empty_sum_is_refused():
    with pytest.raises(ValueError, match="needs a term"):
        weighted_sum([])


def test_the_sum_leaves_its_terms_alone():
    terms = [torch.ones(1, 1, 2, 2) for _ in range(3)]
    before = copy.deepcopy(terms)
    weighted_sum(terms[:1], torch.tensor([2.0, 3.0]), terms[1:])
    weighted_sum(terms)
    assert all(torch.equal(a, b) for a, b in zip(terms, before, strict=True))
