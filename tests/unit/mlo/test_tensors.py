"""Batches and other values as users build them: dicts, lists and tuples with tensors in them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch

from mlo.tensors import (
    add,
    add_all,
    are_plain,
    copies,
    map_tensors,
    norm_of,
    scaled,
    tensors_of,
    versions_of,
    zeros_for_none,
)

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


# ------------------------------ many tensors as one operation


def many():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 4, generator=generator)
    return [
        torch.randn(5, generator=generator),
        images.to(memory_format=torch.channels_last),
        torch.randn(4, 1, generator=generator).expand(4, 3),
    ]


class Marked(torch.Tensor):
    """A tensor of a class of its own, which foreach operators need not know."""


@pytest.mark.parametrize("unlike", [None, torch.float64, Marked])
def test_copies_are_what_clone_makes(unlike):
    """Copies have the values and strides of clones, and are new, whatever the tensors are."""
    tensors = many()
    if unlike is Marked:
        tensors.append(torch.ones(2).as_subclass(Marked))
    elif unlike is not None:
        tensors.append(torch.ones(2, dtype=unlike))
    tensors[0].requires_grad_()
    made = copies(tensors)
    for copy, tensor in zip(made, tensors, strict=True):
        clone = tensor.detach().clone()
        assert torch.equal(copy, clone)
        assert (copy.stride(), copy.dtype, type(copy)) == (
            clone.stride(),
            clone.dtype,
            type(clone),
        )
        # No engine may take a copy for one that was changed in place.
        assert copy._version == 0
        assert not copy.requires_grad
        assert copy.data_ptr() != tensor.data_ptr()
    assert copies([]) == []


def test_sums_and_multiples_are_those_of_each_tensor():
    """Sums and multiples of lists have the bits of those of each tensor; None counts as zero."""
    ones, others, factor = [*many(), None, None], [*many()[::-1], None, None], torch.tensor(0.3)
    others[0], others[2] = torch.randn(5), None
    others[4] = torch.ones(1)
    found = add_all(ones, others)
    expected = list(map(add, ones, others))
    assert found[3] is None
    assert found[2] is ones[2]
    for place in (0, 1, 2, 4):
        assert torch.equal(found[place], expected[place])
    for multiple, tensor in zip(scaled(many(), factor), many(), strict=True):
        assert torch.equal(multiple, tensor * factor)
    assert scaled([], factor) == []


def test_sums_and_multiples_can_be_differentiated():
    """Sums and multiples of lists have derivatives, in the factor too."""
    one, other, factor = (torch.full((2,), 3.0, requires_grad=True) for _ in range(3))
    factor = factor.sum()
    total = scaled(add_all([one, one], [other, None]), factor)  # 6 · (one + other), 6 · one
    gradients = torch.autograd.grad(sum(t.sum() for t in total), [one, other, factor])
    assert [float(g.sum()) for g in gradients] == [24.0, 12.0, 18.0]


def test_what_foreach_operators_need_not_know_is_told_apart():
    assert are_plain([torch.ones(1), torch.ones(1)])
    assert not are_plain([torch.nn.Parameter(torch.ones(1))])
    with torch.no_grad():
        assert are_plain([torch.nn.Parameter(torch.ones(1))])
    assert not are_plain([torch.ones(1).as_subclass(Marked)])
    assert not are_plain([torch.ones(1).to_sparse()])
    marked = torch.ones(2).as_subclass(Marked)
    assert type(scaled([marked], torch.tensor(2.0))[0]) is Marked
    assert type(add_all([marked], [marked])[0]) is Marked


def test_a_norm_is_that_of_pytorch():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        tensor = torch.randn(100, dtype=dtype, requires_grad=True)
        assert norm_of(tensor) == float(tensor.norm())
    assert norm_of(torch.zeros(0)) == 0.0
