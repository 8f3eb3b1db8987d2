"""Options of the search that change what W2 learns on: class weights, and the validation batch that
they are measured on.
"""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from lfmcw_app.data import Batches, PairedBatches, load_dataset, search_split
from lfmcw_app.errors import InputError
from lfmcw_app.modules import WeightedLearner, build_modules
from lfmcw_app.problems import build_search, make_w2_loss
from lfmcw_app.recipe import load_recipe
from lfmcw_app.search_space.supernet import Supernet
from mlo.testing import relative_error

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


def first_validation_batches(optimizer):
    """The first validation batches of w2 and of arch."""
    w2, arch = (next(iter(optimizer.problems[name].data)) for name in ("w2", "arch"))
    return w2[2:], arch


def test_a_missing_class_can_take_the_mean_of_the_others_differentiably():
    w2 = WeightedLearner(Supernet(in_channels=1, num_classes=4, channels=2, layers=3, nodes=1), 4)
    logits = torch.randn(5, 4, requires_grad=True)
    weights = w2.class_weights(logits, torch.tensor([0, 0, 0, 1, 3]), "batch_mean")
    assert float(weights[2].detach()) == pytest.approx(float(weights[[0, 1, 3]].detach().mean()))
    (grad,) = torch.autograd.grad(weights[2], logits, retain_graph=True)
    (expected,) = torch.autograd.grad(weights[[0, 1, 3]].mean(), logits)
    assert torch.allclose(grad, expected)


def test_uniform_class_weights_are_as_strong_together_and_differ_in_nothing_else():
    """The control of the method: each class weighs the mean class loss, which still depends on
    W1.
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


def test_the_discriminator_can_move_several_times_for_each_move_of_the_generator():
    options = {
        "generator.name": "biggan",
        "generator.noise_dim": 8,
        "generator.discriminator_steps": 3,
    }
    _, modules, optimizer = search(**options)
    players = optimizer.problems["gan"].optimizers
    list(optimizer.run(2))
    counts = {
        name: {int(state["step"]) for state in o.state.values()} for name, o in players.items()
    }
    assert counts == {"generator": {2}, "discriminator": {6}}
    assert optimizer.problems["gan"].data.position == 6
    assert optimizer.problems["w1"].data.position == 2
    assert int(modules.gan.generator.average.updates) == 6
    assert modules.gan.generator.evaluations_per_update == 3


def test_class_weights_are_measured_on_the_batch_of_the_architecture_by_default():
    ours, architectures = first_validation_batches(search()[2])
    assert torch.equal(ours[0], architectures[0])


def test_class_weights_can_have_a_validation_batch_of_their_own():
    ours, architectures = first_validation_batches(search(validation_batch="independent")[2])
    assert ours[0].shape == architectures[0].shape
    assert not torch.equal(ours[0], architectures[0])


def test_the_validation_batch_can_have_the_classes_of_the_training_batch():
    dataset = load_dataset("digits")
    train, validation = search_split(dataset, 300, seed=0)
    parts = [Batches(images, dataset, batch_size=16, seed=5) for images in (train, validation)]
    paired = list(islice(PairedBatches(*parts, matched=True), 4))
    for _, labels, images, validation_labels in paired:
        assert torch.equal(labels, validation_labels)
        assert len(torch.unique(images.flatten(1), dim=0)) > 8
    known = parts[1].of_classes(torch.tensor([3, 3, 7]), 0)[0]
    assert torch.equal(known, parts[1].of_classes(torch.tensor([3, 3, 7]), 0)[0])
    assert not torch.equal(known, parts[1].of_classes(torch.tensor([3, 3, 7]), 1)[0])
    # Each is an image of D_val with that label.
    everything = Batches(validation, dataset, batch_size=len(validation), seed=0).batch(0)
    for image, label in zip(paired[0][2], paired[0][3], strict=True):
        same = (everything[0] == image).flatten(1).all(1)
        assert (everything[1][same] == label).any()


def test_a_class_without_validation_images_cannot_be_matched():
    dataset = load_dataset("digits")
    images = dataset.train[dataset.train.labels != 4]
    with pytest.raises(InputError, match="class 4 of the training batch"):
        Batches(images, dataset, batch_size=8, seed=0).of_classes(torch.tensor([1, 4]), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_weighting": "uniform"},
        {"absent_class": "batch_mean"},
        {"validation_batch": "matched"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_each_option_changes_the_search_and_only_from_where_it_acts(changes):
    """W1 and the game move as before in the first round, W2 does not."""
    plain, other = search()[2].step(), search(**changes)[2].step()
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
def test_a_first_order_search_in_bfloat16_has_nearly_the_gradients_of_one_in_float32(game):
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


def test_a_second_order_search_in_bfloat16_is_refused():
    with pytest.raises(InputError, match="precision bf16 rounds second derivatives away"):
        load_recipe("smoke", overrides={"search.precision": "bf16", "search.order": "second"})
