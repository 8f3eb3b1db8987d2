"""Labels made wrong, and classes made small."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_pictures import write_classes

from lfmcw_app.conditions import conditioned, describe_conditions
from lfmcw_app.data import load_dataset
from lfmcw_app.data_checks import adaptations, read_data
from lfmcw_app.errors import InputError
from lfmcw_app.parts import search_parts, training_part
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.recipe_loading import load_recipe, validate_recipe
from lfmcw_app.testing import noise_dataset

HALF = [{"of": "3", "as": ["5", "8"], "share": 0.5}]


@pytest.fixture(scope="module")
def digits():
    """Digits, whose first pixel is the right label."""
    dataset = load_dataset("digits")
    dataset.train.pixels[:, 0, 0, 0] = dataset.train.labels.to(torch.uint8)
    return dataset


def recipe(seed=0, **data):
    changes = {f"data.{key}": value for key, value in data.items()}
    return load_recipe("smoke", overrides={"seed": seed, **changes})


def right_labels(images):
    return images.pixels[:, 0, 0, 0].long()


def wrong(images):
    """Which images have a wrong label, [N]."""
    return images.labels != right_labels(images)


def test_a_share_of_a_class_gets_one_of_the_other_labels(digits):
    part = training_part(recipe(wrong_labels=HALF), digits)
    members = right_labels(part) == 3
    assert int(wrong(part).sum()) == round(0.5 * int(members.sum()))
    assert not bool(wrong(part)[~members].any())
    counts = part.labels[members & wrong(part)].bincount(minlength=10)
    assert counts.sum() == counts[5] + counts[8] and min(counts[5], counts[8]) > 20


def test_wrong_labels_are_in_d_tr_and_right_ones_in_d_val(digits):
    """By default; the same images are in both as without wrong labels."""
    plain = search_parts(recipe(), digits)
    for where, in_validation in (("train", False), ("both", True)):
        parts = search_parts(recipe(wrong_labels=[HALF[0] | {"in": where}]), digits)
        assert torch.equal(parts.train.pixels, plain.train.pixels)
        assert torch.equal(parts.validation.pixels, plain.validation.pixels)
        share = wrong(parts.train)[right_labels(parts.train) == 3].float().mean()
        assert 0.35 < float(share) < 0.65
        assert bool(wrong(parts.validation).any()) == in_validation


def test_an_image_has_one_label_in_the_whole_run(digits):
    """D_tr and the training have the same wrong labels; another seed has others."""
    how = recipe(wrong_labels=[HALF[0] | {"in": "both"}])
    parts, trained = search_parts(how, digits), training_part(how, digits)

    def labels(*several):
        return {
            tuple(row.flatten().tolist()): label
            for images in several
            for row, label in zip(images.pixels, images.labels.tolist(), strict=True)
        }

    assert labels(parts.train, parts.validation).items() <= labels(trained).items()
    other = training_part(recipe(1, wrong_labels=[HALF[0] | {"in": "both"}]), digits)
    assert not torch.equal(other.labels, trained.labels)


def test_one_more_condition_shifts_no_draws_of_another(digits):
    one = conditioned(recipe(wrong_labels=HALF), digits, digits.train).given
    more = [{"of": "0", "as": ["1"]}, *HALF]
    two = conditioned(recipe(wrong_labels=more), digits, digits.train).given
    others = digits.train.labels != 0
    assert torch.equal(one[others], two[others])


def test_classes_are_left_in_their_shares(digits):
    before = digits.train.labels.bincount()
    part = training_part(recipe(class_shares={"2": 0.1, 7: 0.5}), digits)
    after = part.labels.bincount()
    for label in range(10):
        share = {2: 0.1, 7: 0.5}.get(label, 1.0)
        assert int(after[label]) == round(share * int(before[label]))


def test_an_imbalance_decays_from_the_first_class_to_the_last():
    """0.01 ** (c / 9), as in Cui et al. (2019); a class's own share goes before it."""
    data = noise_dataset(classes=10, per_class=200)
    how = recipe(imbalance=0.01, class_shares={"class 1": 1.0})
    counts = training_part(how, data).labels.bincount().tolist()
    expected = [200 * 0.01 ** (label / 9) for label in range(10)]
    assert counts == [200, 200, *(round(count) for count in expected[2:])]
    assert counts[9] == 2


def test_both_parts_of_a_search_have_the_same_shares(digits):
    """D_val is made of the training images, so it is as unequal as they are."""
    parts = search_parts(recipe(imbalance=0.1, search_images=None), digits)
    ours, theirs = (images.labels.bincount() for images in (parts.train, parts.validation))
    assert int((ours - theirs).abs().max()) <= 1
    assert int(ours[9]) < 0.2 * int(ours[0])


def test_conditions_can_leave_the_training_alone(digits):
    how = recipe(wrong_labels=HALF, imbalance=0.1, conditions_apply_to="search")
    part = training_part(how, digits)
    assert torch.equal(part.labels, digits.train.labels)
    assert bool(wrong(search_parts(how, digits).train).any())


def test_images_that_are_drawn_have_right_labels(digits):
    """Those that a small class has lost are among them."""
    how = load_recipe(
        "smoke",
        overrides={
            "search.generator.name": "real",
            "data.search_images": 400,
            "data.wrong_labels": HALF,
            "data.class_shares": {"2": 0.1},
        },
    )
    unused = search_parts(how, digits).unused
    assert not bool(wrong(unused).any())
    assert int((unused.labels == 2).sum()) > 0.85 * int((digits.train.labels == 2).sum())


