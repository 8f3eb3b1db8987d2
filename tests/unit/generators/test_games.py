"""The image generators, the discriminator's options, the adversarial losses, and their
hypergradients.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.generators import (
    GAMES,
    ConditionalBigGAN,
    ConditionalDCGAN,
    ConditionalWGANGP,
    Discriminator,
    ImageGenerator,
    gradient_penalty,
    hinge,
    non_saturating,
    wasserstein_gp,
)
from lfmcw_app.generators.average import MovingAverage
from lfmcw_app.generators.base import base_and_doublings
from lfmcw_app.generators.blocks import SelfAttention, initialize, normalize_spectrally
from lfmcw_app.search_space.operations import OperationStyle
from lfmcw_app.search_space.supernet import Architecture, Supernet
from mlo import MultilevelOptimizer, Problem
from mlo.testing import check_gradient_changes_nothing, evaluated, relative_error

GRAY = {"image_channels": 1, "mean": (0.5,), "std": (0.25,)}
COLOUR = {"image_channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
PAPER_OPTIONS = {
    "shared_dim": 3,
    "hierarchical": True,
    "noise_dim": 8,
    "initialization": "orthogonal",
}
OPTIONS = {
    "dcgan": (ConditionalDCGAN, {}),
    "wgan_gp": (ConditionalWGANGP, {}),
    "biggan": (ConditionalBigGAN, {}),
    "biggan-paper": (ConditionalBigGAN, {**PAPER_OPTIONS, "attention": 8}),
}
LOSSES = {"non_saturating": non_saturating, "hinge": hinge, "wasserstein_gp": wasserstein_gp}


def make_generator(kind, *, classes=4, size=8, **changes):
    cls, options = OPTIONS[kind]
    settings = {"noise_dim": 6, "channels": 2, **GRAY, **options, **changes}
    return cls(num_classes=classes, image_size=size, **settings)


def make_trunk(norm, *, activation="relu"):
    style = OperationStyle(norm=norm, activation=activation)
    primitives = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")
    trunk = Supernet(
        in_channels=1,
        num_classes=4,
        channels=4,
        layers=3,
        nodes=1,
        primitives=primitives,
        style=style,
    )
    return trunk, Architecture(1, primitives, scale=0.5)


def make_discriminator(norm="group", *, head="flatten", spectral_norm="none"):
    trunk, arch = make_trunk(norm)
    return Discriminator(
        trunk, num_classes=4, feature_size=2, head=head, spectral_norm=spectral_norm
    ), arch


def largest_singular_value(weight):
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))


# ------------------------------ images


@pytest.mark.parametrize("size", [8, 16, 28, 32])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_generator_draws_images_of_the_data_sets_size_in_its_range(kind, size):
    changes = {"noise_dim": 12, "attention": size} if kind == "biggan-paper" else {}
    generator = make_generator(kind, size=size, **COLOUR, **changes)
    images = generator.sample(torch.arange(4))
    assert images.shape == (4, 3, size, size)
    assert float(images.detach().abs().max()) <= 2.0  # (1 - mean) / std
    assert isinstance(generator, ImageGenerator)


@pytest.mark.parametrize("size", [64, 96, 224])
def test_biggan_grows_with_the_image(size):
    generator = make_generator("biggan", size=size, channels=1, **COLOUR)
    assert generator.sample(torch.arange(2)).shape == (2, 3, size, size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(8, (4, 1)), (28, (7, 2)), (32, (4, 3)), (96, (6, 4)), (224, (7, 5)), (36, (9, 2))],
)
def test_an_image_size_is_a_small_base_doubled(size, expected):
    assert base_and_doublings(size) == expected


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_image_depends_on_the_label_and_on_the_noise(kind):
    generator = make_generator(kind).double()
    noise = torch.randn(4, generator.noise_dim, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        images = generator(noise, labels)
        assert bool(
            (generator(noise, labels.roll(1)) - images).flatten(1).abs().amax(1).gt(1e-7).all()
        )
        assert bool(
            (generator(noise.roll(1, 0), labels) - images).flatten(1).abs().amax(1).gt(1e-7).all()
        )


def test_each_chunk_of_hierarchical_noise_reaches_the_image():
    generator = make_generator("biggan-paper", size=16, noise_dim=9, attention=None).double()
    noise = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(generator(noise, torch.arange(4)).square().sum(), noise)
    assert bool((grad.abs() > 0).any(0).all())


def test_the_noise_comes_from_the_global_random_state():
    generator = make_generator("biggan").eval()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generator.sample(torch.arange(4)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_parameter_counts_are_the_published_sizes():
    def count(cls, **settings):
        generator = cls(num_classes=10, image_size=32, **COLOUR, **settings)
        return sum(p.numel() for p in generator.parameters())

    assert count(ConditionalBigGAN) == 4_304_387  # the authors' CIFAR program: 4.30 M
    assert count(ConditionalBigGAN, channels=16) == 375_683
    assert count(ConditionalWGANGP) == 1_218_307


def test_attention_is_the_identity_at_first_and_reads_every_position():
    attention = SelfAttention(8).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(attention(x), x)
    nn.init.ones_(attention.gamma)
    (grad,) = torch.autograd.grad(attention(x)[0, :, 0, 0].sum(), x)
    assert bool(
        (grad[0].abs().sum(0) > 0).flatten().sum() >= 4
    )  # one position of each 2×2 patch at the least
    assert not grad[1].any()


def test_attention_has_a_second_derivative():
    attention = SelfAttention(4).double()
    nn.init.ones_(attention.gamma)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(attention, (x,))


def test_orthogonal_weights_have_singular_values_of_one():
    layer = nn.Conv2d(4, 6, 3)
    initialize(layer, "orthogonal")
    assert torch.allclose(
        torch.linalg.svdvals(layer.weight.detach().flatten(1)), torch.ones(6), atol=1e-5
    )
    initialize(layer, "normal")
    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


# ------------------------------ spectral norm


def test_spectral_norm_bounds_the_largest_singular_value_while_the_weights_move():
    generator = make_generator("biggan", size=16)
    layers = [m for m in generator.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for _ in range(30):
            for p in generator.parameters():
                p.add_(0.01 * torch.randn_like(p))
            generator.sample(torch.arange(4))
        for p in generator.parameters():
            p.mul_(7.0)
        for _ in range(60):
            generator.sample(torch.arange(4))
    generator.eval()
    assert len(layers) == 1 + 3 * 2 + 1  # linear, three convolutions a block, the last
    assert all(
        largest_singular_value(layer.weight) == pytest.approx(1.0, abs=0.02) for layer in layers
    )


def test_spectral_norm_of_a_known_matrix():
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data.copy_(torch.diag(torch.tensor([5.0, 2.0, 1.0])))
    normalize_spectrally(layer)
    layer(torch.eye(3))
    assert torch.allclose(layer.weight, torch.diag(torch.tensor([1.0, 0.4, 0.2])), atol=1e-4)


def test_the_spectral_discriminator_divides_head_and_trunk():
    discriminator, arch = make_discriminator("none", head="sum", spectral_norm="all")
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for _ in range(40):
        discriminator(images, labels, arch())
    discriminator.eval()
    layers = [
        m for m in discriminator.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))
    ]
    assert len(layers) > 5
    assert all(
        largest_singular_value(layer.weight) == pytest.approx(1.0, abs=0.03) for layer in layers
    )


def test_the_discriminators_own_weights_are_what_they_were_without_spectral_norm():
    discriminator, _ = make_discriminator()
    names = [name for name, _ in discriminator.named_parameters() if not name.startswith("trunk.")]
    assert names == ["score.weight", "score.bias", "embedding.weight"]
    assert list(discriminator.state_dict()) == [
        name for name, _ in discriminator.named_parameters()
    ]


# ------------------------------ moving average


def test_the_average_is_the_weights_themselves_until_it_starts_and_moves_by_a_share_after():
    average = MovingAverage({"a.b": torch.zeros(2)}, decay=0.9, start=2)
    for value, expected in ((1.0, 1.0), (2.0, 2.0), (3.0, 0.9 * 2.0 + 0.1 * 3.0)):
        average.update({"a.b": torch.full((2,), value)})
        assert torch.allclose(average.tensors()["a.b"], torch.full((2,), expected))


def test_several_calls_with_the_same_weights_are_one_update_of_the_average():
    once, parts = (
        MovingAverage({"a": torch.zeros(2, dtype=torch.float64)}, decay=0.9, start=1)
        for _ in range(2)
    )
    for value in (1.0, 2.0, 4.0):
        tensors = {"a": torch.full((2,), value, dtype=torch.float64)}
        once.update(tensors)
        for _ in range(4):
            parts.update(tensors, parts=4)
    assert torch.allclose(parts.tensors()["a"], once.tensors()["a"], rtol=1e-12)
    assert not torch.allclose(once.tensors()["a"], tensors["a"])


def test_biggan_shows_images_of_the_averaged_weights_and_samples_with_the_live_ones():
    generator = make_generator("biggan", average_decay=0.5, average_start=1).eval()
    generator.track()
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(0.3 * torch.randn_like(p))

    def draw(method):
        torch.manual_seed(0)
        return method(torch.arange(4))

    live = draw(generator.sample)
    before = draw(generator.show)
    assert not torch.allclose(live, before)
    assert not before.requires_grad
    generator.track()  # half way
    halfway = draw(generator.show)
    assert not torch.allclose(halfway, before)
    assert torch.equal(draw(generator.sample), live)
    twin = make_generator("biggan", average_decay=0.5, average_start=1).eval()
    twin.load_state_dict(copy.deepcopy(generator.state_dict()))
    assert torch.equal(draw(twin.show), halfway)
    assert int(twin.average.updates) == 2


def test_showing_images_changes_no_buffer_even_in_training_mode():
    generator = make_generator("biggan")
    before = copy.deepcopy(generator.state_dict())
    generator.show(torch.arange(4))
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_the_average_has_no_parameters():
    generator = make_generator("biggan")
    assert not any(name.startswith("average") for name, _ in generator.named_parameters())


# ------------------------------ losses


class LinearCritic(nn.Module):
    """D(x) = ⟨w, x⟩, whose slope is w everywhere."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 8, 8), slope / 8.0, dtype=torch.float64))

    def forward(self, images, labels, mixing):
        return (images * self.slope).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("slope", [0.0, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic_is_the_square_of_its_slope_minus_one(slope):
    critic = LinearCritic(slope)
    real, generated = (torch.randn(5, 1, 8, 8, dtype=torch.float64) for _ in range(2))
    penalty = gradient_penalty(lambda x: critic(x, None, None), real, generated)
    assert float(penalty.detach()) == pytest.approx((slope - 1.0) ** 2)
    (grad,) = torch.autograd.grad(penalty, critic.slope)
    # d (‖w‖ - 1)² / dw = 2 (‖w‖ - 1) w / ‖w‖, and w / ‖w‖ is 1/8 in every entry; at w = 0 nothing
    # is asked for.
    expected = 2.0 * (slope - 1.0) / 8.0 if slope else 0.0
    assert torch.allclose(grad, torch.full_like(grad, expected))


def test_the_penalty_is_taken_between_each_real_image_and_its_generated_one():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    gradient_penalty(critic, torch.zeros(200, 1, 2, 2), torch.ones(200, 1, 2, 2))
    assert bool(
        (seen[0].flatten(1).amax(1) == seen[0].flatten(1).amin(1)).all()
    )  # one share an image
    assert 0.0 <= float(seen[0].min()) < 0.1
    assert 0.9 < float(seen[0].max()) <= 1.0


def test_the_penalty_is_differentiable_in_the_generated_images():
    """Engines for games need the derivative of the critic's gradient in the generator's weights."""
    real, generated = (
        torch.randn(3, 1, 2, 2, dtype=torch.float64),
        torch.randn(3, 1, 2, 2, dtype=torch.float64),
    )
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1)).double()

    def penalty(x):
        torch.manual_seed(0)
        return gradient_penalty(lambda between: critic(between).squeeze(1), real, x)

    assert torch.autograd.gradcheck(penalty, (generated.requires_grad_(),))
    assert torch.autograd.gradgradcheck(penalty, (generated,))


