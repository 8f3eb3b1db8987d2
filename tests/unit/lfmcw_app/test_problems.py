"""The problems of a search: losses, batches, and the options that change them."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.problems import build_search, learning_rate_schedule, make_gan_loss, make_w2_loss
from lfmcw_app.recipe import WeightOptimizer
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.testing import noise_dataset
from mlo.testing import evaluated, relative_error


def gan_parts():
    torch.manual_seed(0)
    modules = build_modules(load_recipe("smoke").search, load_dataset("digits"))
    return modules, (torch.randn(8, 1, 8, 8), torch.arange(8))


def test_each_player_goes_down_its_own_loss():
    modules, batch = gan_parts()
    losses, _ = evaluated(*make_gan_loss("dcgan")(modules.gan, batch, arch=modules.arch))
    fake_up = torch.autograd.grad(
        losses["generator"], list(modules.gan.generator.parameters()), retain_graph=True
    )
    assert any(bool(g.abs().sum() > 0) for g in fake_up)
    before = {name: float(loss.detach()) for name, loss in losses.items()}
    for player in ("generator", "discriminator"):
        modules, batch = gan_parts()
        torch.manual_seed(1)
        losses, _ = evaluated(*make_gan_loss("dcgan")(modules.gan, batch, arch=modules.arch))
        params = list(getattr(modules.gan, player).parameters())
        grads = torch.autograd.grad(losses[player], params, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                if g is not None:
                    p -= 1e-2 * g
        torch.manual_seed(1)
        after, _ = evaluated(*make_gan_loss("dcgan")(modules.gan, batch, arch=modules.arch))
        assert float(after[player]) < float(losses[player])
    assert set(before) == {"generator", "discriminator"}


TINY = {
    "search.channels": 4,
    "search.nodes": 1,
    "search.steps": 4,
    "search.batch_size": 8,
    "search.generator.channels": 2,
    "search.generator.noise_dim": 4,
    "seed": 3,
}


def search(**changes):
    recipe = load_recipe(
        "smoke", overrides=TINY | {f"search.{key}": value for key, value in changes.items()}
    )
    dataset = load_dataset("digits")
    train, validation = search_split(dataset, 120, recipe.seed)
    torch.manual_seed(0)
    modules = build_modules(recipe.search, dataset)
    return recipe, modules, build_search(recipe, dataset, train, validation, modules)


@functools.cache
def plain_round():
    """What a round of the recipe as it is records."""
    return search()[2].step()


def first_validation_batches(optimizer):
    """The first validation batches of w2 and of arch."""
    w2, arch = (next(iter(optimizer.problems[name].data)) for name in ("w2", "arch"))
    return w2[2:], arch


def test_uniform_class_weights_are_as_strong_together():
    """Uniform class weights are as strong together, and differ in nothing else.

    The control of the method: each class weighs the mean class loss, which still depends on W1.
    """
    _, modules, optimizer = search()
    batch = next(iter(optimizer.problems["w2"].data))
    found = {}
    for weighting in ("losses", "uniform"):
        how = load_recipe("smoke", overrides=TINY | {"search.class_weighting": weighting}).search
        torch.manual_seed(1)
        loss, metrics = make_w2_loss(how)(
            modules.w2, batch, arch=modules.arch, w1=modules.w1, gan=modules.gan
        )
        found[weighting] = metrics["class_weights"]
        assert any(
            g is not None
            for g in torch.autograd.grad(loss, list(modules.w1.parameters()), allow_unused=True)
        )
    assert float(found["losses"].std()) > 0.01
    assert float(found["uniform"].std()) < 1e-6
    assert float(found["uniform"].mean()) == pytest.approx(float(found["losses"].mean()), rel=1e-5)


def steps_of(optimizer):
    """The numbers of steps that its parameters have made."""
    return {int(state["step"]) for state in optimizer.state.values()}


def test_the_discriminator_can_move_several_times():
    """The discriminator can move several times for each move of the generator."""
    options = {
        "generator.name": "biggan",
        "generator.noise_dim": 8,
        "generator.discriminator_steps": 3,
    }
    _, modules, optimizer = search(**options)
    players = optimizer.problems["gan"].optimizers
    list(optimizer.run(2))
    assert steps_of(players["generator"]) == {2}
    assert steps_of(players["discriminator"]) == {6}
    assert optimizer.problems["gan"].data.position == 6
    assert optimizer.problems["w1"].data.position == 2
    assert int(modules.gan.generator.average.updates) == 6
    assert modules.gan.generator.evaluations_per_update == 3


def test_class_weights_are_measured_on_the_architectures_batch():
    """Class weights are measured on the batch of the architecture by default."""
    ours, architectures = first_validation_batches(search()[2])
    assert torch.equal(ours[0], architectures[0])


def test_class_weights_can_have_a_validation_batch_of_their_own():
    ours, architectures = first_validation_batches(search(validation_batch="independent")[2])
    assert ours[0].shape == architectures[0].shape
    assert not torch.equal(ours[0], architectures[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"class_weighting": "uniform"},
        {"absent_class": "batch_mean"},
        {"validation_batch": "matched"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_each_option_acts_on_w2(changes):
    """Each option changes the search, and only from where it acts.

    W1 and the game move as before in the first round, W2 does not.
    """
    plain, other = plain_round(), search(**changes)[2].step()
    assert plain.losses["w1"] == other.losses["w1"]
    assert plain.losses["gan"] == other.losses["gan"]
    assert plain.losses["w2"] != other.losses["w2"]


def test_the_gradient_of_the_architecture_can_be_clipped():
    moved = {}
    for clip in (None, 1e-9):
        _, modules, optimizer = search(
            **{"architecture.grad_clip": clip, "architecture.weight_decay": 0.0}
        )
        before = modules.arch.normal.detach().clone()
        optimizer.step()
        moved[clip] = float((modules.arch.normal.detach() - before).abs().max())
    # Adam's step is lr · g / (|g| + 1e-8): a gradient far below 1e-8 moves it less.
    assert moved[1e-9] < 0.5 * moved[None]


@pytest.mark.parametrize("game", ["dcgan", "wgan_gp", "biggan"])
def test_a_first_order_search_can_run_in_bfloat16(game):
    """In bfloat16 it has nearly the gradients of one in float32."""
    options = {
        "generator.name": game,
        "generator.noise_dim": 8,
        "order": "first",
        "batch_size": 32,
        "nodes": 2,
    }
    _, _, exact = search(**options)
    _, _, rounded = search(**options, precision="bf16")
    for name in exact.problems:
        assert 1e-4 < relative_error(rounded.gradient(name), exact.gradient(name)) < 0.4, name
    record = rounded.step()
    assert all(
        p.dtype == torch.float32
        for problem in rounded.problems.values()
        for p in problem.parameters.values()
    )
    assert record.losses["arch"] == pytest.approx(float(exact.step().losses["arch"]), rel=0.05)


def test_the_learning_rate_warms_up_and_falls_to_its_minimum():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for schedule, middle in (("cosine", 0.5), ("linear", 0.5)):
        how = WeightOptimizer(lr=1.0, min_lr=0.0, schedule=schedule, warmup_epochs=2)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler = learning_rate_schedule(optimizer, how, rounds=20, per_epoch=2)
        rates = []
        for _ in range(20):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates[0] == rates[1] == pytest.approx(0.5)
        assert rates[10] == pytest.approx(middle)
        assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("warmup", [0, 1])
def test_class_weights_and_architecture_see_the_same_batch(warmup):
    """Also after a warm-up, in which the architecture rests and draws no batches."""
    dataset = noise_dataset(per_class=8)
    settings = {
        "search.architecture.warmup_epochs": warmup,
        "search.batch_size": 6,
        "search.order": "first",
    }
    recipe = load_recipe("smoke", overrides=settings)
    train, validation = search_split(dataset, None, 0)
    modules = build_modules(recipe.search, dataset)
    optimizer = build_search(recipe, dataset, train, validation, modules)
    list(optimizer.run(3))
    state = optimizer.state_dict()["problems"]
    assert state["arch"]["data"] == state["w2"]["data"]
    assert state["arch"]["updates"] == 3 - warmup * (len(train) // 6)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 0.003),
        ({"generator.warmup_rounds": 2}, 0.0004),
        ({"generator.init.run": "there"}, 0.0004),
    ],
)
def test_a_generator_that_begins_warm_has_a_rate_of_its_own(options, rate):
    """The discriminator keeps its own, as it is new in any case."""
    rates = {"generator.lr": 0.003, "generator.warmed_lr": 0.0004}
    players = search(**rates, **options)[2].problems["gan"].optimizers
    assert players["generator"].param_groups[0]["lr"] == rate
    expected = load_recipe("smoke").search.generator.discriminator_lr
    assert players["discriminator"].param_groups[0]["lr"] == expected
