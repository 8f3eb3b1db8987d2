"""D_tr, D_val and test images: by seed, by name, by groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmcw_app.splits import held_out_by_name, search_indices, stratified


def labels_of(*counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def names_of(*counts, pattern="{:04d}.png"):
    return [pattern.format(index) for count in counts for index in range(count)]


def test_stratified_takes_every_class_in_proportion():
    labels = torch.cat([torch.zeros(60), torch.ones(30), torch.full((10,), 2)]).long()
    first, second = stratified(labels, 50, seed=3)
    assert labels[first].bincount().tolist() == [30, 15, 5]
    assert sorted(torch.cat([first, second]).tolist()) == list(range(100))


def test_the_split_is_the_one_that_earlier_versions_made():
    # The definition, written out: a class's k-th of n examples, in shuffled order, has the position
    # (k + 1/2) / n.
    labels = torch.randint(7, (500,), generator=torch.Generator().manual_seed(5)) ** 2
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(labels), generator=generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels[order] == label).nonzero().squeeze(1)
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    by_position = torch.argsort(position, stable=True)
    first = order[by_position[:200]]
    assert torch.equal(
        stratified(labels, 200, 3)[0], first[torch.randperm(200, generator=generator)]
    )


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9), (0.6, 0.2)])
def test_a_class_of_two_has_one_in_each_half(fractions):
    labels = labels_of(60, 2, 30, 2, 3)
    for seed in range(20):
        train, validation = search_indices(labels, None, seed, fractions)
        assert (labels[train].bincount(minlength=5) >= 1).all()
        assert (labels[validation].bincount(minlength=5) >= 1).all()
        assert set(train.tolist()).isdisjoint(validation.tolist())


def test_a_limit_leaves_two_images_of_every_class():
    labels = labels_of(200, 200, 4, 4)
    for seed in range(10):
        train, validation = search_indices(labels, 40, seed, (0.5, 0.5))
        assert (len(train), len(validation)) == (20, 20)
        assert (labels[train].bincount(minlength=4) >= 1).all()
        assert (labels[validation].bincount(minlength=4) >= 1).all()


def test_a_single_image_is_for_learning():
    labels = labels_of(20, 1, 1, 1, 1)
    for seed in range(10):
        train, _ = search_indices(labels, None, seed, (0.5, 0.5))
        assert labels[train].bincount(minlength=5).tolist()[1:] == [1, 1, 1, 1]


def test_parts_without_room_for_all_classes_are_in_proportion():
    first, second = stratified(labels_of(*[2] * 20), 5, seed=0)
    assert (len(first), len(second)) == (5, 35)


# ------------------------------ by name


def test_about_a_fifth_of_each_class_is_held_out():
    names = [f"{label}-{index}.png" for label in range(5) for index in range(400)]
    held_out = held_out_by_name(names, labels_of(*[400] * 5))
    assert 0.17 < float(held_out.double().mean()) < 0.23


def test_added_files_move_no_image():
    # Two classes, whose names and positions shift when files are added before and after.
    before = [f"{index}.jpg" for index in range(100, 160)]
    after = sorted([*before, *(f"new{index}.jpg" for index in range(40)), "000.jpg"])
    old = dict(zip(before, held_out_by_name(before, labels_of(60)).tolist(), strict=True))
    new = dict(zip(after, held_out_by_name(after, labels_of(101)).tolist(), strict=True))
    assert {name: new[name] for name in before} == old


def test_neither_position_nor_class_decides():
    names = names_of(30)
    alone = held_out_by_name(names, labels_of(30))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shuffled = held_out_by_name([names[i] for i in order.tolist()], labels_of(30))
    assert torch.equal(shuffled, alone[order])
    second = held_out_by_name([*names_of(10), *names], labels_of(10, 30))
    assert torch.equal(second[10:], alone)


def test_the_split_by_name_stays_as_it_is():
    # A run that began with an earlier version resumes with the same test images.
    held_out = held_out_by_name(names_of(20), labels_of(20))
    assert held_out.nonzero()[:, 0].tolist() == [3, 15, 19]


@pytest.mark.parametrize(
    ("size", "tested"), [(1, (0, 0)), (2, (1, 1)), (3, (1, 1)), (5, (1, 1)), (10, (1, 3))]
)
def test_small_classes_have_images_for_learning_and_testing(size, tested):
    for pattern in ("{:04d}.png", "{}.jpg", "IMG_{:03d}.JPG", "a{}.png"):
        held_out = held_out_by_name(names_of(size, 50, pattern=pattern), labels_of(size, 50))
        assert tested[0] <= int(held_out[:size].sum()) <= tested[1]


def test_three_images_give_one_to_each_part():
    counts = [3] * 10
    labels = labels_of(*counts)
    names = [f"{label}-{index}" for label in range(10) for index in range(3)]
    held_out = held_out_by_name(names, labels)
    assert labels[held_out].bincount().tolist() == [1] * 10
    rest = labels[~held_out]
    for part in search_indices(rest, None, 7, (0.5, 0.5)):
        assert rest[part].bincount().tolist() == [1] * 10


# ------------------------------ groups


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_are_never_separated(data):
    count = data.draw(st.integers(6, 60))
    classes = data.draw(st.integers(2, 4))
    numbers = st.lists(st.integers(0, 11), min_size=count, max_size=count)
    groups = data.draw(numbers)
    labels = torch.tensor([number % classes for number in data.draw(numbers)])
    labels[:classes] = torch.arange(classes)
    held_out = held_out_by_name(["x"] * count, labels, [f"p{group}" for group in groups])
    numbered = torch.tensor(groups)
    assert set(numbered[held_out].tolist()).isdisjoint(numbered[~held_out].tolist())
    assert set(labels[~held_out].tolist()) == set(labels.tolist())  # no class is lost to the test

    rest, numbered = labels[~held_out], numbered[~held_out]
    train, validation = search_indices(rest, None, 3, (0.5, 0.5), numbered)
    assert set(numbered[train].tolist()).isdisjoint(numbered[validation].tolist())
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(rest)))


@pytest.mark.parametrize("per_class", [3, 4, 8])
def test_groups_of_one_class_are_in_every_part(per_class):
    """One patient, one class: every class has a group in D_tr, in D_val and in the test."""
    groups = [f"{label}{index}" for label in "abc" for index in range(per_class) for _ in range(4)]
    labels = labels_of(*[4 * per_class] * 3)
    held_out = held_out_by_name(["x"] * len(labels), labels, groups)
    assert (labels[held_out].bincount(minlength=3) > 0).all()
    numbers = torch.arange(3 * per_class).repeat_interleave(4)[~held_out]
    rest = labels[~held_out]
    for seed in range(5):
        for part in search_indices(rest, None, seed, (0.5, 0.5), numbers):
            assert (rest[part].bincount(minlength=3) > 0).all()


def test_a_group_is_held_out_where_two_remain_for_the_search():
    # By their hashes "patient 7" comes first, then 4, 8, 10; none is in the lowest fifth. The first
    # is one of only two groups of class 1, so holding it out would leave that class no D_val.
    groups = ["patient 7", "patient 4", "patient 8", "patient 10", "patient 7", "patient 10"]
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    held_out = held_out_by_name(["x"] * 6, labels, groups)
    assert {groups[index] for index in held_out[:4].nonzero()[:, 0].tolist()} >= {"patient 4"}


def test_the_halves_of_groups_are_about_as_large_as_asked():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(60, (900,), generator=generator)
    labels = torch.randint(3, (900,), generator=generator)
    for fractions in ((0.5, 0.5), (0.8, 0.2), (0.25, 0.25)):
        parts = search_indices(labels, None, 1, fractions, groups)
        for part, fraction in zip(parts, fractions, strict=True):
            assert len(part) == pytest.approx(900 * fraction, abs=60)
    one, other = (search_indices(labels, None, seed, (0.5, 0.5), groups)[0] for seed in (0, 1))
    assert set(one.tolist()) != set(other.tolist())