class ScoresOf(nn.Module):
    """A discriminator with given scores of the images `real`, and of all others."""

    def __init__(self, images, real, fake):
        super().__init__()
        self.images, self.real, self.fake = images, real, fake

    def forward(self, images, labels, mixing):
        return self.real if images is self.images else self.fake


def test_the_losses_are_their_formulas():
    real, fake, images, labels = (
        [0.5, -2.0],
        [0.25, 3.0],
        torch.randn(2, 1, 8, 8),
        torch.tensor([0, 1]),
    )

    def players(loss):
        critic = ScoresOf(images, torch.tensor(real), torch.tensor(fake))
        losses, metrics = evaluated(*loss(critic, make_generator("dcgan"), images, labels, None))
        assert float(metrics["real_score"]) == pytest.approx(sum(real) / 2)
        assert float(metrics["fake_score"]) == pytest.approx(sum(fake) / 2)
        return {player: float(value) for player, value in losses.items()}

    def log1pexp(x):
        return math.log1p(math.exp(x))

    assert players(hinge) == pytest.approx(
        {"generator": -3.25 / 2, "discriminator": (0.5 + 3.0) / 2 + (1.25 + 4.0) / 2}
    )
    assert players(non_saturating) == pytest.approx(
        {
            "generator": sum(log1pexp(-s) for s in fake) / 2,
            "discriminator": sum(log1pexp(-s) for s in real) / 2
            + sum(log1pexp(s) for s in fake) / 2,
        }
    )


