"""Streams of batches: passes, positions, looking ahead."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import mlo
from mlo.batches import BatchStream
from mlo.testing import Vector


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


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(range(4))


@pytest.mark.parametrize("size", [2, None])
def test_loaders_of_iterable_data_sets_are_drawn_from(size):
    # Their iterator has no truth value: its `__len__` raises a TypeError.
    loader = DataLoader(Streamed(), batch_size=size)
    stream = BatchStream(loader, "w")
    expected = [batch.tolist() if size else batch for batch in [*loader, *loader]]
    ahead = stream.peek(2)
    drawn = [stream.next() for _ in expected]
    assert [batch.tolist() if size else batch for batch in drawn] == expected
    assert [torch.as_tensor(batch).tolist() for batch in ahead] == expected[:2]


class Prefetched:
    """An iterator that holds one batch; its length is what is left to fetch."""

    def __init__(self, batches):
        self.left = list(batches)
        self.held = self.left.pop(0)

    def __iter__(self):
        return self

    def __len__(self):
        return len(self.left)

    def __next__(self):
        if self.held is None:
            raise StopIteration
        batch, self.held = self.held, self.left.pop(0) if self.left else None
        return batch


class PrefetchedData:
    def __iter__(self):
        return Prefetched([1, 2, 3])


def test_the_last_batch_of_a_prefetching_iterator_is_drawn():
    stream = BatchStream(PrefetchedData(), "w")
    assert [stream.next() for _ in range(5)] == [1, 2, 3, 1, 2]


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


class Counter(Numbers):
    """The same, as an iterator."""

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return self.position


@pytest.mark.parametrize(
    "make",
    [Numbers, Counter, lambda: list(range(1, 9)), lambda: [1, 2, 3]],
    ids=["own position", "iterator", "list", "passes"],
)
@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_batches_that_were_put_back_come_next(make, drawn, ahead):
    def stream(count):
        found = BatchStream(make(), "w")
        for _ in range(count):
            found.next()
        return found

    expected = stream(drawn)
    expected = [expected.next() for _ in range(6)]
    found = stream(drawn)
    taken = found.take(2)
    assert list(taken.batches) == expected[:2]
    found.put_back(taken)
    assert list(found.peek(ahead)) == expected[:ahead]
    # A saved position has them too, now and when only some were taken again.
    for k in range(4):
        resumed = BatchStream(make(), "w")
        resumed.load_state_dict(found.state_dict())
        assert [resumed.next() for _ in range(3)] == expected[k : k + 3]
        assert found.peek(1) == (expected[k],)
        assert found.next() == expected[k]


class Interrupted(Exception):
    """As a key press would."""


def test_a_draw_that_fails_takes_nothing():
    class Breaking(Numbers):
        breaks = True

        def __iter__(self):
            for number in super().__iter__():
                if number == 3 and self.breaks:
                    self.breaks, self.position = False, 2
                    raise Interrupted
                yield number

    stream = BatchStream(Breaking(), "w")
    stream.next()
    with pytest.raises(Interrupted):
        stream.take(3)
    assert stream.state_dict() == {"data": {"position": 1}}
    stream._iterator = None  # the generator ended with its error
    assert stream.take(3).batches == (2, 3, 4)


def test_a_loader_that_refills_one_buffer_is_refused():
    def refilled():
        batch = torch.zeros(1)
        while True:
            yield batch.add_(1.0)

    with pytest.raises(mlo.ProblemError, match="changed in place after it was drawn"):
        BatchStream(refilled(), "w").take(2)


def test_a_loader_that_refills_one_array_is_refused():
    def refilled():
        batch = np.zeros(1)
        while True:
            batch += 1.0
            yield {"x": torch.from_numpy(batch)}

    with pytest.raises(mlo.ProblemError, match=r"or arrays \(batch\.copy\(\)\)"):
        BatchStream(refilled(), "w").take(2)


def test_a_loader_may_refill_one_container():
    def refilled():
        batch = {}
        for k in range(3):
            batch["x"], batch["k"] = torch.tensor(k), [k]
            yield batch

    batches = BatchStream(refilled(), "w").take(3).batches
    assert [(int(batch["x"]), batch["k"]) for batch in batches] == [(0, [0]), (1, [1]), (2, [2])]


@pytest.mark.filterwarnings("ignore::mlo.CheckpointWarning")  # inside a round
@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupted_update_is_resumed_with_its_batches(at):
    """Its own and those of its solves: in the same optimizer, and from its state."""
    calls = [0]

    def loss(own, batch, **reads):
        calls[0] += 1
        if calls[0] == at:
            raise Interrupted
        value = (own.v - 2.0 * sum(other.v for other in reads.values())).square().sum()
        return value, {"batch": float(batch)}

    def optimizer():
        problems = []
        for name, read in (("w", "x"), ("x", "w")):
            module = Vector(torch.ones(2, dtype=torch.float64))
            problems.append(
                mlo.Problem(
                    name,
                    module=module,
                    optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                    loss=loss,
                    reads=(read,),
                    data=Numbers(),
                    accumulate=2,
                    solve_data=Numbers() if name == "w" else None,
                    solve_batches=2 if name == "w" else 1,
                )
            )
        return mlo.MultilevelOptimizer(problems, {"name": "neumann", "tol": 1.0})

    same = optimizer()
    with pytest.raises(Interrupted):
        same.step()
    resumed = optimizer()
    resumed.load_state_dict(same.state_dict())
    for each in (same, resumed):
        first, second = each.step(), each.step()
        assert first.metrics["x"] == {"batch": 1.5}
        assert second.metrics == {"w": {"batch": 3.5}, "x": {"batch": 3.5}}
        drawn = [problem.data for problem in each.problems.values()]
        drawn.append(each.problems["w"].solve_data)
        assert [data.position for data in drawn] == [4, 4, 4]


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


@pytest.mark.parametrize("taken", [2, 4, 6])
def test_a_loader_with_lasting_workers_is_resumed(taken):
    """Its first pass draws a seed for the workers before the order; later ones do not."""

    def stream():
        torch.manual_seed(1)
        loader = DataLoader(
            torch.arange(12), batch_size=3, shuffle=True, num_workers=1, persistent_workers=True
        )
        return BatchStream(loader, "w")

    whole = stream()
    for _ in range(taken):
        whole.next()
    ahead = whole.peek(1)[0].tolist()  # in the same process, where the workers are there
    position, random = whole.state_dict(), torch.get_rng_state()
    expected = [whole.next().tolist() for _ in range(5)]
    assert ahead == expected[0]

    resumed = stream()
    resumed.load_state_dict(position)
    torch.set_rng_state(random)
    assert [resumed.next().tolist() for _ in range(5)] == expected


class OwnOrder:
    """Draws its order from a random source that no state knows."""

    def __init__(self, seed=None):
        self.seed = seed

    def __iter__(self):
        order = np.random.default_rng(self.seed).permutation(1000)
        return iter(torch.from_numpy(order).split(100))


@pytest.mark.parametrize("seed", [None, 0])
def test_data_that_come_again_in_another_order_are_told(seed):
    stream, resumed = BatchStream(OwnOrder(seed), "w"), BatchStream(OwnOrder(seed), "w")
    stream.next()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resumed.load_state_dict(stream.state_dict())
    assert [str(w.message)[:48] for w in said] == (
        ["Problem 'w': its data gave another batch when th"] if seed is None else []
    )


def test_positions_that_cannot_be_told_are_found_again():
    """A loader may have both methods and no state, as Accelerate's; or take it for all passes."""

    class Prepared:
        def __iter__(self):
            return iter([1, 2, 3])

        def state_dict(self):
            return self.inner_state

        def load_state_dict(self, state):
            self.inner_state = state

    class Streaming(Prepared):
        start = 0

        def __iter__(self):
            return iter([1, 2, 3][self.start :])

        def state_dict(self):
            return 2

        def load_state_dict(self, state):
            self.start = state

    Streaming.__module__ = "datasets.iterable_dataset"
    for data in (Prepared, Streaming):
        stream, resumed = BatchStream(data(), "w"), BatchStream(data(), "w")
        assert [stream.next(), stream.next()] == [1, 2]
        resumed.load_state_dict(stream.state_dict())
        assert [resumed.next() for _ in range(4)] == [3, 1, 2, 3]
