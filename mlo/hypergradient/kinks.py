"""Distinguishes the solution of a non-smooth problem from one where the gradient vanishes.

At the solution of a lasso ∇L + λ sign(θ) = 0 holds at the entries that are not zero. It does not
hold at entries that the penalty keeps at exactly zero: a subgradient balances it. So F, with
sign(0) = 0, vanishes at the first and not at the second, and engines that differentiate F = 0 would
let them move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from mlo.sharding import is_sharded

__all__ = ["find_kink"]

RATIO = 30.0
"""How much larger F must be at the zeros than elsewhere not to be chance."""


def find_kink(
    names: Sequence[str], parameters: Sequence[Tensor], gradient: Callable[[], Sequence[Tensor]]
) -> str:
    """Describes a parameter that is at a kink; empty if none is.

    Only tensors with zeros among other entries count. One that is entirely zero is a new bias, or
    the second factor of an adapter.

    Args:
        names: of the parameters.
        parameters: their values.
        gradient: computes F, one tensor per parameter.
    """
    # The gradient costs a backward pass, so the parameters are checked first.
    mixed = [
        0 < int((theta == 0.0).sum()) < theta.numel() and not is_sharded(theta)
        for theta in parameters
    ]
    if not any(mixed):
        return ""
    for name, theta, f, is_mixed in zip(names, parameters, gradient(), mixed, strict=True):
        if not is_mixed:
            continue
        # At a smooth solution F is equally small at all entries, whatever their values.
        zeros = theta.detach() == 0.0
        at_zero, elsewhere = _rms(f.detach()[zeros]), _rms(f.detach()[~zeros])
        if at_zero > RATIO * elsewhere and math.isfinite(at_zero):
            return (
                f"{int(zeros.sum())} of {theta.numel()} entries of {name!r} are exactly 0, and the "
                f"gradient vanishes at the others ({elsewhere:.2g}) but not there "
                f"({at_zero:.2g}), as at the solution of a problem with an ℓ1 penalty or a "
                "projection."
            )
    return ""


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