def test_the_wasserstein_loss_weighs_the_penalty_by_ten():
    critic, generator = LinearCritic(3.0), make_generator("wgan_gp").double()
    images, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    losses, metrics = evaluated(*wasserstein_gp(critic, generator, images, labels, None))
    assert float(metrics["gradient_penalty"].detach()) == pytest.approx(4.0)
    distance = float((metrics["real_score"] - metrics["fake_score"]).detach())
    assert float(losses["discriminator"].detach()) == pytest.approx(40.0 - distance)
    assert float(losses["generator"].detach()) == pytest.approx(
        -float(metrics["fake_score"].detach())
    )


@pytest.mark.parametrize("game", GAMES.values(), ids=GAMES)
def test_every_game_is_made_of_parts_that_fit(game):
    generator = game.generator(num_classes=4, image_size=8, noise_dim=6, channels=2, **GRAY)
    discriminator, arch = make_discriminator(
        game.trunk_norms[0], head=game.head, spectral_norm=game.spectral_norm
    )
    losses, _ = evaluated(
        *game.loss(discriminator, generator, torch.randn(4, 1, 8, 8), torch.arange(4), arch())
    )
    for player, module in (("generator", generator), ("discriminator", discriminator)):
        grads = torch.autograd.grad(
            losses[player], list(module.parameters()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and bool(g.any()) for g in grads), player


# ------------------------------ what does not fit is refused


@pytest.mark.parametrize("kind", ["wgan_gp", "biggan"])
@pytest.mark.parametrize("size", [9, 68])
def test_an_image_size_that_doubling_does_not_reach_is_refused(kind, size):
    with pytest.raises(InputError, match=f"images of {size}×{size}"):
        make_generator(kind, size=size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hierarchical": True}, "shared_dim is 0"),
        ({"hierarchical": True, "shared_dim": 3, "noise_dim": 7}, "multiple of 2"),
        ({"attention": 4}, "attention=4; .* there are 8"),
        ({"size": 1024}, "at most 7 times"),
    ],
)
def test_biggan_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_generator("biggan", **settings)


