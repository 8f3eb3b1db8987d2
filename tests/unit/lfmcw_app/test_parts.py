"""The parts of the images that a recipe uses, and the images that stand for a generator's."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from small_pictures import write_classes
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.data_checks import read_data
from lfmcw_app.errors import InputError
from lfmcw_app.parts import search_part_labels, search_parts, training_labels, training_part
from lfmcw_app.problems import build_search, make_w2_loss
from lfmcw_app.recipe_loading import load_recipe

TINY = {
    "search.generator.name": "real",
    "search.channels": 4,
    "search.nodes": 1,
    "search.steps": 4,
    "search.batch_size": 8,
    "data.search_images": 120,
    "seed": 3,
}


@pytest.fixture(scope="module")
def digits():
    """Digits, with the place of each training image in its first two pixels."""
    dataset = load_dataset("digits")
    for images, block in ((dataset.train, 0), (dataset.test, 100)):
        places = torch.arange(len(images))
        images.pixels[:, 0, 0, 0] = (block + places // 256).to(torch.uint8)
        images.pixels[:, 0, 0, 1] = (places % 256).to(torch.uint8)
    return dataset


def places_of(pixels):
    return (pixels[:, 0, 0, 0].int() * 256 + pixels[:, 0, 0, 1]).tolist()


def recipe(**changes):
    return load_recipe("smoke", overrides=TINY | changes)


def search(digits, dtype=torch.float32, **changes):
    how = recipe(**changes)
    parts = search_parts(how, digits)
    torch.manual_seed(0)
    modules = build_modules(how.search, digits, dtype=dtype)
    optimizer = build_search(
        how, digits, parts.train, parts.validation, modules, unused=parts.unused, dtype=dtype
    )
    return modules, optimizer


def test_images_are_drawn_that_no_other_part_has(digits):
    parts = search_parts(recipe(), digits)
    found = {
        name: set(places_of(images.pixels))
        for name, images in (("D_tr", parts.train), ("D_val", parts.validation))
    }
    unused, test = set(places_of(parts.unused.pixels)), set(places_of(digits.test.pixels))
    assert len(unused) == len(digits.train) - 120
    assert not unused & (found["D_tr"] | found["D_val"] | test)
    assert search_parts(recipe(**{"search.generator.name": "dcgan"}), digits).unused is None


def test_batches_bring_drawn_images_of_the_training_labels(digits):
    """One per label, with replacement; different ones in each batch."""
    _, optimizer = search(digits, **{"search.augmentation.crop_padding": 0})
    unused = search_parts(recipe(), digits).unused
    label_of = dict(zip(places_of(unused.pixels), unused.labels.tolist(), strict=True))
    seen = set()
    for batch in islice(iter(optimizer.problems["w2"].data), 20):
        _, labels, _, _, drawn, drawn_labels = batch
        pixels = (drawn * digits.std[0] + digits.mean[0]) * 255.0
        places = places_of(pixels.round())
        assert torch.equal(labels, drawn_labels)
        assert [label_of[place] for place in places] == labels.tolist()
        seen |= set(places)
    assert len(seen) > 100  # of 160 draws


def test_w2_with_real_images_has_the_loss_of_a_plain_program(digits):
    """Eq. 3 in float64: loss, and gradient in W2."""
    modules, optimizer = search(digits, torch.float64, **{"search.lambda": 0.7})
    batch = next(iter(optimizer.problems["w2"].data))
    x, y, x_val, y_val, drawn, _ = batch
    plain = copy.deepcopy(modules)
    loss, metrics = make_w2_loss(recipe(**{"search.lambda": 0.7}).search)(
        modules.w2, batch, arch=modules.arch, w1=modules.w1
    )
    mix = plain.arch()
    logits = plain.w2.network(x, mix)
    of_val = F.cross_entropy(plain.w1(x_val, mix), y_val, reduction="none")
    of_drawn = F.cross_entropy(plain.w2.network(drawn, mix), y, reduction="none")
    total = F.cross_entropy(logits, y)
    for index, label in enumerate(y.tolist()):
        same = y_val == label
        weight = of_val[same].mean() if bool(same.any()) else plain.w2.class_losses[label]
        total = total + 0.7 * weight * of_drawn[index] / len(y)
    torch.testing.assert_close(loss, total)
    found, expected = (
        torch.autograd.grad(value, list(of.w2.network.parameters()), allow_unused=True)
        for value, of in ((loss, modules), (total, plain))
    )
    torch.testing.assert_close(found, expected)
    assert float(metrics["synthetic"].detach()) > 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"search.order": "first"},
        {"search.class_weighting": "uniform"},
        {"search.lambda": 0.0},
        {"search.synthetic_only": True},
        {"search.validation_batch": "matched"},
        {"search.hypergradient": {"gan": "neumann", "w1": "one_step", "w2": "one_step"}},
    ],
    ids=lambda changes: next(iter(changes)).removeprefix("search."),
)
def test_every_option_goes_with_real_images(digits, changes):
    modules, optimizer = search(digits, **changes)
    before = [parameter.detach().clone() for parameter in modules.arch.parameters()]
    records = list(optimizer.run(2))
    assert set(records[-1].losses) == {"w1", "w2", "arch"}
    assert not any(map(torch.equal, before, modules.arch.parameters()))


def test_a_search_without_images_to_draw_is_refused(digits):
    how = recipe()
    parts = search_parts(how, digits)
    modules = build_modules(how.search, digits)
    with pytest.raises(ValueError, match=r"generator\.name real needs `unused`"):
        build_search(how, digits, parts.train, parts.validation, modules)


@pytest.mark.slow
def test_a_search_with_real_images_resumes_bit_for_bit(digits):
    _, whole = search(digits)
    list(whole.run(2))
    state = copy.deepcopy(whole.state_dict())
    list(whole.run(2))
    _, resumed = search(digits)
    resumed.load_state_dict(state)
    list(resumed.run(2))
    one, other = (tree_leaves(optimizer.state_dict()["problems"]) for optimizer in (whole, resumed))
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def test_a_search_that_leaves_no_image_of_a_class_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"uses 1,438 images, and leaves 0 of 0.* below 1,438"):
        read_data(recipe(**{"data.search_images": None}), tmp_path)
    few = load_dataset("digits")
    kept = (few.train.labels != 4) | (torch.arange(len(few.train)) % 40 == 0)
    few = replace(few, train=few.train[kept])
    with pytest.raises(InputError, match=r"leaves .* 0 of 4, "):
        search_part_labels(recipe(**{"data.search_images": len(few.train) - 5}), few)


def test_images_of_a_patient_in_the_search_are_not_drawn(tmp_path):
    write_classes(tmp_path, {"a": 40, "bb": 40})
    rows = [f"{name}/{index:03d}.png,{index % 20}\n" for name in ("a", "bb") for index in range(40)]
    (tmp_path / "groups.csv").write_text("file,group\n" + "".join(rows))
    data = load_dataset(f"folder:{tmp_path}", groups=str(tmp_path / "groups.csv"))
    for shares in ({}, {"a": 0.5}):
        how = recipe(**{"data.search_images": 30, "data.class_shares": shares})
        parts = search_parts(how, data)
        used = {*parts.train.groups.tolist(), *parts.validation.groups.tolist()}
        assert len(parts.unused) > 0
        assert not used & set(parts.unused.groups.tolist())


def test_validation_images_of_a_folder_are_not_drawn(tmp_path):
    for part, count in {"train": 12, "val": 6, "test": 3}.items():
        write_classes(tmp_path / part, {"a": count, "bb": count})
    data = load_dataset(f"folder:{tmp_path}")
    parts = search_parts(recipe(**{"data.search_images": 18}), data)
    assert len(parts.train) == len(parts.unused) == 12
    assert len(parts.validation) == 6


def test_without_conditions_the_parts_are_those_of_the_split(digits):
    how = recipe()
    parts = search_parts(how, digits)
    for found, expected in zip(
        (parts.train, parts.validation), search_split(digits, 120, 3), strict=True
    ):
        assert torch.equal(found.pixels, expected.pixels)
        assert torch.equal(found.labels, expected.labels)


def test_labels_are_those_of_the_parts(digits):
    """With conditions of every kind, without touching an image."""
    how = recipe(
        **{
            "data.wrong_labels": [{"of": "3", "as": ["5", "8"], "in": "both"}],
            "data.imbalance": 0.3,
            "data.train_images": 200,
        }
    )
    parts = search_parts(how, digits)
    of_train, of_validation = search_part_labels(how, digits)
    assert torch.equal(parts.train.labels, of_train)
    assert torch.equal(parts.validation.labels, of_validation)
    part = training_part(how, digits)
    assert len(part) == len(part.pixels) == 200
    assert torch.equal(part.labels, training_labels(how, digits))
