"""Random states: captured, replayed and left alone, for every source that a loss may draw from."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

from mlo.errors import CheckpointError
from mlo.randomness import RandomState, _PythonState, forked, preserved, replayed


def draw():
    return (
        float(torch.rand(())),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
    )


@pytest.fixture(autouse=True)
def _states_of_this_test():
    with preserved():
        yield


@pytest.mark.parametrize("normals", [0, 1, 2, 3])
def test_what_was_drawn_is_drawn_again_and_leaves_no_trace(normals):
    """After an odd number of normals numpy holds a second one back, which its words do not show."""
    np.random.seed(normals)
    np.random.randn(normals)
    state = RandomState.capture()
    first, second = draw(), draw()
    after = RandomState.capture()
    third = draw()
    for _ in range(2):
        with replayed(state):
            assert (draw(), draw(), draw()) == (first, second, third)
        with replayed(after):
            assert draw() == third
    fourth = draw()
    with replayed(after):
        assert (draw(), draw()) == (third, fourth)


def test_a_state_set_from_outside_is_seen():
    state = RandomState.capture()
    expected = float(np.random.rand())
    np.random.seed(7)  # the words change without a draw
    other = RandomState.capture()
    seventh = float(np.random.rand())
    with replayed(state):
        assert float(np.random.rand()) == expected
    with replayed(other):
        assert float(np.random.rand()) == seventh


def test_another_bit_generator_of_numpy_is_replayed_too():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = RandomState.capture()
        expected = draw()
        with replayed(state):
            assert draw() == expected
    finally:
        np.random.set_bit_generator(before)


def test_a_state_survives_its_plain_form():
    np.random.seed(1)
    np.random.randn(1)
    state = RandomState.capture()
    expected = draw()
    with replayed(RandomState.from_state_dict(state.state_dict())):
        assert draw() == expected


def test_what_a_body_draws_leaves_no_trace():
    before = RandomState.capture()
    with preserved():
        inside = draw()
    after = draw()
    with replayed(before):
        assert draw() == after == inside


def test_generators_of_ones_own_are_replayed_too():
    generator = torch.Generator().manual_seed(3)
    state = RandomState.capture([generator])
    first = float(torch.rand((), generator=generator))
    with replayed(state, [generator]):
        assert float(torch.rand((), generator=generator)) == first
    assert float(torch.rand((), generator=generator)) != first
    with pytest.raises(ValueError, match=r"shorter|longer"):
        state.restore()


def test_each_branch_has_numbers_of_its_own():
    def branch(number):
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(7)
        with forked(number, [generator]):
            return *draw(), float(torch.rand((), generator=generator))

    first, second = branch(0), branch(1)
    assert branch(0) == first
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_branches_are_in_one_state_again_afterwards():
    """Whatever a branch draws, it has taken one number of torch's global generator."""
    after = []
    for number, draws in ((0, 1), (1, 5)):
        torch.manual_seed(7)
        with forked(number):
            for _ in range(draws):
                draw()
        after.append(float(torch.rand(())))
    assert after[0] == after[1]


def test_a_state_of_another_bit_generator_has_no_plain_form():
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        with pytest.raises(CheckpointError, match="PCG64"):
            RandomState.capture().state_dict()
    finally:
        np.random.set_bit_generator(before)


# ------------------------------ GPUs, pretended by generators on the CPU


@pytest.fixture
def gpus(monkeypatch):
    """Makes `torch.cuda` see as many GPUs as a test asks for, the current one among them."""

    def pretend(count, current=0):
        generators = tuple(torch.Generator().manual_seed(7 + index) for index in range(count))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(
            torch.cuda, "get_rng_state_all", lambda: [g.get_state() for g in generators]
        )
        monkeypatch.setattr(
            torch.cuda, "set_rng_state", lambda state, index: generators[index].set_state(state)
        )
        return generators

    return pretend


def test_every_gpu_is_replayed_within_a_process(gpus):
    first, second = gpus(2)
    state = RandomState.capture()
    drawn = [float(torch.rand((), generator=g)) for g in (first, second)]
    with replayed(state):
        assert [float(torch.rand((), generator=g)) for g in (first, second)] == drawn
    assert float(torch.rand((), generator=first)) != drawn[0]


def test_a_saved_state_is_that_of_the_runs_own_gpu(gpus):
    """Process 0 saves; process 1, on another GPU, resumes with the noise that both shared."""
    own, _ = gpus(2, current=0)
    saved = RandomState.capture().state_dict()
    assert len(saved["cuda"]) == 1
    noise = float(torch.rand((), generator=own))
    _, own = gpus(2, current=1)
    RandomState.from_state_dict(saved).restore()
    assert float(torch.rand((), generator=own)) == noise


def test_a_state_of_more_gpus_is_restored_on_one(gpus):
    first, _ = gpus(2)
    saved = RandomState.capture().state_dict(gpus=[0, 1])
    noise = float(torch.rand((), generator=first))
    (only,) = gpus(1)
    RandomState.from_state_dict(saved).restore()
    assert float(torch.rand((), generator=only)) == noise
    without_cuda = {**saved, "cuda": []}
    RandomState.from_state_dict(without_cuda).restore()


def test_a_state_is_read_in_full_only_after_a_draw():
    first, again = RandomState.capture(), RandomState.capture()
    assert again.python is first.python and again.numpy is first.numpy
    random.random()
    np.random.rand()
    after = RandomState.capture()
    assert after.python is not first.python and after.numpy is not first.numpy
    assert after.python == random.getstate()


def test_a_second_normal_of_python_is_no_draw_of_its_words():
    random.seed(3)
    random.gauss(0, 1)  # holds a second one back
    state = RandomState.capture()
    expected = random.gauss(0, 1)
    with replayed(state):
        assert random.gauss(0, 1) == expected
    assert RandomState.capture().python == random.getstate()


def test_without_its_memory_pythons_state_is_read_in_full(monkeypatch):
    monkeypatch.setattr(sys.implementation, "name", "other")
    kept = _PythonState()
    before = kept.read()
    random.random()
    assert kept.read() == random.getstate() != before
    kept.write(before)
    assert random.getstate() == before
