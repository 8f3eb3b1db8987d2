"""Torch's defaults inside a program that has set others."""

from __future__ import annotations

import pytest
import torch
from callers_torch import CALLERS, caller

from lfmcw_app.usual_torch import usual_torch


def defaults():
    """What decides how a tensor is made, how a product is computed, and if it is differentiable."""
    product = torch.ones(1, 1, device="cpu", requires_grad=True) @ torch.ones(1, 1, device="cpu")
    made = torch.ones(1)
    return (
        made.dtype, made.device.type, made.is_inference(), product.dtype, product.requires_grad,
        torch.get_default_dtype(), torch.get_default_device().type,
        torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
    )  # fmt: skip


@pytest.mark.parametrize("name", CALLERS)
def test_the_body_has_torchs_own_defaults(name):
    usual = defaults()
    with caller(name):
        outside = defaults()
        assert outside != usual
        with usual_torch():
            assert defaults() == usual
        assert defaults() == outside
        with pytest.raises(KeyError), usual_torch():
            raise KeyError
        assert defaults() == outside
    assert defaults() == usual


def test_random_states_are_left_alone():
    """Another thread may draw meanwhile, and must not get the same numbers again."""
    torch.manual_seed(1)
    expected = torch.rand(()), torch.rand(())
    torch.manual_seed(1)
    with usual_torch():
        assert torch.rand(()) == expected[0]
    assert torch.rand(()) == expected[1]
