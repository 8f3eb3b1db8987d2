"""Endless batches: passes, their ends, positions that can be saved, shares of processes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import mlo
from mlo.compat.betty.loading import Passes, moved


def shuffled(**options):
    return DataLoader(TensorDataset(torch.arange(10)), batch_size=4, shuffle=True, **options)


def drawn(passes, count):
    return [passes.next()[0].tolist() for _ in range(count)]


def test_passes_follow_each_other_and_their_ends_are_told():
    ends = []
    passes = Passes([1, 2, 3], "low", lambda: ends.append("end"))
    assert [passes.next() for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert ends == ["end", "end"]


def test_it_draws_like_a_loop_over_the_loader():
    torch.manual_seed(0)
    found = drawn(Passes(shuffled(), "low", lambda: None), 6)
    torch.manual_seed(0)
    loader = shuffled()
    assert found == [batch[0].tolist() for _ in range(2) for batch in loader]


@pytest.mark.parametrize("taken", [0, 2, 5])
@pytest.mark.parametrize("own", [False, True], ids=["global state", "a generator of its own"])
def test_a_position_is_found_again(taken, own):
    options = {"generator": torch.Generator().manual_seed(3)} if own else {}
    torch.manual_seed(1)
    passes = Passes(shuffled(**options), "low", lambda: None)
    torch.randn(7)  # others draw between the iterator and the first batch
    drawn(passes, taken)
    state, random = passes.state_dict(), torch.get_rng_state()
    rest = drawn(passes, 4)
    torch.manual_seed(99)
    other = Passes(shuffled(**options), "low", lambda: None)
    before = torch.get_rng_state()
    other.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(random)
    assert drawn(other, 4) == rest


def test_a_shorter_loader_cannot_resume():
    passes = Passes([1, 2, 3], "low", lambda: None)
    for _ in range(3):
        passes.next()
    with pytest.raises(mlo.CheckpointError, match=r"3 batches into a pass.*has only 2"):
        Passes([1, 2], "low", lambda: None).load_state_dict(passes.state_dict())


def test_an_empty_loader_is_told_of():
    with pytest.raises(mlo.ProblemError, match=r"'low': its train_data_loader yielded no batch"):
        Passes([], "low", lambda: None).next()


def test_processes_share_the_batches():
    loaders = [Passes([1, 2, 3, 4], "low", lambda: None, (rank, 2)) for rank in (0, 1)]
    assert [[loader.next() for _ in range(2)] for loader in loaders] == [[1, 3], [2, 4]]


def test_a_batch_has_bettys_form():
    x = torch.ones(2)
    assert moved([x, "label"], "cpu") == (x, "label")
    batch = {"x": x, "n": 3}
    assert moved(batch, "cpu") is batch