def test_validation_images_of_a_folder_have_the_conditions_too(tmp_path):
    for part, count in {"train": 20, "val": 10, "test": 3}.items():
        write_classes(tmp_path / part, {"a": count, "bb": count})
    data = load_dataset(f"folder:{tmp_path}")
    entry = {"of": "a", "as": ["bb"], "share": 0.5}
    for where, labels in (("train", [10, 5]), ("both", [5, 10])):
        how = recipe(wrong_labels=[entry | {"in": where}], class_shares={"bb": 0.5})
        assert search_parts(how, data).validation.labels.bincount().tolist() == labels
        assert training_part(how, data).labels.bincount().tolist() == [10, 20]


def test_test_images_stay(digits, tmp_path):
    how = recipe(wrong_labels=HALF, imbalance=0.1)
    _, data = read_data(how, tmp_path)
    assert torch.equal(data.test.labels, load_dataset("digits").test.labels)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"class_shares": {"cat": 0.5}}, r"the class 'cat', which digits does not have"),
        ({"class_shares": {"10": 0.5}}, r"the class '10'"),
        ({"wrong_labels": [{"of": "cat", "as": ["3"]}]}, r"the class 'cat'"),
        ({"wrong_labels": [{"of": "3", "as": ["cat"]}]}, r"the class 'cat'"),
        ({"wrong_labels": [{"of": "3", "as": ["3"]}]}, r"labels 3 as itself"),
        ({"wrong_labels": [{"of": "3", "as": ["5", "5"]}]}, r"names the class 5 twice"),
        ({"class_shares": {"3": 0.001}}, r"no image keeps the label 3"),
        ({"wrong_labels": [HALF[0] | {"share": 1.0}]}, r"no image keeps the label 3"),
    ],
)
def test_what_does_not_fit_the_classes_is_refused(data, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_data(recipe(**data), tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"class_shares": {"3": 1.5}}, r"data\.class_shares\.3.*at most 1"),
        ({"class_shares": {"3": 0.0}}, r"data\.class_shares\.3.*more than 0"),
        ({"class_shares": {"3": 0.5, 3: 0.2}}, r"one share per class; 3 has several"),
        ({"imbalance": -0.1}, r"data\.imbalance.*more than 0"),
        ({"wrong_labels": [HALF[0] | {"share": 2.0}]}, r"share.*at most 1"),
        ({"wrong_labels": [HALF[0] | {"as": []}]}, r"at least 1 item"),
        ({"wrong_labels": [*HALF, *HALF]}, r"one entry per class; 3 has several"),
        ({"wrong_labels": [HALF[0] | {"in": "test"}]}, r"'train' or 'both'"),
    ],
)
def test_conditions_are_validated(data, words):
    with pytest.raises(InputError, match=words):
        recipe(**data)


def test_conditions_survive_yaml():
    """Classes given as numbers are names from then on."""
    how = recipe(wrong_labels=[{"of": 3, "as": [5]}], class_shares={2: 0.5}, imbalance=0.5)
    assert validate_recipe(parse_yaml(how.to_yaml())) == how
    assert how.data.class_shares == {"2": 0.5} and how.data.wrong_labels[0].as_ == ("5",)


def test_a_number_names_the_class_that_is_called_so_first(tmp_path):
    """Else it is the place of the class among all."""
    data = noise_dataset()
    part = training_part(recipe(class_shares={1: 0.5}), data)
    assert part.labels.bincount().tolist() == [8, 4, 8]
    for part in ("train", "test"):
        write_classes(tmp_path / part, {"1": 4, "2": 4, "5": 4})
    numbered = load_dataset(f"folder:{tmp_path}")
    part = training_part(recipe(class_shares={1: 0.5}), numbered)
    assert part.labels.bincount().tolist() == [2, 4, 4]


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (
            {"wrong_labels": [{"of": "class 0", "as": ["class 1"]}, {"of": 0, "as": ["class 2"]}]},
            r"data\.wrong_labels names the class class 0 twice, as class 0 and as 0",
        ),
        (
            {"wrong_labels": [{"of": "class 0", "as": ["class 1", 1]}]},
            r"`as` in data\.wrong_labels names the class class 1 twice, as class 1 and as 1",
        ),
        (
            {"class_shares": {"class 0": 0.2, 0: 0.9}},
            r"data\.class_shares names the class class 0 twice",
        ),
        ({"class_shares": {"0": 0.2, "00": 0.9}}, r"class 0 twice, as 0 and as 00"),
    ],
)
def test_a_class_by_name_and_by_number_is_one_class(conditions, words):
    with pytest.raises(InputError, match=words):
        training_part(recipe(**conditions), noise_dataset())


@pytest.mark.parametrize(
    ("names", "number"),
    [(("01", "02", "03"), 1), (("1", "10", "2"), 0), (("0.5", "1.5"), 1), (("5", "cat"), 1)],
)
def test_a_number_is_no_place_among_classes_called_by_numbers(names, number):
    data = dataclasses.replace(noise_dataset(classes=len(names)), class_names=names)
    with pytest.raises(InputError, match=f'the class {number}, but no .* as "{names[0]}"'):
        training_part(recipe(class_shares={number: 0.5}), data)
    part = training_part(recipe(class_shares={names[1]: 0.5}), data)
    assert part.labels.bincount().tolist() == [8, 4, 8][: len(names)]


def test_conditions_are_said_with_their_numbers(digits, tmp_path):
    how = recipe(wrong_labels=HALF, class_shares={"2": 0.1})
    before = digits.train.labels.bincount().tolist()
    said = describe_conditions(how, digits)
    assert said == (
        f"Conditions, in the search and the training: {round(0.1 * before[2])} of {before[2]} "
        f"images of 2 are left; {round(0.5 * before[3])} of {before[3]} of 3 are labelled 5 or 8, "
        "but not in D_val."
    )
    assert said in adaptations(how, how, digits)
    assert describe_conditions(recipe(), digits) == ""
