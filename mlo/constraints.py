"""Projections and proximal steps for `Problem(after_step=...)`, differentiable twice.

Each takes a tensor, or a dict of tensors, and returns the same. A dict is treated entry by entry:

    Problem("weights", ..., after_step=mlo.constraints.nonnegative)
    Problem("net", ..., after_step=lambda p, *, reg: {
        "linear.weight": mlo.constraints.soft_threshold(p["linear.weight"], 0.1 * reg.strength)
    })

Bounds, radii, totals and thresholds may be tensors that require gradients, from an upper problem
that `after_step` reads. At a kink, where the derivative jumps, the derivative of the constrained
side is taken: an entry exactly on a bound stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

from mlo.errors import ProblemError

__all__ = ["box", "l2_ball", "nonnegative", "simplex", "soft_threshold"]

T = TypeVar("T", Tensor, Mapping[str, Tensor])

Number = float | Tensor


def nonnegative(x: T) -> T:
    """The projection onto {x ≥ 0}: max(x, 0), entry by entry."""
    # (A NaN stays one, here and below.)
    return _each(x, lambda t: torch.where(t <= 0.0, torch.zeros_like(t), t))


def box(x: T, lower: Number, upper: Number) -> T:
    """The projection onto {lower ≤ x ≤ upper}, entry by entry.

    Args:
        x: of any shape.
        lower: smallest value, a number or a tensor that broadcasts to x.
        upper: largest value, likewise.

    Raises:
        ProblemError: if lower is above upper anywhere.
    """
    if bool((torch.as_tensor(lower) > torch.as_tensor(upper)).any()):
        raise ProblemError(f"box: lower must not be above upper, got {lower!r} and {upper!r}.")

    def project(t: Tensor) -> Tensor:
        low, high = torch.as_tensor(lower).to(t), torch.as_tensor(upper).to(t)
        return torch.where(t <= low, low, torch.where(t >= high, high, t))

    return _each(x, project)


def simplex(x: T, total: Number = 1.0, dim: int | None = None) -> T:
    """The projection onto {x ≥ 0, Σ x = total}.

    It is max(x − τ, 0), where τ makes the sum right. With k entries above τ, τ is the mean of these
    minus total / k, which is differentiated as such: the set of entries is constant nearby.

    Args:
        x: of any shape that has an entry.
        total: the sum, positive; a number or a scalar tensor.
        dim: each slice along this dimension has the sum; None: all entries of a tensor together.

    Raises:
        ProblemError: if the total is not positive.

    Reference: Held, Wolfe and Crowder, Validation of subgradient optimization (1974); Duchi et al.,
    Efficient projections onto the l1-ball (2008), Figure 1.
    """
    if not float(torch.as_tensor(total).detach()) > 0.0:
        raise ProblemError(f"simplex: total must be positive, got {total!r}.")

    def project(t: Tensor) -> Tensor:
        flat, along = (t.reshape(-1), 0) if dim is None else (t, dim)
        target = torch.as_tensor(total).to(t)
        # Relative to the largest entry, which changes only rounding. Among large numbers the total
        # would be lost, and no entry would be above a threshold.
        flat = flat - flat.detach().amax(along, keepdim=True)
        with torch.no_grad():
            ordered = flat.sort(dim=along, descending=True).values
            shape = [1] * flat.dim()
            shape[along] = flat.shape[along]
            counts = torch.arange(1, flat.shape[along] + 1, device=t.device).to(t).view(shape)
            thresholds = (ordered.cumsum(along) - target) / counts
            # Of the candidates, the largest set whose smallest entry is still above its threshold.
            last = (~(ordered <= thresholds)).sum(along, keepdim=True) - 1
            above = ~(flat <= thresholds.gather(along, last))
        count = above.sum(along, keepdim=True).to(t)
        tau = (torch.where(above, flat, 0.0).sum(along, keepdim=True) - target) / count
        return torch.where(above, flat - tau, 0.0).reshape(t.shape)

    return _each(x, project)


def l2_ball(x: T, radius: Number = 1.0, dim: int | None = None) -> T:
    """The projection onto {‖x‖ ≤ radius}: x, or x · radius / ‖x‖ outside of the ball.

    Args:
        x: of any shape.
        radius: not negative; a number or a scalar tensor.
        dim: each slice along this dimension is projected; None: all entries of a tensor together.

    Raises:
        ProblemError: if the radius is negative.
    """
    if not float(torch.as_tensor(radius).detach()) >= 0.0:
        raise ProblemError(f"l2_ball: radius must not be negative, got {radius!r}.")

    def project(t: Tensor) -> Tensor:
        limit = torch.as_tensor(radius).to(t)
        squared = t.square().sum() if dim is None else t.square().sum(dim, keepdim=True)
        outside = squared >= limit.square()
        # The root has no derivative at zero, where x is inside: it is taken of 1 there.
        norm = torch.where(outside & (squared > 0.0), squared, 1.0).sqrt()
        return torch.where(outside, t * (limit / norm), t)

    return _each(x, project)


def soft_threshold(x: T, threshold: Number) -> T:
    """The proximal step of threshold · ‖x‖₁: x moved towards zero by the threshold, and no further.

    After a step of gradient descent with learning rate η on a loss L, the threshold η λ gives
    proximal gradient descent on L + λ ‖x‖₁: the lasso. (With momentum β it is η λ / (1 − β).)
    With x / (1 + η μ) after it, the elastic net L + λ ‖x‖₁ + μ/2 ‖x‖².

    Args:
        x: of any shape.
        threshold: not negative; a number, or a tensor that broadcasts to x.

    Raises:
        ProblemError: if a threshold is negative.

    Reference: Daubechies, Defrise and De Mol (2004); Beck and Teboulle, FISTA (2009), Eq. 1.5.
    """
    if bool((torch.as_tensor(threshold).detach() < 0.0).any()):
        raise ProblemError(f"soft_threshold: threshold must not be negative, got {threshold!r}.")

    def shrink(t: Tensor) -> Tensor:
        limit = torch.as_tensor(threshold).to(t)
        moved = t - limit * t.detach().sign()
        return torch.where(t.abs() <= limit, torch.zeros_like(t), moved)

    return _each(x, shrink)


def _each(x: T, function: Callable[[Tensor], Tensor]) -> T:
    if isinstance(x, Tensor):
        return function(x)
    return cast(T, {key: function(tensor) for key, tensor in x.items()})
