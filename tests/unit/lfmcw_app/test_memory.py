"""Memory that ends: recognised, and told with what takes less."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from lfmcw_app import memory
from lfmcw_app.errors import InputError
from lfmcw_app.memory import enough_memory, memory_of, out_of_memory
from lfmcw_app.recipe_loading import load_recipe

CPU = torch.device("cpu")


def too_large_for_torch():
    torch.empty(2**60, dtype=torch.uint8)


def too_large_for_numpy():
    np.empty(2**60, dtype=np.uint8)


@pytest.mark.parametrize("allocate", [too_large_for_torch, too_large_for_numpy])
def test_an_allocation_that_fails_is_recognised(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_what_libraries_say_is_recognised(error):
    assert out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(28, "No space"), ValueError()])
def test_other_errors_pass(error):
    assert not out_of_memory(error)
    recipe = load_recipe("smoke")
    with pytest.raises(type(error)) as caught, enough_memory("search", recipe, CPU):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("data", r"This machine .* in reading the data .*Lower data\.image_size \(now 16\)"),
        ("search", r"in the search .*search\.checkpointing=true.*search\.batch_size \(now 32\)"),
        ("training", r"training of the derived network .*evaluation\.batch_size \(now 32\)"),
    ],
)
def test_the_error_names_phase_and_sizes(phase, words, tmp_path):
    recipe = load_recipe("smoke")
    with pytest.raises(InputError, match=words), enough_memory(phase, recipe, CPU):
        too_large_for_torch()
    gpu = torch.device("cuda")
    stands = rf"The GPU .* The last checkpoint in {tmp_path} stands"
    if phase != "data":
        with (
            pytest.raises(InputError, match=stands),
            enough_memory(phase, recipe, gpu, resumes=tmp_path),
        ):
            too_large_for_torch()


def test_what_is_set_already_is_not_advised():
    settings = {"search.checkpointing": True, "search.order": "first"}
    recipe = load_recipe("smoke", overrides=settings)
    with pytest.raises(InputError) as caught, enough_memory("search", recipe, CPU):
        raise MemoryError
    assert "checkpointing" not in str(caught.value)
    assert "order" not in str(caught.value)


def test_the_least_of_all_limits_counts(monkeypatch):
    assert memory_of(CPU) is None or memory_of(CPU) > 10**8
    limits = {"_machine": 16 * 10**9, "_control_group": 4 * 10**9, "_limit": None}
    for name, value in limits.items():
        monkeypatch.setattr(memory, name, lambda value=value: value)
    assert memory_of(CPU) == 4 * 10**9
    for name in limits:
        monkeypatch.setattr(memory, name, lambda: None)
    assert memory_of(CPU) is None
