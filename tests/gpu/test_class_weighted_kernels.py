"""The Triton kernels of the class-weighted losses on hardware."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lfmcw_app.ops import class_weighted_cross_entropy, classwise_cross_entropy


def case(device, rows, columns, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)
    w = torch.rand(columns, device=device, dtype=dtype, requires_grad=True)
    return x, w, torch.randint(columns, (rows,), device=device)


def derivatives(loss, x, w):
    """Value, gradients, and the gradients of a product with them."""
    value = loss(x, w)
    gradients = torch.autograd.grad(value, (x, w), create_graph=True)
    product = (gradients[0] * x.detach().sin()).sum() + (gradients[1] * w.detach().cos()).sum()
    return [value.detach(), *(g.detach() for g in gradients), *torch.autograd.grad(product, (x, w))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize(
    "shape", [(1, 2), (64, 100), (1000, 10), (513, 1000), (3, 20_000), (2, 100_000)], ids=str
)
def test_kernels_equal_the_composition_in_double_precision(
    device, shape, dtype, tolerance, smoothing
):
    x, w, y = case(device, *shape, dtype=dtype)
    found = derivatives(
        lambda x, w: class_weighted_cross_entropy(x, y, w, label_smoothing=smoothing), x, w
    )

    def reference(x, w):
        return (F.cross_entropy(x, y, reduction="none", label_smoothing=smoothing) * w[y]).mean()

    doubles = [t.detach().double().requires_grad_() for t in (x, w)]
    for a, b in zip(found, derivatives(reference, *doubles), strict=True):
        assert torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance)


def test_gradcheck_and_gradgradcheck_on_the_device(device):
    x, w, y = case(device, 5, 4, torch.float64)
    loss = lambda x, w: class_weighted_cross_entropy(x, y, w)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (x, w), check_fwd_over_rev=True)


def test_results_repeat_bit_for_bit(device):
    x, w, y = case(device, 4096, 100)
    for loss in (
        lambda x, w: class_weighted_cross_entropy(x, y, w),
        lambda x, w: (classwise_cross_entropy(x, y)[0] * w).sum(),
    ):
        first = derivatives(loss, x, w)
        for _ in range(20):
            assert all(
                torch.equal(a, b) for a, b in zip(first, derivatives(loss, x, w), strict=True)
            )


def test_nothing_waits_for_the_device(device):
    x, w, y = case(device, 64, 100)
    ignored = torch.where(y == 3, -1, y)

    def run():
        means, counts = classwise_cross_entropy(x, y)
        weighted = class_weighted_cross_entropy(x, ignored, w, ignore_index=-1)
        return (
            derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w),
            means,
            counts,
            weighted,
        )

    run()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_captures_it(device):
    x, w, y = case(device, 64, 100)

    def run():
        return derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    expected = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_offsets_beyond_two_to_the_31(device):
    rows, columns = 70_000, 32_768  # 2.3e9 entries, 4.6 GB in bf16
    if torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.zeros(rows, columns, device=device, dtype=torch.bfloat16)
    x[-1, 5] = 3.0
    x.requires_grad_()
    y = torch.zeros(rows, device=device, dtype=torch.long)
    y[-1] = 5
    loss = class_weighted_cross_entropy(x, y, torch.ones(columns, device=device), reduction="none")
    row = torch.zeros(1, columns, device=device)
    row[0, 5] = 3.0
    assert torch.allclose(loss[-1], F.cross_entropy(row, torch.tensor([5], device=device)))
    (gradient,) = torch.autograd.grad(loss[-1], x)
    assert torch.allclose(
        gradient[-1].float(), row.softmax(1)[0] - F.one_hot(y[-1], columns), atol=1e-2
    )


def test_a_label_out_of_range_does_not_stop_the_device(device):
    """A label out of range is NaN and does not stop the device."""
    x, w, y = case(device, 8, 10)
    y[3] = 10
    assert class_weighted_cross_entropy(x, y, w).isnan()
    assert classwise_cross_entropy(x, y)[0].isnan().all()
    y[3] = -1
    assert class_weighted_cross_entropy(x, y, w).isnan()
    assert class_weighted_cross_entropy(x, y, w, ignore_index=-1).isfinite()


def test_the_double_backward_takes_fewer_launches(device):
    """The double backward takes fewer launches than the composition."""
    x, w, y = case(device, 64, 100)

    def launches(loss):
        derivatives(loss, x, w)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            derivatives(loss, x, w)
            torch.cuda.synchronize()
        return sum(
            event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()
        )

    fused = launches(lambda x, w: class_weighted_cross_entropy(x, y, w))
    composed = launches(lambda x, w: (F.cross_entropy(x, y, reduction="none") * w[y]).mean())
    assert fused < composed
