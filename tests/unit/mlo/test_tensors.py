"""Batches and other values as users build them: dicts, lists and tuples with tensors in them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch

from mlo.tensors import add, map_tensors, tensors_of, versions_of, zeros_for_none

Pair = namedtuple("Pair", ["images", "labels"])


def nested():
    return {"pair": Pair(torch.ones(2), torch.zeros(1)), "list": [torch.ones(3), "text", None]}


def test_every_tensor_is_mapped_and_the_rest_kept():
    mapped = map_tensors(nested(), lambda tensor: tensor + 1)
    assert mapped["pair"].images.tolist() == [2.0, 2.0]
    assert mapped["pair"].labels.tolist() == [1.0]
    assert mapped["list"][0].tolist() == [2.0, 2.0, 2.0]
    assert mapped["list"][1:] == ["text", None]


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(b=torch.ones(1), a=torch.ones(1)),
        Pair(torch.ones(1), 2),
        [torch.ones(1)],
        (torch.ones(1), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_containers_keep_their_types_and_order(value):
    mapped = map_tensors(value, torch.clone)
    assert type(mapped) is type(value)
    assert list(mapped) == list(value) if isinstance(value, dict) else len(mapped) == len(value)


def test_the_original_is_left_alone():
    value = nested()
    map_tensors(value, lambda tensor: None)
    assert value["pair"].images.tolist() == [1.0, 1.0]
    assert len(tensors_of(value)) == 3


def test_tensors_are_found_in_the_order_in_which_they_stand():
    assert [tensor.numel() for tensor in tensors_of(nested())] == [2, 1, 3]
    assert tensors_of("text") == []


def test_a_change_in_place_is_seen():
    value = nested()
    before = versions_of(value)
    assert versions_of(value) == before
    value["list"][0].add_(1.0)
    changed = [a != b for a, b in zip(versions_of(value), before, strict=True)]
    assert changed == [False, False, True]


def test_tensors_of_inference_mode_have_no_version():
    with torch.inference_mode():
        assert versions_of([torch.ones(1)]) == (0,)


def test_gradients_that_are_none_become_zeros():
    like = [torch.ones(2), torch.ones(3, dtype=torch.float64)]
    found = zeros_for_none([None, like[1]], like)
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1] is like[1]


def test_gradients_are_added_where_none_stands_for_zero():
    one, other = torch.tensor([1.0]), torch.tensor([2.0])
    assert add(None, None) is None
    assert add(one, None) is one
    assert add(None, other) is other
    assert add(one, other).tolist() == [3.0]
