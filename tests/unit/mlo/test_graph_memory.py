"""What autograd saves is counted, and compared with the memory of the device."""

from __future__ import annotations

import pytest
import torch

from mlo.graph_memory import SavedBytes, fits, memory_of, refuses_counting


def test_what_autograd_saves_is_counted_once():
    weight = torch.nn.Parameter(torch.ones(10, 10))
    x = torch.ones(5, 10)
    with SavedBytes([weight, x]) as saved:
        hidden = (x @ weight).exp()  # saves x, the weight and its result of 5 × 10 floats
        (hidden * hidden).sum()  # the result twice more
    assert saved.total == 5 * 10 * 4


def test_without_what_is_there_anyway_nothing_counts():
    weight = torch.nn.Parameter(torch.ones(10))
    with SavedBytes([]) as saved:
        weight * weight
    assert saved.total == 40
    with SavedBytes([weight]) as saved:
        weight * weight
    assert saved.total == 0


def test_a_function_apart_is_not_counted():
    weight = torch.nn.Parameter(torch.ones(10))

    def square(tensor):
        return tensor.exp()

    with SavedBytes([weight]) as saved:
        saved.apart(square)(weight)
        assert saved.total == 0
        square(weight)
    assert saved.total == 40


def test_derivatives_are_the_same_under_the_count():
    weight = torch.nn.Parameter(torch.ones(3))
    with SavedBytes([]):
        loss = weight.exp().sum()
    (found,) = torch.autograd.grad(loss, weight)
    assert torch.equal(found, weight.detach().exp())


@pytest.mark.parametrize(("saved", "kept"), [(100, True), (101, False)])
def test_it_fits_where_the_memory_holds_it_four_times(monkeypatch, saved, kept):
    """The graph of a gradient is about three times what the forward pass saves."""
    monkeypatch.setattr("mlo.graph_memory.memory_of", lambda device: 1200)
    assert fits(saved, torch.device("cpu")) is kept


def test_a_device_of_unknown_memory_holds_nothing():
    assert memory_of(torch.device("meta")) == 0
    assert not fits(1, torch.device("meta"))
    # Storages there have no places, so that the count of what is saved says nothing.
    assert not fits(0, torch.device("meta"))
    assert memory_of(torch.device("cpu")) > 2**27


def test_what_a_counted_function_saves_is_counted():
    x = torch.ones(4, requires_grad=True)
    saved = SavedBytes([])
    x.exp().square()
    assert saved.total == 0
    assert torch.equal(saved.counted(lambda t: t.exp())(x), x.exp())
    assert saved.total == 4 * x.element_size()


def test_what_cannot_be_counted_does_not_fit():
    """Tensors within `torch.func.jvp` may have no storage, and `jacrev` allows no count."""
    net, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    saved = SavedBytes([])
    outside = torch.nn.Parameter(torch.ones(3))
    with saved:
        torch.func.jvp(lambda rows: net(rows) @ outside[:2], (x,), (x,))
    assert saved.total > 0
    assert not fits(float("inf"), torch.device("cpu"))
    with pytest.raises(RuntimeError) as refused, SavedBytes([]):
        torch.func.jacrev(net)(x)
    assert refuses_counting(refused.value)
    assert not refuses_counting(RuntimeError("out of memory"))
