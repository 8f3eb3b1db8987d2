"""The average error of a solve on one batch, estimated from the two halves of the batch.

E[Â⁻¹] is not A⁻¹: for Gaussian least squares it is n / (n − d − 1) A⁻¹, with n examples and d
parameters. Such a bias falls as c / n. So the mean of the solves on two halves has twice the bias
of the solve on the whole batch, and the difference between the two estimates the bias. (The
products are means over examples, and the mean of two halves is the whole, so their noise cancels.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlo.solution import Evaluation
from mlo.tensors import map_tensors, tensors_of, versions_of

__all__ = ["halves_of", "is_mean"]


def halves_of(evaluation: Evaluation) -> tuple[Evaluation, Evaluation] | None:
    """The same evaluation on either half of its batches; None if they cannot be halved.

    Several batches are divided among the halves. A single one is divided along the first dimension
    of its tensors, where all of them have the same even one.
    """
    # Halves must be alike in size, so the middle one of an odd number of batches is left out.
    batches, count = evaluation.batches, len(evaluation.batches)
    if count >= 2:
        middle = count // 2
        return _part(evaluation, batches[:middle]), _part(evaluation, batches[middle : 2 * middle])
    # A tensor of another length, or without dimensions, is not a list of examples: do not halve it.
    (batch,) = batches
    rows = {len(tensor) if tensor.dim() else 0 for tensor in tensors_of(batch)}
    if len(rows) != 1:
        return None
    size = rows.pop()
    if size < 4 or size % 2:
        return None

    def first(tensor: Tensor) -> Tensor:
        return tensor[: size // 2]

    def second(tensor: Tensor) -> Tensor:
        return tensor[size // 2 :]

    return (
        _part(evaluation, (map_tensors(batch, first),)),
        _part(evaluation, (map_tensors(batch, second),)),
    )


def _part(evaluation: Evaluation, batches: tuple[Any, ...]) -> Evaluation:
    return replace(
        evaluation,
        batches=batches,
        random_states=evaluation.random_states[: len(batches)],
        versions=tuple([versions_of(batch) for batch in batches]),
    )


def is_mean(whole: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether a loss on a batch is the mean of the losses on its halves, and not their sum."""
    # Roughly: a loss that couples examples (BatchNorm) is not exactly a mean.
    mean = (one + other) / 2.0
    return bool(torch.abs(whole - mean) <= 0.1 * torch.maximum(whole.abs(), mean.abs()))