def test_a_critic_with_batch_norm_is_refused():
    discriminator, arch = make_discriminator("batch")
    with pytest.raises(InputError, match="each single image"):
        wasserstein_gp(
            discriminator,
            make_generator("wgan_gp"),
            torch.randn(4, 1, 8, 8),
            torch.arange(4),
            arch(),
        )


@pytest.mark.parametrize(
    ("norm", "spectral_norm", "message"),
    [
        ("batch", "head", "BatchNorm"),
        ("batch", "all", "BatchNorm"),
        ("group", "all", "cancels the scale"),
    ],
)
def test_spectral_norm_that_a_norm_undoes_is_refused(norm, spectral_norm, message):
    with pytest.raises(InputError, match=message):
        make_discriminator(norm, spectral_norm=spectral_norm)


# ------------------------------ hypergradients, against plain autograd


class Pair(nn.Module):
    def __init__(self, generator, discriminator):
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator


LR = {"generator": 0.3, "discriminator": 0.2}
MOMENTUM = 0.5
GAME_KINDS = {
    "dcgan": ("dcgan", {}, "group", {}, "non_saturating"),
    "wgan_gp-group": ("wgan_gp", {}, "group", {}, "wasserstein_gp"),
    "wgan_gp-none": ("wgan_gp", {}, "none", {"head": "sum"}, "wasserstein_gp"),
    "biggan": ("biggan", {}, "none", {"head": "sum", "spectral_norm": "all"}, "hinge"),
    "biggan-paper": (
        "biggan-paper",
        {},
        "group",
        {"head": "sum", "spectral_norm": "head"},
        "hinge",
    ),
    "biggan-wgan_gp": ("biggan", {}, "none", {"spectral_norm": "all"}, "wasserstein_gp"),
}


