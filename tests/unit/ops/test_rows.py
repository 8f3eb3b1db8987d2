"""Cross entropy of each row: the formulations agree, and which one is taken.

Derivatives of every order, strides and dtypes are tried in test_class_weighted.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.ops import rows
from lfmcw_app.ops.rows import row_cross_entropy


@pytest.fixture(autouse=True)
def _as_by_default(monkeypatch):
    monkeypatch.delenv("LFMCW_OPS", raising=False)


def example(count=5, classes=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.arange(count) % classes


@pytest.mark.parametrize("threshold", [0, 1 << 60], ids=["analytic", "composition"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_each_row_has_its_own_cross_entropy(threshold, smoothing, monkeypatch):
    monkeypatch.setattr(rows, "ANALYTIC_FROM", threshold)
    x, y = example()
    found = row_cross_entropy(x, y, smoothing)
    expected = F.cross_entropy(x, y, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(5.0, dtype=torch.float64)
    (slope,) = torch.autograd.grad(found @ weights, x)
    (exact,) = torch.autograd.grad(expected @ weights, x)
    torch.testing.assert_close(slope, exact)


def test_large_logits_take_the_analytic_formulas(monkeypatch):
    taken = []
    forward = rows._eager.forward
    monkeypatch.setattr(
        rows._eager, "forward", lambda *arguments: taken.append(1) or forward(*arguments)
    )
    x, y = example()
    row_cross_entropy(x, y)
    assert not taken
    monkeypatch.setattr(rows, "ANALYTIC_FROM", x.numel())
    row_cross_entropy(x, y)
    assert taken


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_at_least_in_single_precision(dtype):
    x, y = example()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert row_cross_entropy(x.detach().to(dtype), y).dtype == expected


def test_rows_of_batches_are_one_longer_list_of_rows():
    x, y = example(6)
    batched = torch.func.vmap(row_cross_entropy)(x.detach().view(2, 3, 4), y.view(2, 3))
    torch.testing.assert_close(batched.flatten(), row_cross_entropy(x.detach(), y))


def test_no_rows_have_no_entropies():
    assert row_cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_an_unknown_formulation_is_refused(monkeypatch):
    monkeypatch.setenv("LFMCW_OPS", "cuda")
    with pytest.raises(InputError, match="must be eager or triton, got 'cuda'"):
        row_cross_entropy(*example())


def test_a_version_without_the_old_vmap_is_not_asked_for_it(monkeypatch):
    monkeypatch.delattr(torch._C._functorch, "is_legacy_batchedtensor")
    monkeypatch.setattr(rows, "ANALYTIC_FROM", 0)
    x, y = example()
    found = row_cross_entropy(x, y)
    expected = F.cross_entropy(x, y, reduction="none")
    assert torch.allclose(found, expected)
    gradients = [torch.autograd.grad(each.sum(), x)[0] for each in (found, expected)]
    assert torch.allclose(*gradients)
