"""Products by finite differences of first gradients, and a comparison that detects wrong ones.

For a direction u the difference of ∇_x L(θ ± e u) is 2e Bᵀ u + O(e³), and that of ∇_θ L is
2e Aᵀ u + O(e³): no second derivative is needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mlo.backward import grad
from mlo.errors import EngineError, warn_user
from mlo.gradient_norm import norms_of, total_norm
from mlo.hypergradient.double_backward import is_about_double_backward
from mlo.hypergradient.products import (
    Autograd,
    LinearSystem,
    Products,
    register_products,
)
from mlo.hypergradient.tf32 import without_tf32
from mlo.once import SharedResults
from mlo.replays import differing
from mlo.response import Cotangent, Pullback
from mlo.tensors import add, numbers, real_inner, zeros_for_none

__all__ = ["FiniteDifference", "FiniteDifferenceSystem"]

TOLERANCE = 0.05
"""Relative error of a product that causes a warning; in bfloat16 four times as much.

Values of a loss are compared five times as closely, since they cross kinks without a jump.
"""

UNSTEADY = 5.0
"""How much larger an error that changes with the step may be: it comes from rounding or kinks."""

COMPARISON = "finite difference"
"""Name of the check, which is made once per problem."""

DETACHED = (
    "Finite differences know only the value of a loss: they see through .detach(), "
    "straight-through estimators and gradient reversal. Use exact products ('one_step', or "
    "products='autograd'), or compute the detached part with mlo.once."
)
DETACHED_ALONE = (
    "Finite differences know only the value of a loss: they see through .detach(), "
    "straight-through estimators and gradient reversal. Compute the detached part with mlo.once."
)
KINKS = (
    "They measure the kinks of ReLU and max-pooling, and magnify rounding. Use exact products "
    "('one_step', or products='autograd'), a smooth activation, or float64."
)


@dataclass(frozen=True)
class FiniteDifference(Products):
    """Central finite differences of gradients: for any loss that has a first derivative.

    Across the kinks of ReLU or max-pooling a finite difference of gradients measures the kinks too.
    At no step size does it converge to the almost-everywhere derivative that `Autograd` takes.

    Attributes:
        step: "adaptive": the largest e that moves no parameter tensor by more than c of its own
            norm, e = c minᵢ ‖θᵢ‖ / ‖uᵢ‖. Here c is the cube root of the dtype's machine epsilon,
            which balances truncation against rounding (measured in docs/benchmarks.md).
            "darts": e = 0.01 / ‖u‖ (Liu et al. 2019, section 2.3).
            A positive number r: e = r / ‖u‖.
        tf32: whether the displaced gradients may be computed in TF32, which PyTorch allows for
            convolutions on Ampere GPUs and later. It makes the products 25 to 500 times less
            accurate.

    Raises:
        EngineError: for another `step`.
    """

    step: float | str = "adaptive"
    tf32: bool = False

    name: ClassVar[str] = "finite_difference"
    uses_second_derivatives: ClassVar[bool] = False

    def __post_init__(self) -> None:
        valid = self.step in ("adaptive", "darts") if isinstance(self.step, str) else self.step > 0
        if not valid:
            raise EngineError(
                "FiniteDifference: step must be 'adaptive', 'darts' or a positive number, got "
                f"{self.step!r}."
            )

    def linearize(self, call: Pullback) -> FiniteDifferenceSystem:
        return FiniteDifferenceSystem(call, self)

    def step_size(
        self, parameters: Sequence[Tensor], direction: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Returns e for the perturbation θ ± e u of the parameters that u moves; 0 where u is zero.

        It does not wait for a GPU.

        Args:
            parameters: θ, one tensor per parameter.
            direction: u, likewise.
            dtype: in which the loss is computed.

        Returns:
            A tensor without dimensions, on the device and with a value in the dtype of θ.
        """
        dtype_of_theta = parameters[0].dtype.to_real()
        if self.step == "adaptive":
            # Tensor by tensor: a tensor with large entries would otherwise hide a small one that
            # moves by far more than its own size.
            moved, norms = norms_of(direction), norms_of(parameters)
            # A tensor that is still zero, like a new bias, counts as one with entries of 0.01.
            least = [0.01 * math.sqrt(tensor.numel()) for tensor in parameters]
            e = math.cbrt(torch.finfo(dtype).eps) * _least_ratio(norms, least, moved)
        else:
            norm = total_norm([tensor.detach() for tensor in direction])
            radius = 0.01 if self.step == "darts" else float(self.step)
            e = torch.where(norm > 0.0, radius / norm, torch.inf)
        # θ moves by exactly the amount that divides the difference: by e as θ's dtype rounds it.
        # Powers of two are exact in half precision, as are their inverses.
        if dtype_of_theta in (torch.float16, torch.bfloat16):
            e = e.float().log2().floor().exp2()
        # (u = 0 has led to ∞, and so has a norm that is not a number.)
        if e.is_cpu:
            value = e.item()
            return torch.tensor(value if math.isfinite(value) else 0.0, dtype=dtype_of_theta)
        return torch.where(e.isfinite(), e, 0.0).to(dtype_of_theta)