def make_game(kind):
    """A game as the lower problem of an architecture, whose loss reads both players."""
    torch.manual_seed(5)
    name, changes, norm, how, loss = GAME_KINDS[kind]
    discriminator, arch = make_discriminator(norm, **how)
    pair = Pair(make_generator(name, **changes), discriminator).double()
    for p in pair.parameters():
        if p.ndim == 0:
            nn.init.ones_(p)  # attention's γ: at 0 its convolutions have no gradient
    arch.double()
    images, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 3, 1])
    classifier = torch.randn(64, 4, dtype=torch.float64)

    def game_loss(pair, batch, *, arch):
        return LOSSES[loss](pair.discriminator, pair.generator, *batch, arch())

    def upper_loss(arch, batch, *, pair):
        images, labels = batch
        samples = pair.generator.sample(labels)
        return upper_value(samples, pair.discriminator(images, labels, arch()), classifier, labels)

    problems = [
        Problem(
            "pair",
            module=pair,
            players={player: player for player in LR},
            optimizer={
                player: torch.optim.SGD(
                    getattr(pair, player).parameters(), lr=lr, momentum=MOMENTUM
                )
                for player, lr in LR.items()
            },
            loss=game_loss,
            data=[(images, labels)],
        ),
        Problem(
            "arch",
            module=arch,
            optimizer=torch.optim.SGD(arch.parameters(), lr=0.1),
            loss=upper_loss,
            data=[(images, labels)],
        ),
    ]
    optimizer = MultilevelOptimizer(problems, hypergradient="one_step")
    return optimizer, pair, arch, (images, labels, classifier), loss


def upper_value(samples, scores, classifier, labels):
    return F.cross_entropy(samples.flatten(1) @ classifier, labels) + 0.1 * scores.square().mean()


def naive_losses(kind, real, fake, critic, images, generated):
    """The formulas of the papers, written out."""
    if kind == "non_saturating":
        return -torch.sigmoid(fake).log().mean(), -(
            torch.sigmoid(real).log() + (1 - torch.sigmoid(fake)).log()
        ).mean()
    if kind == "hinge":
        return -fake.mean(), ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)).mean()
    share = torch.rand(len(images), 1, 1, 1, dtype=images.dtype)
    points = [
        (e * x + (1 - e) * y).unsqueeze(0) for e, x, y in zip(share, images, generated, strict=True)
    ]
    between = torch.cat(points)
    slopes = torch.autograd.grad(critic(between).sum(), between, create_graph=True)[0]
    norms = torch.stack([torch.sqrt((slope**2).sum()) for slope in slopes])
    return -fake.mean(), fake.mean() - real.mean() + 10.0 * ((norms - 1) ** 2).mean()


