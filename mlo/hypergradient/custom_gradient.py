"""Detects a loss whose gradient is not the derivative of its value.

A target that is detached, a straight-through estimator or a reversed gradient makes the steps
follow a map F that is the gradient of no function. Its fixed point depends on all that is detached,
which autograd treats as constant; of a reversed gradient, autograd reverses the second derivative
too. So products that are exact for autograd are not those with the derivative of F.

Values show it, and kinks do not disturb them: a loss changes continuously across a kink.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mlo.backward import grad
from mlo.response import Pullback
from mlo.tensors import real_inner, zeros_for_none

__all__ = ["find_custom_gradient"]

TOLERANCE = 0.1
"""Relative error of a slope that counts."""

STEADY = 5.0
"""How much larger it must be than what a doubled step changes: that comes from rounding."""

BESIDE = 0.1
"""How far from the point slopes are compared, relative to it: at a solution they are zero."""

STEP = 0.02
"""The step of a difference, likewise: so large that rounding inside a loss does not matter."""

SCALES = (1.0, 0.1, 0.01)
"""Factors of both, at which slopes must differ: a loss may oscillate within the largest."""


def find_custom_gradient(
    call: Pullback, parameters: Mapping[str, Tensor], directions: Mapping[str, Mapping[str, Tensor]]
) -> tuple[float, float] | None:
    """Compares the change of each player's loss with what its gradient says.

    Args:
        call: the pullback whose loss it is.
        parameters: name → value of all parameters.
        directions: player → parameter → entry of a direction in the player's own parameters.

    Returns:
        (L(θ + e u) − L(θ − e u)) / 2e and ⟨∇L(θ), u⟩ of a player where they differ, at a θ beside
        the point; None if they agree for all players, or the loss has no value there.
    """
    inputs = [tensor.detach() for tensor in call.input_aliases()]
    for player, u in directions.items():
        size = _least_ratio(parameters, u)
        if not 0.0 < size < math.inf:
            continue
        found = None
        # (Of most losses the first scale tells that the slopes agree.)
        for scale in SCALES:
            try:
                slopes = _slopes(call, player, parameters, inputs, u, scale * size)
            except (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError):
                return None  # outside of what the loss is defined for
            if slopes is None:  # rounding hides them, at smaller scales too
                break
            near, far, slope = slopes
            error = abs(near - slope)
            steady = error > STEADY * abs(near - far)
            # (False where one is not a number.)
            if not (steady and error > TOLERANCE * max(abs(near), abs(slope))):
                found = None
                break
            found = found or (near, slope)
        if found is not None:
            return found
    return None


def _slopes(
    call: Pullback,
    player: str,
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    u: Mapping[str, Tensor],
    size: float,
) -> tuple[float, float, float] | None:
    """Two differences of a player's loss, of a step and of a doubled one, and its gradient's slope.

    None if they may be rounding.
    """
    beside = {name: theta.detach() for name, theta in parameters.items()}
    beside |= {name: beside[name] + BESIDE * size * entry for name, entry in u.items()}
    leaves = {name: theta.clone().requires_grad_() for name, theta in beside.items()}
    with torch.enable_grad(), call.losses(leaves, inputs, players=(player,)) as losses:
        of = [leaves[name] for name in u]
        found = grad([losses[player]], of) if losses[player].requires_grad else [None] * len(of)
        value = float(losses[player].detach())
    gradient = zeros_for_none(found, of)
    slope = sum(float(real_inner(g, v)) for g, v in zip(gradient, u.values(), strict=True))

    e = STEP * size
    near, far = (_difference(call, player, beside, inputs, u, step) for step in (e, 2.0 * e))
    # Convolutions and matrix products of float32 on a GPU may be in TF32, which keeps ten bits.
    eps = max(
        2.0**-11 if entry.is_cuda and entry.dtype == torch.float32 else torch.finfo(entry.dtype).eps
        for entry in u.values()
    )
    if abs(near - slope) <= 10.0 * eps * abs(value) / e:
        return None
    return near, far, slope


def _difference(
    call: Pullback,
    player: str,
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    u: Mapping[str, Tensor],
    e: float,
) -> float:
    """(L(θ + e u) − L(θ − e u)) / 2e of a player."""
    sides = []
    for step in (e, -e):
        moved = {name: parameters[name] + step * entry for name, entry in u.items()}
        point = {name: theta.requires_grad_() for name, theta in ({**parameters, **moved}).items()}
        with torch.enable_grad(), call.losses(point, inputs, players=(player,)) as losses:
            sides.append(float(losses[player].detach()))
    return (sides[0] - sides[1]) / (2.0 * e)


def _least_ratio(parameters: Mapping[str, Tensor], u: Mapping[str, Tensor]) -> float:
    """The least size of a parameter relative to the entry of u that moves it; ∞ without any."""
    ratios = []
    for name, entry in u.items():
        moved, theta = float(entry.norm()), parameters[name].detach()
        if moved > 0.0:
            # (One that is zero, like a new bias, counts as one with entries of 0.01.)
            ratios.append(max(float(theta.norm()), 0.01 * math.sqrt(theta.numel())) / moved)
    return min(ratios, default=math.inf)
