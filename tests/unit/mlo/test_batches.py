"""Streams of batches: passes, positions, looking ahead."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import mlo
from mlo.batches import BatchStream


def test_a_stream_begins_again_when_it_is_exhausted():
    stream = BatchStream([1, 2, 3], "w")
    assert [stream.next() for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_a_generator_that_is_used_up_is_named():
    stream = BatchStream((k for k in range(2)), "w")
    assert stream.peek(1) == (0,)
    assert [stream.next(), stream.next()] == [0, 1]
    with pytest.raises(mlo.ProblemError, match="exhausted generator"):
        stream.next()


def test_peeking_changes_neither_position_nor_random_state():
    loader = DataLoader(torch.arange(10), batch_size=3, shuffle=True)
    stream = BatchStream(loader, "w")
    torch.manual_seed(0)
    ahead = stream.peek(2)
    taken = (stream.next(), stream.next())
    assert all(torch.equal(a, b) for a, b in zip(ahead, taken, strict=True))
    state = torch.get_rng_state()
    ahead = stream.peek(3)
    assert torch.equal(state, torch.get_rng_state())
    taken = [stream.next() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(ahead[:2], taken, strict=True))


def test_a_position_beyond_the_data_is_refused():
    stream = BatchStream([1, 2, 3], "w")
    stream.next(), stream.next(), stream.next()
    with pytest.raises(mlo.CheckpointError, match="after 3 batches"):
        BatchStream([1], "w").load_state_dict(stream.state_dict())


def test_no_data_are_batches_of_none():
    stream = BatchStream(None, "w")
    assert (stream.next(), stream.peek(2)) == (None, (None, None))


def test_data_without_batches_are_refused():
    with pytest.raises(mlo.ProblemError, match="'w': its data yielded no batch"):
        BatchStream([], "w").next()


class Numbers:
    """Data that keep their own position."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            self.position += 1
            yield self.position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_data_that_keep_their_position_are_asked_for_it():
    stream = BatchStream(Numbers(), "w")
    assert [stream.next() for _ in range(3)] == [1, 2, 3]
    assert stream.peek(2) == (4, 5)
    later = BatchStream(Numbers(), "w")
    later.load_state_dict(stream.state_dict())
    assert [later.next(), stream.next()] == [4, 4]


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_a_shuffled_pass_is_resumed_in_its_middle(taken, own):
    def stream():
        generator = torch.Generator().manual_seed(5) if own else None
        return BatchStream(
            DataLoader(torch.arange(8), batch_size=2, shuffle=True, generator=generator), "w"
        )

    torch.manual_seed(0)
    first = stream()
    for _ in range(taken):
        first.next()
    state, random_state = first.state_dict(), torch.get_rng_state()
    expected = [first.next() for _ in range(6)]
    second = stream()
    second.load_state_dict(state)
    torch.set_rng_state(random_state)
    found = [second.next() for _ in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_loading_a_position_leaves_the_random_state_alone():
    stream = BatchStream(DataLoader(torch.arange(8), batch_size=2, shuffle=True), "w")
    stream.next()
    state, before = stream.state_dict(), torch.get_rng_state()
    stream.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