def naive_gradient(optimizer, pair, arch, data, loss):
    """One simultaneous step of the players as plain formulas, then the upper loss differentiated in
    the architecture.
    """
    images, labels, classifier = data
    live, problem = dict(pair.named_parameters()), optimizer.problems["pair"]
    pair, arch = copy.deepcopy(pair), copy.deepcopy(arch)  # buffers move in the copies
    alpha = {name: p.detach().clone().requires_grad_() for name, p in arch.named_parameters()}
    mixing = functional_call(arch, alpha, ())
    before = {
        player: {
            name: p.detach().clone().requires_grad_()
            for name, p in getattr(pair, player).named_parameters()
        }
        for player in LR
    }

    def scores(x, parameters):
        return functional_call(pair.discriminator, parameters, (x, labels, mixing))

    def samples(parameters):
        noise = torch.randn(len(labels), pair.generator.noise_dim, dtype=torch.float64)
        return functional_call(pair.generator, parameters, (noise, labels))

    with torch.random.fork_rng():
        generated = samples(before["generator"])
        fake = scores(generated, before["discriminator"])
        real = scores(images, before["discriminator"])
        values = naive_losses(
            loss, real, fake, lambda x: scores(x, before["discriminator"]), images, generated
        )
        after = {}
        for player, value in zip(LR, values, strict=True):
            own = before[player]
            grads = torch.autograd.grad(
                value, list(own.values()), create_graph=True, allow_unused=True
            )
            after[player] = {}
            for (name, p), g in zip(own.items(), grads, strict=True):
                state = problem.optimizers[player].state[live[f"{player}.{name}"]]
                buffer = state.get("momentum_buffer")
                move = torch.zeros_like(p) if g is None else g
                move = move if buffer is None else MOMENTUM * buffer.clone() + move
                after[player][name] = p - LR[player] * move
        value = upper_value(
            samples(after["generator"]), scores(images, after["discriminator"]), classifier, labels
        )
        return dict(zip(alpha, torch.autograd.grad(value, list(alpha.values())), strict=True))


def gradient_of_next_round(optimizer):
    caught = {}
    arch = optimizer.problems["arch"]

    def catch(*_):
        caught.update({name: p.grad.clone() for name, p in arch.parameters.items()})

    handle = arch.optimizers[""].register_step_pre_hook(catch)
    optimizer.step()
    handle.remove()
    return caught


@pytest.mark.parametrize("kind", GAME_KINDS)
def test_the_hypergradient_of_a_game_equals_plain_autograd_through_one_step(kind):
    optimizer, *parts = make_game(kind)
    for _ in range(3):  # with momentum, moved singular vectors and statistics in the later rounds
        expected = naive_gradient(optimizer, *parts)
        assert relative_error(gradient_of_next_round(optimizer), expected) < 1e-8


@pytest.mark.parametrize("kind", GAME_KINDS)
def test_the_step_of_the_players_is_part_of_the_gradient(kind):
    """Otherwise the test above would compare direct gradients."""
    optimizer, *_ = make_game(kind)
    full = optimizer.gradient("arch")
    other = MultilevelOptimizer(list(optimizer.problems.values()), hypergradient="first_order")
    assert relative_error(other.gradient("arch"), full) > 1e-4


@pytest.mark.parametrize("kind", ["wgan_gp-none", "biggan"])
def test_taking_a_gradient_moves_no_singular_vector_statistic_or_average(kind):
    optimizer, pair, *_ = make_game(kind)
    check_gradient_changes_nothing(optimizer, "arch")
    before = copy.deepcopy(dict(pair.named_buffers()))
    optimizer.gradient("arch")
    assert all(torch.equal(buffer, before[name]) for name, buffer in pair.named_buffers())


def test_in_a_search_the_average_and_the_singular_vectors_move_once_an_update():
    optimizer, pair, *_ = make_game("biggan")
    once = copy.deepcopy(pair.generator)
    once.sample(torch.arange(4))
    # the game runs the generator once; the upper loss and the hypergradient run it on copies
    optimizer.step()
    vectors = {
        name: b
        for name, b in once.named_buffers()
        if name.endswith(("_u", "_v", "num_batches_tracked"))
    }
    assert len(vectors) > 10
    moved = dict(pair.generator.named_buffers())
    assert all(torch.allclose(moved[name], buffer) for name, buffer in vectors.items())
    optimizer.step()
    assert int(pair.generator.average.updates) == 2


def test_the_upper_problem_reads_the_live_generator_not_the_average():
    """The gradient is the same whatever the average holds."""
    optimizer, pair, *_ = make_game("biggan")
    optimizer.step()
    before = optimizer.gradient("arch")
    for buffer in pair.generator.average.buffers():
        buffer.zero_()
    assert relative_error(optimizer.gradient("arch"), before) == 0.0
