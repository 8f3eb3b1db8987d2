"""Batches and other values as users build them: dicts, lists and tuples with tensors in them."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlo.tensors import (
    add,
    add_all,
    are_plain,
    copies,
    have_same_values,
    in_new_containers,
    map_tensors,
    norm_of,
    scaled,
    sharing_memory,
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


@dataclass
class Fields:
    x: object


@dataclass(frozen=True, slots=True)
class Frozen:
    x: object


class Attributes:
    def __init__(self, x):
        self.x, self.owner = x, self  # in a circle


class Wrapped(UserDict):
    """A mapping that is no dict, as tokenizers return it."""


HOLDERS = {
    "itself": lambda x: x,
    "list": lambda x: [x],
    "dict": lambda x: {"x": x},
    "deque": lambda x: deque([x]),
    "dataclass": Fields,
    "frozen": Frozen,
    "object": Attributes,
    "namespace": lambda x: SimpleNamespace(x=x),
    "mapping": lambda x: Wrapped(x=[x]),
    "nested": lambda x: {"a": Fields([Attributes(x)])},
}
BUFFERS = {
    "tensor": lambda: torch.zeros(3, 2000),
    "from_numpy": lambda: torch.from_numpy(np.zeros((3, 2000))),
    "transposed": lambda: torch.from_numpy(np.zeros((2000, 3))).T,
    "scalar": lambda: torch.from_numpy(np.zeros(())),
    "complex": lambda: torch.from_numpy(np.zeros((3, 5), complex)).conj(),
    "frombuffer": lambda: torch.frombuffer(bytearray(24), dtype=torch.float32),
    "array": lambda: np.zeros((3, 2000)),
    "strided": lambda: np.zeros((2000, 3, 2), np.float32)[::-2, 1].T,
    "integers": lambda: np.zeros(5, np.int8),
    "objects": lambda: np.array([np.zeros(1), None], dtype=object),
    "bytes": lambda: bytearray(24),
}


def refill(buffer):
    """Changes one entry, as numpy does it: PyTorch sees that only of its own memory."""
    if isinstance(buffer, bytearray):
        buffer[-1] = 1
    elif isinstance(buffer, torch.Tensor) and buffer.untyped_storage().resizable():
        buffer[-1, -1] = 1.0
    else:
        values = buffer.resolve_conj().numpy() if isinstance(buffer, torch.Tensor) else buffer
        if isinstance(buffer, torch.Tensor) and buffer.is_conj():
            values = buffer.conj().numpy()
        if values.dtype.hasobject:
            values[0][-1] = 1
        else:
            values[(-1,) * values.ndim] = 1


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_refilled_buffer_is_seen_wherever_it_is(holder, buffer):
    memory = BUFFERS[buffer]()
    value = HOLDERS[holder](memory)
    before = versions_of(value)
    assert versions_of(value) == before
    refill(memory)
    assert versions_of(value) != before


def test_examples_that_change_places_are_seen():
    values = np.arange(6000.0).reshape(3, 2000)
    before = versions_of(values)
    values[:] = values[::-1].copy()
    assert versions_of(values) != before


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(1)],
        OrderedDict({0: torch.ones(1)}),
        deque([torch.ones(1)]),
        Wrapped({0: torch.ones(1)}),
        Fields(torch.ones(1)),
        Attributes(torch.ones(1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_receiver_may_change_its_containers(value):
    """What a loss exchanges in the containers that it is given is not exchanged in the batch."""
    before = versions_of([value])
    given = in_new_containers([value])[0]
    assert type(given) is type(value)
    if hasattr(value, "x"):
        given.x = torch.zeros(1)
        assert float(value.x) == 1.0
    else:
        given[0] = torch.zeros(1)
        assert float(value[0]) == 1.0
    assert versions_of([value]) == before


def test_an_object_that_is_not_copied_shows_what_is_exchanged():
    value = SimpleNamespace(x=torch.ones(1))
    before = versions_of(value)
    in_new_containers(value).x = torch.zeros(1)
    assert versions_of(value) != before


class Doubled(namedtuple("Doubled", ["x", "y"])):
    """Its constructor prepares an entry, and takes one argument."""

    def __new__(cls, x):
        return super().__new__(cls, 2 * x, x)


class Tagged(list):
    def __init__(self, entries, tag):
        super().__init__(entries)
        self.tag = tag

    def __getitem__(self, index):
        return 2 * super().__getitem__(index)


class Synchronised(dict):
    """Entries are attributes too, and numbers become tensors."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value + 1)
        self.__dict__[key] = value + 1


def test_containers_of_other_classes_keep_what_they_are():
    """Entries are not prepared again, and attributes stay, in subclasses of containers."""
    for rebuild in (in_new_containers, lambda value: map_tensors(value, torch.clone)):
        doubled = rebuild(Doubled(torch.ones(1)))
        assert (float(doubled.x), float(doubled.y)) == (2.0, 1.0)
        tagged = rebuild(Tagged([torch.ones(1)], tag="a"))
        assert (float(tagged[0]), tagged.tag) == (2.0, "a")
        value = Synchronised()
        value["x"] = torch.ones(1)
        assert (float(rebuild(value)["x"]), float(rebuild(value).x)) == (2.0, 2.0)
        result = rebuild(torch.max(torch.ones(2, 3), 1))
        assert result.values.tolist() == [1.0, 1.0]
    halves = map_tensors(value, lambda tensor: tensor / 2)
    assert float(halves["x"]) == float(halves.x) == 1.0


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


@pytest.mark.parametrize("kind", [torch.Tensor, Marked])
def test_tensors_have_the_same_values_only_if_all_have(kind):
    ones, others = ([torch.tensor([1.0, 2.0]).as_subclass(kind) for _ in "ab"] for _ in range(2))
    assert have_same_values(ones, others)
    others[1][0] = torch.nan
    assert not have_same_values(ones, others)
    ones[1][0] = torch.nan
    assert not have_same_values(ones, others)
    assert not have_same_values(ones[:1], [torch.ones(1)])  # (which would broadcast)


def test_a_norm_is_that_of_pytorch():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        tensor = torch.randn(100, dtype=dtype, requires_grad=True)
        assert norm_of(tensor) == float(tensor.norm())
    assert norm_of(torch.zeros(0)) == 0.0


WHOLE = torch.zeros(12)


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        (WHOLE[:6], WHOLE[6:], False),
        (WHOLE[:7], WHOLE[6:], True),
        (WHOLE, WHOLE[3:5], True),
        (WHOLE.view(3, 4), WHOLE.view(3, 4).t(), True),
        (WHOLE.view(3, 4)[:, 1], WHOLE.view(3, 4)[:, 2], False),  # interleaved
        (WHOLE[:0], WHOLE[:0], False),
        (torch.zeros(2, device="meta"), torch.zeros(2, device="meta"), False),
    ],
)
def test_memory_is_shared_where_ranges_overlap(one, other, share):
    between = {"one": one, "between": torch.zeros(3), "other": other}
    found = sharing_memory(between)
    assert (found is not None and set(found) == {"one", "other"}) == share
    assert share or found is None
