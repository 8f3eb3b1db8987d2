"""Detects a loss whose gradient is not the derivative of its value.

A target that is detached, a straight-through estimator or a reversed gradient makes the steps
follow a map F that is the gradient of no function. Its fixed point depends on all that is detached,
which autograd treats as constant; of a reversed gradient, autograd reverses the second derivative
too. So products that are exact for autograd are not those with the derivative of F.

Values show it, and kinks do not disturb them: a loss changes continuously across a kink. One
direction u is not enough. Of ½‖θ − T(θ)‖² with a detached T, the slopes along u differ by about
⟨u, T' u⟩, which is small beside ‖u‖² whatever T' is, unless T' is nearly a multiple of the
identity. Along directions w that are unrelated to u, they are ⟨r, w − T' w⟩ and ⟨r, w⟩, with
r = u − T' u, of one size. So several such directions are compared together.

In a game, F also depends on the other players, and a player's loss may hide that (a generator's
images, detached in the discriminator's loss). Then its slopes along the *other* players'
parameters are zero for autograd. Terms without the player's own parameters are no part of F. They
cancel in what such a slope changes by if the player moves. (Slopes that differ but are not zero may
come from a kink at the point.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlo.backward import grad
from mlo.problem import Tensors
from mlo.response import Pullback
from mlo.tensors import real_inner, zeros_for_none

__all__ = ["CustomGradient", "find_custom_gradient"]

TOLERANCE = 0.1
"""Relative error of slopes that counts."""

STEADY = 5.0
"""How much larger it must be than what a doubled step changes: that comes from rounding."""

BESIDE = 0.1
"""How far from the point slopes are compared, relative to it: at a solution they are zero."""

STEP = 0.02
"""The step of a difference, likewise: so large that rounding inside a loss does not matter."""

SCALES = (1.0, 0.1, 0.01)
"""Factors of both, at which slopes must differ: a loss may oscillate within the largest."""

DRAWS = 3
"""Number of random directions that are compared together."""


@dataclass(frozen=True, kw_only=True)
class CustomGradient:
    """Where a player's loss and its gradient differ.

    Attributes:
        change: the loss's slope along a direction, (L(θ + e u) − L(θ − e u)) / 2e.
        slope: what its gradient says, ⟨∇L(θ), u⟩.
        player: the player whose loss it is.
        of_others: whether the direction is one in the other players' parameters, on which the
            gradient does not depend at all.
    """

    change: float
    slope: float
    player: str
    of_others: bool


@dataclass(frozen=True)
class _Slope:
    """Slopes along one direction: by two differences (one with a doubled step), by the gradient."""

    near: float
    far: float
    exact: float
    rounding: float

    def __sub__(self, other: _Slope) -> _Slope:
        rounding = self.rounding + other.rounding
        return _Slope(
            self.near - other.near, self.far - other.far, self.exact - other.exact, rounding
        )


def find_custom_gradient(
    call: Pullback,
    parameters: Mapping[str, Tensor],
    players: Mapping[str, Collection[str]],
    directions: Mapping[str, Mapping[str, Tensor]],
) -> CustomGradient | None:
    """Compares the change of each player's loss with what its gradient says, beside the point.

    Args:
        call: the pullback whose loss it is.
        parameters: name → value of all parameters.
        players: player → names of its parameters.
        directions: player → parameter → entry of a direction in the player's own parameters. (A
            player without one has no part in the solution's derivative.)

    Returns:
        A place where they differ; None if they agree for all players, or a loss has no value there.
    """
    for player, own in directions.items():
        others = [name for name in parameters if name not in players[player]]
        draws = _draws(parameters, own)
        # Along the direction itself, along draws beside it, and along draws of the other players.
        for moved, along, of_others in (
            (own, [own], False),
            (own, draws, False),
            (draws[0], _draws(parameters, others), True),
        ):
            found = _difference_at_all_scales(call, player, parameters, moved, along, of_others)
            if found is not None:
                return CustomGradient(
                    change=found.near, slope=found.exact, player=player, of_others=of_others
                )
    return None


def _difference_at_all_scales(
    call: Pullback,
    player: str,
    parameters: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    along: Sequence[Mapping[str, Tensor]],
    of_others: bool,
) -> _Slope | None:
    """The slopes that differ most, at the largest scale; None if they agree at a scale."""
    size = _least_ratio(parameters, moved)
    length = min((_least_ratio(parameters, w) for w in along), default=math.inf)
    if not (0.0 < size < math.inf and 0.0 < length < math.inf):
        return None
    found = None
    # (Of most losses the first scale tells that the slopes agree.)
    for scale in SCALES:
        point = {name: theta.detach() for name, theta in parameters.items()}
        beside = _moved(point, moved, BESIDE * scale * size)
        try:
            slopes = _slopes(call, player, beside, along, STEP * scale * length)
            if of_others:
                at_point = _slopes(call, player, point, along, STEP * scale * length)
                slopes = [one - other for one, other in zip(slopes, at_point, strict=True)]
        except (RuntimeError, ValueError, ArithmeticError, LookupError, TypeError):
            return None  # outside of what the loss is defined for
        if of_others and any(slope.exact for slope in slopes):
            return None
        if _may_be_rounding(slopes):  # at smaller scales too
            # (A kink at the point disturbs slopes along draws, which are smaller.)
            return found if of_others or along[0] is moved else None
        if not _differ(slopes):
            return None
        found = found or max(slopes, key=lambda slope: abs(slope.near - slope.exact))
    return found


def _may_be_rounding(slopes: Sequence[_Slope]) -> bool:
    """Whether slopes differ by no more than the loss is rounded."""
    return _error(slopes) <= math.hypot(*(slope.rounding for slope in slopes))


def _differ(slopes: Sequence[_Slope]) -> bool:
    """Whether slopes differ by more than kinks and the tolerance explain."""
    error = _error(slopes)
    # (False where one is not a number.)
    steady = error > STEADY * math.hypot(*(slope.near - slope.far for slope in slopes))
    nears, exacts = ([getattr(slope, kind) for slope in slopes] for kind in ("near", "exact"))
    return steady and error > TOLERANCE * max(math.hypot(*nears), math.hypot(*exacts))


def _error(slopes: Sequence[_Slope]) -> float:
    return math.hypot(*(slope.near - slope.exact for slope in slopes))


def _slopes(
    call: Pullback,
    player: str,
    parameters: Mapping[str, Tensor],
    along: Sequence[Mapping[str, Tensor]],
    e: float,
) -> list[_Slope]:
    """A player's slopes along directions that move the same parameters."""
    inputs = [tensor.detach() for tensor in call.input_aliases()]
    leaves = {name: theta.clone().requires_grad_() for name, theta in parameters.items()}
    with torch.enable_grad(), call.losses(leaves, inputs, players=(player,)) as losses:
        of = [leaves[name] for name in along[0]]
        found = grad([losses[player]], of) if losses[player].requires_grad else [None] * len(of)
        value = float(losses[player].detach())
    gradient = zeros_for_none(found, of)
    # Convolutions and matrix products of float32 on a GPU may be in TF32, which keeps ten bits.
    eps = max(
        2.0**-11 if entry.is_cuda and entry.dtype == torch.float32 else torch.finfo(entry.dtype).eps
        for entry in along[0].values()
    )
    slopes = []
    for w in along:
        exact = sum(float(real_inner(g, v)) for g, v in zip(gradient, w.values(), strict=True))
        near, far = (_difference(call, player, parameters, inputs, w, step) for step in (e, 2 * e))
        slopes.append(_Slope(near, far, exact, 10.0 * eps * abs(value) / e))
    return slopes


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
        point = {n: theta.requires_grad_() for n, theta in _moved(parameters, u, step).items()}
        with torch.enable_grad(), call.losses(point, inputs, players=(player,)) as losses:
            sides.append(float(losses[player].detach()))
    return (sides[0] - sides[1]) / (2.0 * e)


