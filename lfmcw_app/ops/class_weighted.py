"""Cross entropy by class, and cross entropy with class weights: the loss of LFM-CW (Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lfmcw_app.errors import InputError
from lfmcw_app.ops.rows import row_cross_entropy

__all__ = ["class_weighted_cross_entropy", "classwise_cross_entropy"]


def classwise_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the examples of each class.

    Args:
        logits: [B, C], of any floating dtype and strides; sums are in float32 (float64 for float64
            logits).
        labels: [B], integers in [0, C), or `ignore_index`.
        num_classes: length of what is returned; by default C.
        label_smoothing: s in [0, 1]: the target is (1 − s) onehot(label) + s / C.
        ignore_index: a label whose examples are left out.

    Returns:
        The mean of each class [C], 0 for a class without examples, and the number of its examples
        [C] as integers. Differentiable in `logits` as often as one likes.

    Raises:
        InputError: for shapes or dtypes that do not fit, and on a CPU for a label out of range. On
            CUDA such a label makes every mean NaN, without waiting for the device.

    Reference: l_c of Gala and Xie, LFM-CW, Eq. 3.
    """
    ce, y, used = _rows(logits, labels, label_smoothing, ignore_index)
    classes = logits.shape[1] if num_classes is None else num_classes
    if classes < logits.shape[1]:
        raise InputError(
            f"num_classes must be at least the {logits.shape[1]} classes of the logits, got "
            f"{classes}."
        )
    counts = _sum_by_class(torch.ones_like(y) if used is None else used.long(), y, classes)
    means = _sum_by_class(ce, y, classes) / counts.clamp(min=1)
    if ce.is_cuda:
        means = means + _poison(ce, labels, logits.shape[1], ignore_index)
    return means, counts


def class_weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """class_weights[y_b] · CE(logits_b, y_b), averaged over the batch.

    The mean is over the examples, not divided by the sum of their weights as in
    `F.cross_entropy(weight=...)`: the size of the weights matters. With smoothing the whole
    smoothed loss of an example has the weight of its label's class, where PyTorch weighs every
    class's share by its own.

    Weights may be zero, negative, infinite or NaN, and act by IEEE arithmetic on the examples of
    their class. Weights of classes without examples are never used.

    Args:
        logits: [B, C], of any floating dtype and strides; sums are in float32 (float64 for float64
            logits).
        labels: [B], integers in [0, C), or `ignore_index`.
        class_weights: [C].
        reduction: "mean" (over the examples that are not ignored; 0 if there are none), "sum" or
            "none".
        label_smoothing: s in [0, 1]: the target is (1 − s) onehot(label) + s / C.
        ignore_index: a label whose examples are left out.

    Returns:
        A scalar ([B] for "none"), differentiable in `logits` and in `class_weights` as often as one
        likes.

    Raises:
        InputError: for shapes, dtypes or options that do not fit, and on a CPU for a label out of
            range. On CUDA such a label makes the loss NaN, without waiting for the device.

    Reference: the second term of Gala and Xie, LFM-CW, Eq. 3, as a mean over generated images.
    """
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction must be mean, sum or none, got {reduction!r}.")
    if class_weights.shape != logits.shape[1:]:
        raise InputError(
            f"class_weights must have one entry for each of the logits' {tuple(logits.shape)[1:]} "
            f"classes, got {tuple(class_weights.shape)}."
        )
    ce, y, used = _rows(logits, labels, label_smoothing, ignore_index)

    # Both gather the same values. But index_select's derivative is atomic on CUDA, and indexing is
    # slower on a CPU.
    weights = class_weights[y] if ce.is_cuda else class_weights.index_select(0, y)
    if weights.dtype != ce.dtype:
        weights = weights.to(ce.dtype)
    if used is not None:
        weights = torch.where(used, weights, 0.0)

    if reduction == "none":
        return ce * weights
    total = torch.dot(ce, weights)
    if reduction == "sum":
        return total
    return total * (1.0 / max(len(y), 1)) if used is None else total / used.sum().clamp(min=1)


def _rows(
    logits: Tensor, labels: Tensor, label_smoothing: float, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """CE of each row (0 where ignored), labels usable as indices, and which rows are used.

    The last is None where all are.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 1:
        raise InputError(
            f"logits must be [B, C] and labels [B], got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not logits.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"logits must be floating-point and labels integers, got {logits.dtype} and "
            f"{labels.dtype}."
        )
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}.")
    y = labels.long()
    used = None if ignore_index is None else y != ignore_index
    if used is not None:
        y = torch.where(used, y, 0)
    try:
        ce = row_cross_entropy(logits, y, label_smoothing)
    except IndexError:
        wrong = y[(y < 0) | (y >= logits.shape[1])]
        raise InputError(
            f"Label {int(wrong[0])} is outside the range [0, {logits.shape[1]}) of the logits."
        ) from None

    # The kernels have made the loss of a label out of range NaN; as an index it would stop the
    # device.
    if logits.is_cuda:
        y = y.clamp(0, logits.shape[1] - 1)
    return (ce if used is None else torch.where(used, ce, 0.0)), y, used


def _sum_by_class(values: Tensor, y: Tensor, classes: int) -> Tensor:
    """Σ of the values [B] of each class [C]; repeats bit for bit.

    On CUDA it sorts, since index_add is atomic there.
    """
    zeros = values.new_zeros(classes)
    if values.is_cuda:
        return zeros.index_put((y,), values, accumulate=True)
    return zeros.index_add(0, y, values)


def _poison(ce: Tensor, labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """NaN if a label is out of range, else 0."""
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    return torch.where(wrong.any(), torch.nan, 0.0).to(ce.dtype)
