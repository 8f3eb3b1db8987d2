"""Cross entropy by class, and cross entropy with a weight for each class: the loss that LFM-CW turns on (Eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["class_weighted_cross_entropy", "classwise_cross_entropy"]


def classwise_cross_entropy(logits: Tensor, labels: Tensor, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the examples of each class.

    Args:
        logits: [B, C].
        labels: [B], integers in [0, C).
        num_classes: C; by default the width of `logits`.

    Returns:
        The mean of each class [C], 0 for a class without examples, and the number of its examples [C] as integers.
        Differentiable in `logits`, twice.

    Reference: l_c of Gala and Xie, LFM-CW, Eq. 3.
    """
    classes = logits.shape[-1] if num_classes is None else num_classes
    losses = F.cross_entropy(logits, labels, reduction="none")
    counts = torch.bincount(labels, minlength=classes)
    sums = losses.new_zeros(classes).index_add(0, labels, losses)
    return sums / counts.clamp(min=1), counts


def class_weighted_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Mean over the batch of class_weights[y_b] · CE(logits_b, y_b).

    Not divided by the sum of the weights, unlike `F.cross_entropy(weight=...)`: the size of the weights matters.

    Args:
        logits: [B, C].
        labels: [B], integers in [0, C).
        class_weights: [C].

    Returns:
        A scalar, differentiable in `logits` and in `class_weights`, twice.

    Reference: the second term of Gala and Xie, LFM-CW, Eq. 3, with its sum over generated images as a mean.
    """
    return (F.cross_entropy(logits, labels, reduction="none") * class_weights[labels]).mean()
