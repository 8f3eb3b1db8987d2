"""What a run needs of its data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lfmcw_app.data import Dataset, Images
from lfmcw_app.data_checks import adaptations, describe_parts, fitted, read_data
from lfmcw_app.errors import InputError
from lfmcw_app.recipe_loading import load_recipe, parsed_settings


@pytest.mark.parametrize(
    ("fractions", "images", "batch"), [([0.6, 0.4], 99, 40), ([0.29, 0.71], 100, 29)]
)
def test_a_batch_may_take_all_images_of_a_part(fractions, images, batch):
    """A batch as large as the smaller part of the search images is accepted.

    59 and 40 of 99 images: the second part gets the rest; 0.29 · 100 is 28.999999999999996.
    """
    settings = {
        "dataset": "digits",
        "data.search_images": images,
        "data.search_fractions": fractions,
    }
    read_data(load_recipe("smoke", overrides=settings | {"search.batch_size": batch}), Path("data"))
    with pytest.raises(InputError, match=f"leaves only {batch} images"):
        read_data(
            load_recipe("smoke", overrides=settings | {"search.batch_size": batch + 1}),
            Path("data"),
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation.batch_size": 4000}, "evaluation.batch_size is 4000"),
        ({"search.architecture.warmup_epochs": 1000}, "search.architecture.warmup_epochs"),
        ({"search.weights.warmup_epochs": 1000}, "search.weights.warmup_epochs"),
        ({"evaluation.weights.warmup_epochs": 1000}, "evaluation.weights.warmup_epochs"),
        ({"evaluation.stem": "imagenet"}, "evaluation.stem is imagenet.*multiple of 32"),
        ({"evaluation.augmentation.cutout": 8}, "cutout is 8, which would erase images"),
        ({"search.augmentation.cutout": 10**9}, "search.*cutout is 1000000000, which would erase"),
        ({"search.augmentation.crop_padding": 8}, "search.*crop_padding is 8, with which a crop"),
        ({"evaluation.augmentation.crop_padding": 10**9}, "evaluation.*crop_padding is 1000000000"),
        (
            {"search.epochs": 10**9, "search.steps": None, "search.batch_size": 8},
            r"search\.epochs asks for [\d,]+ rounds, and a phase has 1,000,000,000 at most",
        ),
        (
            {"evaluation.epochs": 10**9, "evaluation.batch_size": 8},
            r"evaluation\.epochs asks for [\d,]+ rounds",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_the_data_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        read_data(load_recipe("smoke", overrides=changes), Path("data"))


def test_a_training_alone_needs_no_batch_of_a_search():
    recipe = load_recipe("smoke", overrides={"search.batch_size": 4000})
    with pytest.raises(InputError, match=r"search\.batch_size is 4000"):
        read_data(recipe, Path("data"))
    assert read_data(recipe, Path("data"), searches=False)[1].name == "digits"


def test_looking_at_the_data_draws_no_random_numbers():
    """It builds the modules of a search, to refuse those that do not fit."""
    before = torch.get_rng_state()
    read_data(load_recipe("smoke"), Path("data"))
    assert torch.equal(torch.get_rng_state(), before)


def made(count):
    """A data set of so many training images in three classes."""
    labels = torch.arange(count) % 3
    pixels = torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8)
    images = Images(pixels=pixels, labels=labels)
    return Dataset(
        name="made", train=images, test=images, class_names=("a", "b", "c"), mean=(0.5,), std=(0.2,)
    )


@pytest.mark.parametrize(
    ("count", "processes", "batches", "words"),
    [
        (
            24,
            1,
            (12, 24),
            ["search.batch_size is 12 instead of 32", "300 epochs instead of the"],
        ),
        (
            31,
            2,
            (14, 30),
            ["search.batch_size is 14 instead of 32", "300 epochs instead of the"],
        ),
        (240, 1, (32, 64), ["100 epochs instead of the recipe's 6: the images", "only 18 rounds"]),
        (64 * 60, 1, (32, 64), []),
    ],
)
def test_a_preset_adapts_to_few_images(count, processes, batches, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    asked, dataset = load_recipe("small"), made(count)
    recipe = fitted(asked, dataset)
    assert (recipe.search.batch_size, recipe.evaluation.batch_size) == batches
    # Of the warm-up, which learns on D_tr alone.
    least = count // 2 // processes * processes
    assert recipe.search.generator.warmup_batch_size == min(64, least)
    said = " ".join(adaptations(asked, recipe, dataset))
    assert all(text in said for text in words)
    assert bool(said) is bool(words)
    assert ("search" in " ".join(adaptations(asked, recipe, dataset, searches=False))) is False
    assert fitted(recipe, dataset) == recipe


@pytest.mark.parametrize(
    ("key", "images", "words"),
    [("search", 2, "search has a single image"), ("search", 3, "search has a single image")],
)
def test_a_part_of_a_single_image_makes_no_batch(key, images, words):
    recipe = load_recipe("small", overrides={"dataset": "digits", f"data.{key}_images": images})
    with pytest.raises(InputError, match=f"{words} of digits.*at least two"):
        read_data(recipe, Path("data"))


def test_what_is_given_beside_a_preset_is_not_adapted():
    settings = {"search.batch_size": 32, "evaluation.batch_size": 64, "evaluation.epochs": 6}
    for key in settings:
        recipe = load_recipe("small", overrides={key: settings[key]})
        now = fitted(recipe, made(24))
        section, name = key.split(".")
        assert getattr(getattr(now, section), name) == settings[key]
    assert load_recipe("small", overrides=settings).evaluation.min_steps == 0
    assert load_recipe("small", overrides={"evaluation.epochs": 6}).evaluation.min_steps == 0
    both = {"evaluation.epochs": 6, "evaluation.min_steps": 7}
    assert load_recipe("small", overrides=both).evaluation.min_steps == 7


def test_images_that_the_recipe_leaves_out_are_told():
    dataset = made(300)
    asked = load_recipe("small", overrides={"data.train_images": 200, "data.search_images": 100})
    said = " ".join(adaptations(asked, fitted(asked, dataset), dataset))
    assert "does not use all images: 200 of 300 training images, 100 for the search." in said


def test_what_each_part_of_the_images_is_for_is_said():
    dataset = made(300)
    asked = load_recipe("small", overrides={"data.train_images": 200, "data.search_images": 100})
    parts = "The search learns from 50 images (D_tr), and 50 others (D_val)"
    search = f"{parts} decide which cell it chooses."
    training = "is trained on 200 images and tested on 300 others."
    assert describe_parts(asked, dataset) == [f"{search} The network of that cell {training}"]
    everything = load_recipe("small")
    assert (
        "is trained on both parts together (300 images) and"
        in describe_parts(everything, dataset)[0]
    )
    assert describe_parts(asked, dataset, searches=False) == [f"The network {training}"]
    at_random = load_recipe("small", overrides={"search.method": "random"})
    assert "search" not in " ".join(describe_parts(at_random, dataset))


def test_the_advice_on_a_longer_training_is_right():
    asked, dataset = load_recipe("small"), made(240)
    (line,) = adaptations(asked, fitted(asked, dataset), dataset)
    given = re.search(r"--set (evaluation\.min_steps=\d+)", line)[1]
    kept = load_recipe("small", overrides=parsed_settings([given]))
    assert adaptations(kept, fitted(kept, dataset), dataset) == []


def test_the_memory_of_a_recipe_needs_no_data(tmp_path):
    """On the meta device only the shape of the images is needed."""
    recipe = load_recipe("paper", overrides={"dataset": "cifar10"})
    fitting, dataset = read_data(recipe, tmp_path, device=torch.device("meta"))
    assert fitting == recipe
    assert (len(dataset.train), dataset.image_size) == (50_000, 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("data.image_size", "and the images have 8 pixels: none is enlarged"),
        ("data.search_images", "there are only 1,438"),
        ("data.train_images", "there are only 1,438"),
        ("data.test_images", "there are only 359"),
    ],
)
def test_more_than_the_data_have_is_told(key, words):
    asked = load_recipe("smoke", overrides={key: 10**6})
    recipe, dataset = read_data(asked, Path("data"))
    (line,) = [said for said in adaptations(asked, recipe, dataset) if key in said]
    assert line.startswith(f"{key} is 1,000,000") and words in line


HOSTILE = ("-1", "0", "1e6", "9e15", ".inf", "-.inf", ".nan", "1e400", "true", "[]", "null", "''")
NUMBERS = {
    "search.channels": "1e6", "search.layers": "1e6", "search.nodes": "1e6",
    "search.batch_size": "1e6", "search.steps": "9e15", "search.epochs": "9e15",
    "search.generator.discriminator_steps": "1e6", "search.generator.warmup_rounds": "9e15",
    "evaluation.channels": "1e6", "evaluation.layers": "1e6", "evaluation.batch_size": "1e6",
    "evaluation.steps": "9e15", "evaluation.epochs": "9e15", "evaluation.min_steps": "9e15",
    "search.weights.warmup_epochs": "1e6", "search.augmentation.crop_padding": "1e6",
}  # fmt: skip
"""Key → a value of `HOSTILE` from which on no run can have it."""


@pytest.mark.parametrize("space", ["darts", "nasbench201"])
@pytest.mark.parametrize("key", NUMBERS)
def test_hostile_numbers_are_refused_by_their_key(key, space):
    """None is built: an answer by arithmetic, whatever the memory of the machine."""
    section, _, name = key.rpartition(".")
    other = {"steps": f"{section}.epochs=null", "epochs": f"{section}.steps=null"}.get(name)
    for value in HOSTILE:
        large = value in ("1e6", "9e15")
        if value in ("0", "null") or (large and float(value) < float(NUMBERS[key])):
            continue  # they have a meaning for some keys
        assignments = (f"{key}={value}", *filter(None, [other]))
        settings = parsed_settings(assignments)
        with pytest.raises(InputError) as refused:
            read_data(load_recipe("smoke", space=space, overrides=settings), Path("data"))
        assert name in str(refused.value) or section in str(refused.value), value
        assert len(str(refused.value)) < 600
