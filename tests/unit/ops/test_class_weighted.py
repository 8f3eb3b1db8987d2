"""The class-weighted losses: every formulation against PyTorch's composition, in value and in all
derivatives.

The Triton kernels run in Triton's interpreter, in a process of their own (see the last test); on
hardware in tests/gpu.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from started_processes import finished
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.ops import class_weighted_cross_entropy, classwise_cross_entropy, rows

KERNELS = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["kernels"] if KERNELS else ["composition", "analytic"], autouse=True)
def formulation(request, monkeypatch):
    """Runs each test with each way to compute it."""
    monkeypatch.setattr(rows, "ANALYTIC_FROM", 0 if request.param == "analytic" else 1 << 60)
    if request.param == "kernels":
        monkeypatch.setenv("LFMCW_OPS", "triton")
    return request.param


def reference(x, y, w, smoothing=0.0):
    return (F.cross_entropy(x, y, reduction="none", label_smoothing=smoothing) * w[y]).mean()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def integers(high, count, seed=0):
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


def derivatives(loss, x, w):
    """Value, gradients, and the gradients of a product with these gradients."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    value = loss(x, w)
    gradients = torch.autograd.grad(value, (x, w), create_graph=True)
    product = (gradients[0] * torch.sin(x.detach())).sum() + (
        gradients[1] * torch.cos(w.detach())
    ).sum()
    return [value.detach(), *(g.detach() for g in gradients), *torch.autograd.grad(product, (x, w))]


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance), float(
            (a - b).abs().max()
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_first_and_second_derivatives_in_both_arguments(smoothing):
    x, w, y = (
        normal(5, 4).requires_grad_(),
        normal(4, seed=1).requires_grad_(),
        torch.tensor([0, 3, 3, 1, 0]),
    )

    def weighted(x, w):
        return class_weighted_cross_entropy(x, y, w, label_smoothing=smoothing)

    def by_class(x):
        return classwise_cross_entropy(x, y, label_smoothing=smoothing)[0]

    assert torch.autograd.gradcheck(weighted, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weighted, (x, w), check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(by_class, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(by_class, (x,), check_fwd_over_rev=True)


def test_third_derivatives_for_middle_problems():
    x, w, y = (
        normal(3, 3).requires_grad_(),
        normal(3, seed=1).requires_grad_(),
        torch.tensor([0, 2, 2]),
    )

    def gradient(x, w):
        return torch.autograd.grad(class_weighted_cross_entropy(x, y, w), (x, w), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (x, w))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("shape", [(1, 2), (33, 10), (16, 100), (5, 1000), (2, 20_000)], ids=str)
def test_every_dtype_and_shape_equals_the_composition(shape, dtype, tolerance, smoothing):
    """Every dtype and shape equals the composition in double precision."""
    x, w = normal(*shape, dtype=dtype), normal(shape[1], seed=1, dtype=dtype)
    y = integers(shape[1], shape[0])
    found = derivatives(
        lambda x, w: class_weighted_cross_entropy(x, y, w, label_smoothing=smoothing), x, w
    )
    expected = derivatives(lambda x, w: reference(x, y, w, smoothing), x.double(), w.double())
    close(found, expected, tolerance)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[1].dtype == found[3].dtype == dtype


def strided(kind):
    return {
        "transposed": lambda: normal(7, 6).T,
        "every other row": lambda: normal(12, 7)[::2],
        "every other column": lambda: normal(6, 14)[:, ::2],
        "expanded": lambda: normal(1, 7).expand(6, 7),
        "reversed": lambda: normal(6, 7).flip(0),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["transposed", "every other row", "every other column", "expanded", "reversed"]
)
def test_any_strides(kind):
    x, w, y = strided(kind), normal(7, seed=1), integers(7, 6)
    found = derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w)
    close(found, derivatives(lambda x, w: reference(x, y, w), x, w), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_ignored_labels(reduction):
    x, w, y = normal(6, 4), normal(4, seed=1), torch.tensor([3, -1, 0, -1, 2, 3])
    kept = y != -1

    def loss(x, w):
        found = class_weighted_cross_entropy(x, y, w, reduction=reduction, ignore_index=-1)
        return found.sum() if reduction == "none" else found

    def expected(x, w):
        each = F.cross_entropy(x[kept], y[kept], reduction="none") * w[y[kept]]
        return each.mean() if reduction == "mean" else each.sum()

    close(derivatives(loss, x, w), derivatives(expected, x, w), 1e-12)
    means, counts = classwise_cross_entropy(x, y, ignore_index=-1)
    kept_means, kept_counts = classwise_cross_entropy(x[kept], y[kept])
    assert torch.allclose(means, kept_means)
    assert torch.equal(counts, kept_counts)


def test_an_ignored_label_may_be_a_class():
    x, w, y = normal(4, 3), normal(3, seed=1), torch.tensor([0, 1, 1, 2])
    found = class_weighted_cross_entropy(x, y, w, ignore_index=1)
    assert torch.allclose(found, reference(x[[0, 3]], y[[0, 3]], w))


def test_function_transforms():
    x, w, y = normal(4, 3), normal(3, seed=1), torch.tensor([0, 2, 2, 1])
    loss = lambda x, w: class_weighted_cross_entropy(x, y, w)  # noqa: E731
    plain = lambda x, w: reference(x, y, w)  # noqa: E731
    t = torch.func
    for transform in (
        lambda f: t.grad(f, argnums=(0, 1))(x, w),
        lambda f: t.vjp(f, x, w)[1](torch.tensor(2.0).double()),
        lambda f: t.jvp(f, (x, w), (x.sin(), w.cos())),
        lambda f: t.hessian(f)(x, w),
        lambda f: t.jacrev(t.jacfwd(f))(x, w),
        lambda f: t.jacrev(t.jacrev(f))(x, w),
        lambda f: t.grad(lambda x: t.grad(f)(x, w).pow(3).sum())(x),
        lambda f: t.vmap(f, in_dims=(0, None))(normal(5, 4, 3), w),
        lambda f: t.vmap(t.hessian(f), in_dims=(2, 1), out_dims=1)(normal(4, 3, 5), normal(3, 5)),
    ):
        found, expected = transform(loss), transform(plain)
        if isinstance(found, torch.Tensor):
            found, expected = (found,), (expected,)
        close(found, expected, 1e-10)


def test_batched_labels():
    x, w, y = normal(5, 4, 3), normal(3, seed=1), integers(3, 20).view(5, 4)
    found = torch.func.vmap(lambda x, y: class_weighted_cross_entropy(x, y, w))(x, y)
    assert torch.allclose(
        found, torch.stack([reference(a, b, w) for a, b in zip(x, y, strict=True)])
    )


def test_batched_cotangents():
    x, y = normal(4, 3).requires_grad_(), torch.tensor([0, 2, 2, 1])
    means = classwise_cross_entropy(x, y)[0]
    (batched,) = torch.autograd.grad(
        means, x, torch.eye(3).double(), is_grads_batched=True, create_graph=True
    )
    for k in range(3):
        assert torch.allclose(batched[k], torch.autograd.grad(means[k], x, retain_graph=True)[0])
    assert torch.autograd.gradcheck(
        lambda x: torch.autograd.grad(
            classwise_cross_entropy(x, y)[0].square().sum(), x, create_graph=True
        )[0],
        (x,),
        check_batched_grad=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(KERNELS, reason="a compiled graph takes the plain composition")
def test_it_compiles_into_one_graph():
    x, w, y = (
        normal(6, 4, dtype=torch.float32),
        normal(4, seed=1, dtype=torch.float32),
        integers(4, 6),
    )

    def loss(x, w):
        means, counts = classwise_cross_entropy(x, y)
        return (
            class_weighted_cross_entropy(x, y, w, label_smoothing=0.1) + means.sum() + counts.sum()
        )

    def gradients(f):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = f(a, b)
        return (value.detach(), *torch.autograd.grad(value, (a, b)))

    torch._dynamo.reset()
    close(
        gradients(torch.compile(loss, fullgraph=True, backend="aot_eager")), gradients(loss), 1e-6
    )
    hvp = torch.compile(
        lambda x, w: torch.func.jvp(torch.func.grad(loss), (x, w), (x.sin(), w.cos()))[1],
        backend="eager",
    )
    close(
        (hvp(x, w),), (torch.func.jvp(torch.func.grad(loss), (x, w), (x.sin(), w.cos()))[1],), 1e-6
    )


def test_autocast_keeps_sums_in_single_precision():
    x, w, y = (
        normal(64, 300, dtype=torch.float32),
        normal(300, seed=1, dtype=torch.float32),
        integers(300, 64),
    )
    expected = derivatives(lambda x, w: reference(x, y, w), x.double(), w.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w)
    close(found, expected, 1e-6)


def test_sums_over_many_bf16_rows_do_not_lose_them():
    x, y = normal(20_000, 2, dtype=torch.bfloat16), integers(2, 20_000)
    means, counts = classwise_cross_entropy(x, y)
    each = F.cross_entropy(x.double(), y, reduction="none")
    assert counts.tolist() == torch.bincount(y).tolist()
    for label in range(2):
        assert float(means[label]) == pytest.approx(float(each[y == label].mean()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype):
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 9999.5], [1e4, 1e4, 1e4]], dtype=dtype)
    w, y = torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.tensor([1, 2, 0])
    found = derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w)
    close(
        found,
        derivatives(lambda x, w: reference(x, y, w), x.double(), w.double()),
        1e-12 if dtype.itemsize == 8 else 3e-7,
    )


@pytest.mark.parametrize("columns", [3, 5000])
def test_smoothing_keeps_the_digits_of_equal_logits(columns):
    """Logits of −1e30 are as good as any: the sums of the smoothing do not cancel."""
    x, y = torch.full((2, columns), -1e30), torch.tensor([0, 2])
    x[1, 1:] -= 1e25
    found = class_weighted_cross_entropy(
        x, y, torch.ones(columns), reduction="none", label_smoothing=0.1
    )
    assert float(found[0]) == pytest.approx(math.log(columns), rel=1e-6)
    share = 0.1 * (columns - 1) / columns
    # The label is below the maximum by 1e25, to the rounding of −1e30.
    assert float(found[1]) == pytest.approx((0.9 + share) * 1e25, rel=1e-2)


def test_logits_masked_by_minus_infinity():
    x = normal(3, 4)
    x[:, 2] = -torch.inf
    w, y = normal(4, seed=1), torch.tensor([0, 1, 3])
    found = derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w)
    rest = [0, 1, 3]
    smaller = torch.tensor([0, 1, 2])
    value, gx, gw, *_ = derivatives(lambda x, w: reference(x, smaller, w), x[:, rest], w[rest])
    assert torch.allclose(found[0], value)
    assert torch.allclose(found[1][:, rest], gx)
    assert not found[1][:, 2].any()
    assert torch.allclose(found[2][rest], gw)
    assert float(class_weighted_cross_entropy(x, torch.tensor([2, 0, 0]), w.abs())) == torch.inf


