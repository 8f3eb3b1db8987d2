"""How far a lower problem is from the solution that an implicit engine assumes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from mlo.gradient_norm import total_norm
from mlo.hypergradient.products import Engine
from mlo.optimizer_traits import l2_penalty
from mlo.response import Pullback
from mlo.solution import Evaluation, Reading, Stationary

__all__ = ["backward_error", "signs_like", "size_of_terms", "stationarities"]


def stationarities(evaluation: Evaluation, held_constant: Collection[str]) -> dict[str, float]:
    """Lower problem → its relative ‖F‖, of all that a gradient takes for stationary points.

    Args:
        evaluation: of the upper problem.
        held_constant: problems whose solutions are treated as constants.
    """
    found: dict[str, float] = {}
    for name, solution in evaluation.solutions.items():
        flows = name in evaluation.dependent and name not in held_constant
        if flows and isinstance(solution, Stationary):
            value = _stationarity(solution)
            if value is not None:
                found[name] = value
    return found


def _stationarity(solution: Stationary) -> float | None:
    """‖F‖ at the current parameters, relative to the terms that cancel in it at a solution.

    It is evaluated on the batches and with the noise of the solves, and costs one product.

    Returns:
        0 at a solution, and about 1 where nothing cancels; None if the engine has no products.
    """
    evaluation, engine = solution.evaluation, solution.engine
    if not isinstance(engine, Engine):
        return None
    inputs: list[Tensor] = []
    for item in evaluation.free_inputs:
        if item.solution is None:
            inputs += evaluation.values[item.name].values()
        else:
            inputs += item.solution.constants().values()
    with ExitStack() as stack:
        call = Pullback(
            solution=solution,
            outputs=tuple(solution.value.values()),
            inputs=inputs,
            wanted=[True] * len(inputs),
            differentiate=False,
            reading=Reading(
                values=evaluation.values, solutions=evaluation.solutions, reader=solution.name
            ),
            stack=stack,
        )
        system = engine.products.linearize(call)
        own = [tensor.detach() for tensor in system.parameters]
        f = [entry.detach() for entry in system.gradient()]
        if solution.residual is None:
            decay = l2_penalty(evaluation.loss.problem)
            pairs = zip(f, own, system.names, strict=True)
            f = [entry + decay[name] * tensor for entry, tensor, name in pairs]
        signs = signs_like(own)
        products = [*system.transpose_product(signs), *system.mixed_vjp(signs)]
    sizes: list[float] = []
    for product, at in zip(products, [*own, *inputs], strict=True):
        if product is not None:  # F does not depend on this input
            sizes.append(size_of_terms(product.detach(), at.detach()))
    return backward_error(f, math.hypot(*sizes))


def backward_error(f: Sequence[Tensor], terms: float) -> float:
    """‖F‖ relative to the terms that should cancel in it.

    To first order F is a sum of terms A_ij θ_j and B_ik x_k (and of constants of their size), which
    cancel at the solution. ‖F‖ relative to these terms is the relative change of the terms, of
    parameters or data, at which θ would be a solution. It has no units: factors on F, on entries of
    θ or on entries of x do not change it. (‖A θ‖ would cost the same, and vanish with F where a
    loss is invariant to the scale of θ.) The error of θ is that much times the conditioning of A.

    Args:
        f: F.
        terms: the size of these, of `size_of_terms` over θ and x.
    """
    size = float(total_norm(list(f)))
    return size / terms if terms > 0.0 else (math.inf if size > 0.0 else 0.0)


def signs_like(like: Sequence[Tensor]) -> list[Tensor]:
    """Signs drawn at random, always the same, in the shapes of some tensors."""
    generator = torch.Generator(like[0].device).manual_seed(0)
    found = []
    for tensor in like:
        coin = torch.randint(2, tensor.shape, generator=generator, device=tensor.device)
        found.append((2 * coin - 1).to(tensor.dtype))
    return found


def size_of_terms(product: Tensor, at: Tensor) -> float:
    """‖(Aᵀ w) ∘ θ‖: in the mean over signs w the root of Σ (A_ij θ_j)²."""
    # A solution of zero, to the tolerance of its solver, has no size: entries count as 6e-6 at
    # least (in float32 as 5e-3).
    size = at.abs().clamp(min=math.cbrt(torch.finfo(product.dtype).eps))
    return float((product * size).norm())