def _least_ratio(
    norms: Sequence[Tensor], least: Sequence[float], moved: Sequence[Tensor]
) -> Tensor:
    """The least of max(norm, least) / moved over those that are moved; ∞ where none is."""
    if norms[0].is_cpu:  # here reading numbers is faster than calling operators
        triples = zip(numbers(norms), least, numbers(moved), strict=True)
        ratios = [max(size, smallest) / u for size, smallest, u in triples if u > 0.0]
        return torch.tensor(ratios or [math.inf], dtype=torch.float64).min()
    by = torch.stack(tuple(moved))
    ratios_of = torch.stack(torch._foreach_clamp_min(list(norms), list(least))) / by
    return torch.where(by > 0.0, ratios_of, torch.inf).min()


class FiniteDifferenceSystem(LinearSystem):
    """Products from gradients at displaced parameters; these gradients are available too."""

    def __init__(self, call: Pullback, products: FiniteDifference) -> None:
        super().__init__(call)
        self.assumes = True
        self._products = products
        problem = call.solution.evaluation.loss.problem
        own = next(iter(problem.parameters.values()))
        # The rounding that a difference suffers is that of the loss, under autocast too.
        self.dtype = torch.bfloat16 if problem.precision == "bf16" else own.dtype
        point = call.solution.evaluation.parameters
        self._theta = _aliases(point)
        self._lend_if_needed()

    def _lend_if_needed(self) -> None:
        """Lets constants require gradients where the loss asks which parameters do.

        `p.requires_grad` chooses the parameters of many penalties. Displaced parameters are
        constants, without which the penalty would silently be another one. The value shows it.
        """
        loss = self.call.solution.evaluation.loss
        if loss.lends or loss.sharded or loss.problem.runs_compiled:
            return
        if loss.checks.was_dismissed("stand-ins") or not loss.checks.is_due("lending", once=True):
            return
        constants = list(map(Tensor.detach, self.call.input_aliases()))
        leaves = {name: theta.clone().requires_grad_() for name, theta in self._theta.items()}
        values = []
        with torch.enable_grad():
            for theta, inputs in (
                (_aliases(self._theta), constants),
                (leaves, self.call.input_aliases()),
            ):
                with self.call.losses(theta, inputs) as losses:
                    values.append({player: found.detach() for player, found in losses.items()})
        one, other = values
        if not loss.lends:  # the first may have asked for it by an error
            loss.lends = differing(one, other, [self.dtype]) is not None

    def check_assumptions(self, u: Cotangent, found: Sequence[Tensor | None], engine: str) -> None:
        super().check_assumptions(u, found, engine)
        if self.call.solution.evaluation.loss.checks.is_due(COMPARISON, once=True):
            self._compare(u, found, engine)

    @property
    def is_unchecked(self) -> bool:
        """Whether no product of this problem was compared with an exact one yet."""
        return not self.call.solution.evaluation.loss.checks.was_noted(COMPARISON)

    @property
    def parameters(self) -> Sequence[Tensor]:
        return list(self._theta.values())

    def gradient(self) -> Sequence[Tensor]:
        found: dict[str, Tensor] = {}
        for player, members in self.players.items():
            own = self._own_gradient(player)
            found |= {name: own[name] for name in members}
        return [found[name] for name in self.names]

    def step_size(self, u: Sequence[Tensor]) -> Tensor:
        """The e at which θ ± e u is a suitable displacement; 0 where u is zero."""
        return self._products.step_size(self.parameters, u, self.dtype)

    def gradient_at(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """F at other `parameters`, with the optimizer's L2 penalty; no games."""
        theta = dict(zip(self.names, parameters, strict=True))
        found = self._gradient_at(self._player(), theta, in_inputs=False)
        return self._with_penalty(self._signed(found), parameters)

    def input_gradient_at(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """∇ of the minimized loss in the wanted inputs, at other `parameters`; no games."""
        theta = dict(zip(self.names, parameters, strict=True))
        found = self._gradient_at(self._player(), theta, in_inputs=True)
        return [-entry for entry in found] if self._negated else found

    def _player(self) -> str:
        (player,) = self.players
        return player

    def mixed_vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        return self._mixed(u)

    def _mixed(self, u: Sequence[Tensor | None], factor: float = 1.0) -> list[Tensor | None]:
        """Bᵀ u, with Aᵀ u for the inputs from whose value the parameters started."""
        found = self.call.scatter(self._difference(u, in_inputs=True, factor=factor))
        start = self.call.start
        if start is None:
            return found
        source = self.call.source(self.call.inputs)
        wanted = {key: t for key, (place, t) in source.items() if self.call.wanted[place]}
        if wanted:
            along = zeros_for_none(
                self._difference(u, in_inputs=False, factor=factor), self.parameters
            )
            terms = start.pulled(dict(zip(self.names, along, strict=True)), wanted)
            for key, term in terms.items():
                place = source[key][0]
                found[place] = add(found[place], term)
        return found

    def _hessian_vjp(self, u: Sequence[Tensor]) -> list[Tensor]:
        return zeros_for_none(self._difference(u, in_inputs=False), self.parameters)

    def _jacobian_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        # (F(θ + e u) − F(θ − e u)) / 2e: here all players move, each player's own gradient is read.
        directions = dict(zip(self.names, u, strict=True))
        e = self._step_size_along(directions)
        found: dict[str, Tensor] = {}
        for player, members in self.players.items():
            sides = self._both_sides(directions, e)
            terms = zeros_for_none(
                self._weighted_gradients(player, sides, in_inputs=False), self.parameters
            )
            of_all = dict(zip(self.names, terms, strict=True))
            found |= {name: of_all[name] for name in members}
        return self._signed([found[name] for name in self.names])

    def _difference(
        self, u: Sequence[Tensor | None], *, in_inputs: bool, factor: float = 1.0
    ) -> list[Tensor | None]:
        """Σ_p (∇ L_p(θ_p + e u_p) − ∇ L_p(θ_p − e u_p)) / 2e, with ∇ in the inputs or in θ.

        None where no loss depends on an entry: what is below it then takes no part.
        """
        of = self.call.select(self.call.inputs) if in_inputs else self.parameters
        total: list[Tensor | None] = [None] * len(of)
        # A player's loss is differenced along the player's own direction, with its own step size.
        for player, directions in self._by_player(u).items():
            e = self._step_size_along(directions)
            e = e if factor == 1.0 else e * factor
            terms = self._weighted_gradients(
                player, self._both_sides(directions, e), in_inputs=in_inputs
            )
            total = list(map(add, total, terms))
        return total

    def _own_gradient(self, player: str) -> dict[str, Tensor]:
        """∇ of a player's loss in the parameters, at the parameters; by name."""
        gradient = self._gradient_at(player, self._theta, in_inputs=False)
        return dict(zip(self.names, gradient, strict=True))

    def _step_size_along(self, directions: Mapping[str, Tensor]) -> Tensor:
        """The e of a player's differences, along its own directions; by name."""
        theta = [self._theta[name] for name in directions]
        return self._products.step_size(theta, list(directions.values()), self.dtype)

    def _gradient_at(
        self, player: str, parameters: Mapping[str, Tensor], *, in_inputs: bool
    ) -> list[Tensor]:
        """∇ of a player's loss at `parameters`, in the wanted inputs or in the parameters."""
        found = self._weighted_gradients(player, [(1.0, parameters)], in_inputs=in_inputs)
        of = self.call.select(self.call.inputs) if in_inputs else self.parameters
        return zeros_for_none(found, of)

    def _both_sides(
        self, directions: Mapping[str, Tensor], e: Tensor
    ) -> Iterator[tuple[Tensor | float, dict[str, Tensor]]]:
        """Yields (1 / 2e, θ + e u), then (−1 / 2e, θ − e u), both in the same memory.

        Where e is zero, as u is, the weights are zero.
        """
        # On the CPU also from one product to the next: to give memory back and get it anew takes
        # as long as to write it several times.
        moved = self.call.solution.evaluation.loss.displaced if e.is_cpu else {}
        weight: Tensor | float
        number = e.item() if e.is_cpu else None  # which is read faster than operators are called
        if number is None:
            weight = torch.where(e > 0.0, 0.5 / e, 0.0)
        else:
            weight = 0.5 / number if number > 0.0 else 0.0
        for sign in (1.0, -1.0):
            point = dict(self._theta)
            for name, u in directions.items():
                # From θ each time: moving back by −2e would add the rounding of a second sum. (None
                # of these requires a gradient.)
                theta, out = self._theta[name], moved.get(name)
                if out is not None and (out.shape, out.dtype) != (theta.shape, theta.dtype):
                    out = None  # the module was converted since
                if number is None:
                    moved[name] = torch.addcmul(theta, u, e, value=sign, out=out)
                else:
                    moved[name] = torch.add(theta, u, alpha=sign * number, out=out)
                point[name] = moved[name]
            yield sign * weight, point

    def _weighted_gradients(
        self,
        player: str,
        points: Iterable[tuple[Tensor | float, Mapping[str, Tensor]]],
        *,
        in_inputs: bool,
    ) -> list[Tensor | None]:
        """Σ w ∇L_p(θ), over pairs of a weight w and a point θ, for a player p.

        The gradient is taken in the wanted inputs, or in the parameters. What the loss computes
        from the inputs alone (`mlo.once`) is computed and differentiated once for all points.
        """
        inputs = self.call.input_aliases()
        if not in_inputs:
            inputs = list(map(Tensor.detach, inputs))
        of = self.call.select(inputs)
        # (`check_engines` refuses finite differences for a loss that reads a solution depending on
        # this problem: it would depend on θ, and is held fixed here.)
        problem = self.call.solution.evaluation.loss.problem
        shared = SharedResults(problem.name, problem.generators)
        total: list[Tensor | None] = []
        # The tensors of the first point stay in place until the shared results have been
        # differentiated, because checkpointing runs modules again.
        with torch.enable_grad(), ExitStack() as stack:
            if problem.device.type == "cuda":
                stack.enter_context(without_tf32(problem.device, allowed=self._products.tf32))
            for weight, parameters in points:
                theta = _aliases(parameters)
                if not in_inputs:
                    theta = {name: tensor.requires_grad_() for name, tensor in theta.items()}
                losses = stack.enter_context(
                    self.call.losses(theta, inputs, players=(player,), shared=shared)
                )
                like = [*of, *shared.leaves] if in_inputs else list(theta.values())
                loss = losses[player]
                terms: Sequence[Tensor | None] = [None] * len(like)
                if loss.requires_grad:
                    terms = grad([loss], like)
                scaled = [None if term is None else term * weight for term in terms]
                total = list(map(add, total, scaled)) if total else scaled
            if not in_inputs or not shared.leaves:
                return total

            # L = f(θ, s(x), x): what flows through the shared s joins the rest (see `mlo.once`).
            cotangents = zeros_for_none(total[len(of) :], shared.leaves)
            return list(map(add, total[: len(of)], shared.gradients(cotangents, of)))

    # ------------------------------ compared with what they stand for

    def _compare(self, u: Cotangent, found: Sequence[Tensor | None], engine: str) -> None:
        """Compares a product with an exact one, or the loss's values with its gradient.

        The values show what is detached, but no kinks. They are for losses without a second
        derivative, or if memory is too short for one.
        """
        tolerance = TOLERANCE * (4.0 if self.dtype == torch.bfloat16 else 1.0)
        pair = self._exact(u)
        if pair is None:
            self._compare_values(u, tolerance / 5.0, engine)
            return
        exact, size = pair
        ours = self._of_wanted(found)
        error = _distance(ours, exact)
        # Rounding of two gradients, which the difference divides by its step.
        noise = 10.0 * torch.finfo(self.dtype).eps * size / max(self._displacement(u), 1e-30)
        if error <= tolerance * _norm(exact) + noise:
            return
        # Rounding and kinks change with the step size; a detached part does not.
        twice = self._of_wanted(self._mixed(u, factor=2.0))
        steady = error > 3.0 * _distance(ours, twice)
        if steady or error > UNSTEADY * tolerance * _norm(exact):
            warn_user(
                f"Problem {self.problem!r}: a finite difference, which the engine {engine!r} "
                f"uses, is {error:.3g} away from the exact product (their norms are "
                f"{_norm(ours):.3g} and {_norm(exact):.3g}). {DETACHED if steady else KINKS}"
            )

    def _compare_values(self, u: Cotangent, tolerance: float, engine: str) -> None:
        """Compares the change of the loss along u with what its gradient predicts."""
        for player, directions in self._by_player(u).items():
            difference, slope, noise = self._slopes(player, directions)
            if abs(difference - slope) > tolerance * max(abs(difference), abs(slope)) + noise:
                warn_user(
                    f"Problem {self.problem!r}: along a direction its loss changes by "
                    f"{difference:.3g}, and its gradient says {slope:.3g}; the engine {engine!r} "
                    f"uses finite differences. {DETACHED_ALONE}"
                )

    def _exact(self, u: Cotangent) -> tuple[list[Tensor], float] | None:
        """Bᵀ u of the wanted inputs, and the size of the gradient in them; None: there is none."""
        try:
            with ExitStack() as stack:
                if "torch._dynamo" in sys.modules:
                    # Compiled code, in modules or in the loss itself, has no second derivative.
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                call = replace(self.call, stack=stack, differentiate=False)
                system = Autograd().linearize(call)
                system.check_silent_operations()
                if system.hides_a_part():
                    return None
                exact = [entry.detach() for entry in self._of_wanted(system.mixed_vjp(u))]
                return exact, system.input_gradient_norm()
        except (torch.OutOfMemoryError, EngineError):
            return None
        except RuntimeError as error:
            if not is_about_double_backward(error):
                raise
            return None

    def _of_wanted(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        """The entries of the wanted inputs; zeros of those that no loss depends on."""
        entries = [entry for entry, want in zip(found, self.call.wanted, strict=True) if want]
        return zeros_for_none(entries, self.call.select(self.call.inputs))

    def _displacement(self, u: Cotangent) -> float:
        """The smallest step of the differences in a direction."""
        sizes = [
            float(self._step_size_along(directions)) for directions in self._by_player(u).values()
        ]
        return min((size for size in sizes if size > 0.0), default=0.0)

    def _slopes(self, player: str, directions: Mapping[str, Tensor]) -> tuple[float, float, float]:
        """(L₊ − L₋) / 2e of a player, ⟨∇L, u⟩, and what rounding may make of their difference."""
        e = self._step_size_along(directions)
        if not bool(e):
            return 0.0, 0.0, 0.0
        # The difference knows the loss itself; the slope knows only what autograd sees of it.
        inputs = [tensor.detach() for tensor in self.call.input_aliases()]
        problem = self.call.solution.evaluation.loss.problem
        shared = SharedResults(problem.name, problem.generators)
        values = []
        with torch.enable_grad():
            for _, parameters in self._both_sides(directions, e):
                with self.call.losses(
                    _aliases(parameters), inputs, players=(player,), shared=shared
                ) as losses:
                    values.append(float(losses[player].detach()))
        own = self._own_gradient(player)
        slope = sum(float(real_inner(own[name], u)) for name, u in directions.items())
        noise = 10.0 * torch.finfo(self.dtype).eps * max(map(abs, values)) / float(e)
        return (values[0] - values[1]) / (2.0 * float(e)), slope, noise


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as constants of their own, which a loss may freeze and thaw (an attack)."""
    return dict(zip(tensors, map(Tensor.detach, tensors.values()), strict=True))


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return _norm([a - b for a, b in zip(one, other, strict=True)])


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(total_norm([tensor.detach() for tensor in tensors])) if tensors else 0.0


register_products(FiniteDifference)