def _moved(parameters: Mapping[str, Tensor], u: Mapping[str, Tensor], step: float) -> Tensors:
    moved = {name: parameters[name] + step * entry for name, entry in u.items()}
    return {name: moved.get(name, theta.detach()) for name, theta in parameters.items()}


def _draws(parameters: Mapping[str, Tensor], names: Collection[str]) -> list[Tensors]:
    """Random directions, of the size of the parameters that they move; none for no names."""
    noise = torch.Generator().manual_seed(0)  # the same in every process
    draws: list[Tensors] = []
    for _ in range(DRAWS if names else 0):
        draw = {}
        for name in names:
            theta = parameters[name].detach()
            w = torch.randn(theta.shape, generator=noise, dtype=torch.float64)
            w = w * (_size(theta) / math.sqrt(max(theta.numel(), 1)))
            draw[name] = w.to(theta.device, theta.dtype)
        draws.append(draw)
    return draws


def _least_ratio(parameters: Mapping[str, Tensor], u: Mapping[str, Tensor]) -> float:
    """The least size of a parameter relative to the entry of u that moves it; ∞ without any."""
    ratios = [
        _size(parameters[name]) / float(entry.norm())
        for name, entry in u.items()
        if float(entry.norm()) > 0.0
    ]
    return min(ratios, default=math.inf)


def _size(theta: Tensor) -> float:
    """The norm of a parameter. One that is zero, like a new bias, has entries of 0.01."""
    return max(float(theta.detach().norm()), 0.01 * math.sqrt(theta.numel()))