def test_class_weights_of_absent_classes_are_never_touched():
    x, y = normal(4, 5), torch.tensor([0, 1, 1, 0])
    w = torch.tensor([0.0, -2.0, torch.nan, torch.inf, -torch.inf]).double()
    found = derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w)
    value, gx, gw, *_ = derivatives(lambda x, w: reference(x, y, w), x, w)
    assert torch.allclose(found[0], value)
    assert torch.allclose(found[1], gx)
    assert torch.allclose(found[2], gw)
    assert found[0].isfinite()
    ignored = class_weighted_cross_entropy(x, torch.tensor([0, 2, 1, 0]), w, ignore_index=2)
    assert ignored.isfinite()
    touched = class_weighted_cross_entropy(x, torch.tensor([0, 2, 1, 0]), w)
    assert touched.isnan()


@pytest.mark.parametrize("ignore", [None, -1])
def test_no_examples(ignore):
    x = torch.zeros(0 if ignore is None else 3, 4, dtype=torch.float64, requires_grad=True)
    w, y = torch.ones(4, dtype=torch.float64, requires_grad=True), torch.full((len(x),), -1)
    loss = class_weighted_cross_entropy(x, y, w, ignore_index=ignore)
    gx, gw = torch.autograd.grad(loss, (x, w))
    means, counts = classwise_cross_entropy(x, y, ignore_index=ignore)
    for part in (loss, gx, gw, means, counts):
        assert not part.any()
    assert gx.shape == x.shape
    assert means.shape == counts.shape == (4,)


