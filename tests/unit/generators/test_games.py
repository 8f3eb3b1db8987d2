"""The games of the generators, and their hypergradients against plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from generator_cases import GRAY, make_discriminator, make_generator
from gradient_of_update import gradient_of_next_round
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lfmcw_app.generators import GAMES, hinge, non_saturating, wasserstein_gp
from mlo import MultilevelOptimizer, Problem
from mlo.testing import check_gradient_changes_nothing, evaluated, relative_error

LOSSES = {"non_saturating": non_saturating, "hinge": hinge, "wasserstein_gp": wasserstein_gp}


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


def leaves(module):
    """Copies of a module's parameters that require gradients."""
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def naive_gradient(optimizer, pair, arch, data, loss):
    """One simultaneous step of the players as plain formulas, then the upper loss differentiated in
    the architecture.
    """
    images, labels, classifier = data
    live, problem = dict(pair.named_parameters()), optimizer.problems["pair"]
    pair, arch = copy.deepcopy(pair), copy.deepcopy(arch)  # buffers move in the copies
    alpha = leaves(arch)
    mixing = functional_call(arch, alpha, ())
    before = {player: leaves(getattr(pair, player)) for player in LR}

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


@pytest.mark.parametrize("kind", GAME_KINDS)
def test_the_hypergradient_of_a_game_equals_plain_autograd(kind):
    """The hypergradient of a game equals plain autograd through one step."""
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
def test_taking_a_gradient_moves_no_buffer(kind):
    """Taking a gradient moves no singular vector, statistic or average."""
    optimizer, pair, *_ = make_game(kind)
    check_gradient_changes_nothing(optimizer, "arch")
    before = copy.deepcopy(dict(pair.named_buffers()))
    optimizer.gradient("arch")
    assert all(torch.equal(buffer, before[name]) for name, buffer in pair.named_buffers())


def test_buffers_move_once_per_update():
    """In a search the average and the singular vectors move once per update."""
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


def test_the_upper_problem_reads_the_live_generator():
    """The upper problem reads the live generator, not the average.

    The gradient is the same whatever the average holds.
    """
    optimizer, pair, *_ = make_game("biggan")
    optimizer.step()
    before = optimizer.gradient("arch")
    for buffer in pair.generator.average.buffers():
        buffer.zero_()
    assert relative_error(optimizer.gradient("arch"), before) == 0.0
