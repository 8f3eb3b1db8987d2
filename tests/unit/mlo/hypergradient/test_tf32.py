"""Tests of the switch that keeps differences out of TF32."""

import torch

import mlo
from mlo.hypergradient.tf32 import without_tf32


def test_displaced_gradients_are_computed_without_tf32(monkeypatch):
    """On a GPU; here the switch itself, with the settings of PyTorch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with without_tf32(torch.device("cuda"), allowed=False):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    for device, allowed in (("cuda", True), ("cpu", False)):
        with without_tf32(torch.device(device), allowed=allowed):
            assert torch.backends.cudnn.allow_tf32
    assert mlo.FiniteDifference(tf32=True) != mlo.FiniteDifference()