def test_a_hundred_thousand_classes():
    x, y = normal(2, 100_000, dtype=torch.float32), torch.tensor([99_999, 3])
    w = normal(100_000, seed=1, dtype=torch.float32)
    found = derivatives(lambda x, w: class_weighted_cross_entropy(x, y, w), x, w)
    close(found, derivatives(lambda x, w: reference(x, y, w), x.double(), w.double()), 1e-5)
    assert int(classwise_cross_entropy(x, y)[1].sum()) == 2


@pytest.mark.skipif(KERNELS, reason="kernels answer with NaN (next test), as on CUDA")
@pytest.mark.parametrize("label", [-1, -100, 3, 7])
def test_a_label_out_of_range_is_named_with_the_range(label):
    y = torch.tensor([0, label, 1])
    for loss in (
        lambda: classwise_cross_entropy(torch.zeros(3, 3), y),
        lambda: class_weighted_cross_entropy(torch.zeros(3, 3), y, torch.ones(3)),
    ):
        with pytest.raises(InputError, match=rf"Label {label} is outside the range \[0, 3\)"):
            loss()


@pytest.mark.skipif(not KERNELS, reason="of the kernels")
@pytest.mark.parametrize("label", [-1, -100, 3, 7])
def test_kernels_make_a_row_with_a_label_out_of_range_nan(label):
    from lfmcw_app.ops import _triton

    x, y = normal(3, 3, dtype=torch.float32), torch.tensor([0, label, 1])
    ce, stats = _triton.forward(x, y, 0.0)
    gradient = _triton.gradient(x, stats, y, torch.ones(3), 0.0)
    found, along = _triton.second(x, stats, y, torch.ones(3), x, None, 0.0)
    for part in (ce, gradient, found, along):
        assert part[1].isnan().all()
        assert part[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: class_weighted_cross_entropy(
                torch.zeros(2, 3), torch.zeros(2).long(), torch.ones(4)
            ),
            "one entry for each",
        ),
        (
            lambda: class_weighted_cross_entropy(
                torch.zeros(2, 3), torch.zeros(3).long(), torch.ones(3)
            ),
            r"\(2, 3\) and \(3,\)",
        ),
        (
            lambda: classwise_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(2).long()),
            "logits must be",
        ),
        (lambda: classwise_cross_entropy(torch.zeros(2, 3), torch.zeros(2)), "labels integers"),
        (
            lambda: classwise_cross_entropy(torch.zeros(2, 3).long(), torch.zeros(2).long()),
            "floating-point",
        ),
        (
            lambda: classwise_cross_entropy(
                torch.zeros(2, 3), torch.zeros(2).long(), label_smoothing=1.5
            ),
            "in .0, 1.",
        ),
        (
            lambda: class_weighted_cross_entropy(
                torch.zeros(2, 3), torch.zeros(2).long(), torch.ones(3), reduction="avg"
            ),
            "mean, sum or none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_an_unknown_formulation_is_refused(monkeypatch):
    monkeypatch.setenv("LFMCW_OPS", "cuda")
    with pytest.raises(InputError, match="LFMCW_OPS must be eager or triton, got 'cuda'"):
        classwise_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())


