"""Tests of the switch that keeps differences out of TF32."""

import subprocess
import sys

import pytest
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


SETTINGS = {
    "as it is": "pass",
    "the old way": "matmul.allow_tf32 = cudnn.allow_tf32 = True",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "the new way": "matmul.fp32_precision = cudnn.conv.fp32_precision = 'tf32'",
    "convolutions only": "cudnn.conv.fp32_precision = 'ieee'",
    "all of it": "torch.backends.fp32_precision = 'tf32'",
}

PROGRAM = """
import torch
from mlo.hypergradient.tf32 import without_tf32

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
{setting}

def readings():
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: cudnn.allow_tf32,
        *(lambda b=b: b.fp32_precision for b in (matmul, cudnn.conv, cudnn.rnn)),
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return found

before = readings()
with without_tf32(torch.device("cuda"), allowed=False):
    within = readings()
    assert "tf32" not in within[2:] and within[0] in ("highest", "mixed"), within
assert readings() == before, (before, readings())
"""


@pytest.mark.slow  # each imports PyTorch
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_whichever_way_a_program_sets_precisions_they_come_back(setting):
    """Of a process, in which PyTorch refuses to mix the ways."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this version of PyTorch has the old way only")
    program = PROGRAM.format(setting=setting)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
