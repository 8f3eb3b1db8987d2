"""Random states: captured, replayed and left alone, for every source that a loss may draw from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mlo.randomness import RandomState, preserved, replayed


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