@pytest.mark.skipif(KERNELS, reason="which may run on a CPU")
def test_kernels_are_not_forced_onto_a_cpu(monkeypatch):
    monkeypatch.setenv("LFMCW_OPS", "triton")
    with pytest.raises(InputError, match="CUDA device"):
        classwise_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())


def test_int32_labels_serve():
    x, y = normal(4, 3), torch.tensor([0, 2, 2, 1])
    assert torch.equal(classwise_cross_entropy(x, y.int())[0], classwise_cross_entropy(x, y)[0])


@pytest.mark.slow
@pytest.mark.skipif(KERNELS, reason="runs in the interpreter already")
def test_all_of_this_holds_for_the_kernels(formulation):
    """All of this holds for the kernels in Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed (it comes with PyTorch on Linux)")
    if formulation != "analytic":
        pytest.skip("once is enough")
    result = finished(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


def test_classwise_cross_entropy_is_the_mean_of_each_class():
    logits = torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    means, counts = classwise_cross_entropy(logits, labels)
    assert counts.tolist() == [3, 2, 0, 4]
    for label in (0, 1, 3):
        expected = F.cross_entropy(logits[labels == label], labels[labels == label])
        assert torch.allclose(means[label], expected)
    assert means[2] == 0


def test_the_losses_are_twice_differentiable_in_all_they_take():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    class_weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 2, 0, 0])

    def weighted(x, w):
        return class_weighted_cross_entropy(x, labels, w)

    def by_class(x):
        return classwise_cross_entropy(x, labels)[0]

    assert torch.autograd.gradcheck(weighted, (logits, class_weights))
    assert torch.autograd.gradgradcheck(weighted, (logits, class_weights))
    assert torch.autograd.gradcheck(by_class, (logits,))
    assert torch.autograd.gradgradcheck(by_class, (logits,))


def test_the_size_of_the_class_weights_matters():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    ones = torch.ones(3)
    plain = F.cross_entropy(logits, labels)
    assert torch.allclose(class_weighted_cross_entropy(logits, labels, ones), plain)
    assert torch.allclose(class_weighted_cross_entropy(logits, labels, 3 * ones), 3 * plain)
