"""The norm of a gradient: its number, what counts as finite, and that later changes miss it."""

from __future__ import annotations

import pytest
import torch

from mlo.gradient_norm import GradientNorm, norms_of, total_norm


def norm_of(*values, dtype=torch.float32):
    return GradientNorm([torch.tensor(value, dtype=dtype) for value in values])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_pytorchs_bit_for_bit(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 4).to(dtype), torch.randn(7).to(dtype), torch.randn(()).to(dtype)]
    expected = torch.nn.utils.get_total_norm(tensors)
    assert torch.equal(GradientNorm(tensors).total, expected)
    assert torch.equal(total_norm(tensors), expected)
    for found, tensor in zip(norms_of(tensors), tensors, strict=True):
        assert torch.equal(found, tensor.norm())


def test_tensors_of_several_dtypes_are_combined():
    tensors = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)]
    assert float(GradientNorm(tensors)) == 5.0


def test_of_no_tensors_it_is_zero():
    assert float(GradientNorm([])) == 0.0


def test_it_is_of_the_moment_at_which_it_was_taken():
    tensor = torch.tensor([3.0, 4.0])
    norm = GradientNorm([tensor, torch.zeros(2)])
    tensor.zero_()
    assert float(norm) == 5.0


def test_no_graph_hangs_on_it():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not GradientNorm([parameter, parameter * 2.0]).total.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf")])
def test_one_lost_number_is_enough(lost, dtype):
    fine = torch.tensor(1.0)
    assert norm_of(1.0, 2.0, dtype=dtype).is_finite([fine, fine])
    assert not norm_of(1.0, lost, dtype=dtype).is_finite([fine])
    assert not norm_of(1.0, 2.0, dtype=dtype).is_finite([fine, torch.tensor(lost)])


def test_large_numbers_are_finite_unless_their_norm_overflows():
    large = torch.tensor(3e38)
    assert norm_of(1e18, 1e18).is_finite([large, large])
    assert not norm_of(3e38, 3e38).is_finite([large])
