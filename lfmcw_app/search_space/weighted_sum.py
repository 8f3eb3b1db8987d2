"""Sums of feature maps, some of them weighted by scalars, in one pass per map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lfmcw_app.search_space.requested_gradients import gradient_requested

__all__ = ["weighted_sum"]


def weighted_sum(
    terms: Sequence[Tensor], weights: Tensor | None = None, weighted: Sequence[Tensor] = ()
) -> Tensor:
    """Returns Σ terms + Σ_i weights[i] · weighted[i].

    Args:
        terms: maps [B, C, H, W], all of one shape, in memory with the channels last.
        weights: [len(weighted)].
        weighted: more of them.

    Raises:
        ValueError: if there is nothing to sum.
    """
    if not terms and not weighted:
        raise ValueError("A sum needs a term.")
    if len(terms) + len(weighted) == 1 and terms:
        return terms[0]
    if not weighted:
        weights = None

    # Under autocast a convolution's map has 16 bits, and one that passed through a pool or nothing
    # may have 32.
    dtypes = {map_.dtype for map_ in (*terms, *weighted)}
    if len(dtypes) > 1:
        widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
        terms = [term.to(widest) for term in terms]
        weighted = [term.to(widest) for term in weighted]
    out: Tensor = _WeightedSum.apply(weights, len(terms), *terms, *weighted)
    return out


class _WeightedSum(torch.autograd.Function):
    """One node of the graph; PyTorch's own would be two per term, and as many maps in memory."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor | None, plain: int, *terms: Tensor) -> Tensor:
        ctx.plain = plain
        if weights is not None:
            ctx.save_for_backward(weights, *terms[plain:])
        pairs = list(zip(terms[plain:], () if weights is None else weights.unbind(), strict=True))
        # The first operation makes a new map; the others add to it in place.
        if plain > 1:
            out = terms[0] + terms[1]
        elif plain == 1:
            out = torch.addcmul(terms[0], *pairs.pop(0))
        else:
            out = torch.mul(*pairs.pop(0))
        for term in terms[2:plain]:
            out.add_(term)
        for term, scalar in pairs:
            out.addcmul_(term, scalar)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0].contiguous(memory_format=torch.channels_last)
        plain = (g,) * ctx.plain
        saved = ctx.saved_tensors  # read once: activation checkpointing then releases them
        if not saved:
            return None, None, *plain

        weights, *weighted = saved
        needs = [gradient_requested(ctx, 1 + ctx.plain + index) for index in range(len(weighted))]
        maps = [g * w if need else None for w, need in zip(weights.unbind(), needs, strict=True)]
        slopes = None
        if gradient_requested(ctx, 0):
            flat = _flat(g)
            slopes = torch.stack([torch.dot(flat, _flat(term)) for term in weighted])
        return slopes, None, *plain, *maps


def _flat(x: Tensor) -> Tensor:
    """The entries in the order of memory."""
    return x.permute(0, 2, 3, 1).reshape(-1)
