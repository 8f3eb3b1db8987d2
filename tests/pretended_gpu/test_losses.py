"""The class-weighted losses on a GPU for which Triton makes no kernels."""

from __future__ import annotations

import warnings

import pytest
import torch

from lfmcw_app.ops import class_weighted_cross_entropy, classwise_cross_entropy, rows


@pytest.fixture(params=["composition", "analytic"])
def eager(request, monkeypatch):
    monkeypatch.setenv("LFMCW_OPS", "eager")
    monkeypatch.setattr(rows, "ANALYTIC_FROM", 0 if request.param == "analytic" else 1 << 60)


def logits(count=4, classes=3):
    values = torch.arange(float(count * classes)).sin().view(count, classes)
    return values.to("cuda").requires_grad_()


@pytest.mark.parametrize("label", [-1, -100, 3, 7])
def test_a_label_out_of_range_does_not_stop_the_device(eager, gpu, label):
    """The loss and the derivatives of its row are NaN, and the CPU does not wait to see it."""
    x, y = logits(), torch.tensor([0, label, 1, 2]).to("cuda")
    w, v = (torch.ones(shape, device="cuda") for shape in (3, (4, 3)))
    with gpu.watched() as seen:
        loss = class_weighted_cross_entropy(x, y, w, reduction="none")
        (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * v).sum(), x)
        means, _ = classwise_cross_entropy(x, y)
    assert seen.waits == []
    for part in (loss, first, second):
        assert part.cpu()[1].isnan().all()
        assert part.cpu()[[0, 2, 3]].isfinite().all()
    assert means.cpu().isnan().all()
    kept = class_weighted_cross_entropy(x, y, w, ignore_index=label)
    assert float(kept.isfinite() if label < 0 else kept.isnan() | kept.isfinite())


def test_it_is_what_it_is_on_a_cpu(eager):
    x, y = logits(), torch.tensor([0, 2, 1, 2])
    w = torch.tensor([0.5, 1.0, 2.0])
    found = class_weighted_cross_entropy(x, y.to("cuda"), w.to("cuda"), label_smoothing=0.1)
    expected = class_weighted_cross_entropy(x.detach().cpu(), y, w, label_smoothing=0.1)
    torch.testing.assert_close(found.detach().cpu(), expected)


def test_without_a_launcher_the_losses_take_pytorchs_operations(monkeypatch):
    """A launch is tried once per device; what fails is said once. (Here there is no driver.)"""
    pytest.importorskip("triton")
    monkeypatch.delenv("LFMCW_OPS", raising=False)
    rows._can_launch.cache_clear()
    x, y, w = logits(), torch.zeros(4, dtype=torch.long, device="cuda"), torch.ones(3).to("cuda")
    with pytest.warns(RuntimeWarning, match="Triton cannot start a kernel on cuda:0"):
        first = class_weighted_cross_entropy(x, y, w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = class_weighted_cross_entropy(x, y, w)
    assert torch.equal(first, second) and first.isfinite()
