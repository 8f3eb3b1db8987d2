"""What all iterative inverses share: flat vectors, damping, warm starts and the stopping rule."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.evaluation import zeros_for_none
from mlo.hypergradient.base import Cotangent, Engine, Solve
from mlo.hypergradient.products import LinearSystem
from mlo.sharding import sharded_like, whole

__all__ = ["FlatOperator", "IterativeEngine", "Outcome"]

REFRESH = 100
"""Solves after which a kept step size is estimated anew."""


class FlatOperator:
    """u ↦ (A + damping · I)ᵀ u on flat vectors, counting products.

    Args:
        system: products on lists of tensors.
        damping: added to the diagonal.
    """

    def __init__(self, system: LinearSystem, damping: float) -> None:
        self._system = system
        self._damping = damping
        self._shapes = [tensor.shape for tensor in system.parameters]
        self._sizes = [tensor.numel() for tensor in system.parameters]
        self.products = 0

    def __call__(self, u: Tensor) -> Tensor:
        self.products += 1
        product = self.flatten(self._system.transpose_product(self.split(u)))
        return product + self._damping * u if self._damping else product

    def flatten(self, parts: Cotangent) -> Tensor:
        """One vector [n] of a tensor for each parameter; None counts as zero."""
        return torch.cat(
            [whole(part).reshape(-1) for part in zeros_for_none(parts, self._system.parameters)]
        )

    def split(self, flat: Tensor) -> list[Tensor]:
        """The inverse of `flatten`."""
        parts: Sequence[Tensor] = torch.split(flat, self._sizes)
        return [
            sharded_like(part.view(shape), parameter)
            for part, shape, parameter in zip(
                parts, self._shapes, self._system.parameters, strict=True
            )
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an iteration ended with.

    Attributes:
        x: approximate solution of (A + damping · I)ᵀ x = b, flat [n].
        residual: ‖b − (A + damping · I)ᵀ x‖ relative to the cotangent's norm: of the damped system.
        curvature: smallest uᵀAu / uᵀu met, or None.
    """

    x: Tensor
    residual: float
    converged: bool
    advice: str = ""
    curvature: float | None = None


@dataclass(frozen=True, kw_only=True)
class IterativeEngine(Engine):
    """Base of the engines that solve (A + damping · I)ᵀ q = v by products alone.

    Attributes:
        damping: added to the diagonal of A (with the optimizer's weight decay, which is part of A
            already).
        warm_start: start each solve from the solution of the last one on the same problem.
    """

    damping: float = 0.0
    warm_start: bool = False

    inverts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "damping", self.damping)
        if hasattr(self, "tol"):
            check_number(self.name, "tol", self.tol)

    @abstractmethod
    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> Outcome:
        """Solves operator(x) ≈ b from x = 0.

        Args:
            operator: the damped product with Aᵀ.
            b: right-hand side, flat [n].
            scale: norm of the cotangent, to which residuals are relative.
            system: the system behind the operator.
        """

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        operator = FlatOperator(system, self.damping)
        v = operator.flatten(cotangent)
        scale = float(v.detach().norm())
        if scale == 0.0:
            return Solve(q=operator.split(v), report=self.report(system.problem, residual=0.0))
        start = system.recall("q") if self.warm_start else None
        if start is not None and start.shape == v.shape:
            # (A q0 + A d) = v: the correction d solves the same system with the residual of the
            # last solution.
            outcome = self.iterate(operator, v - operator(start), scale, system)
            q = start + outcome.x
        else:
            outcome = self.iterate(operator, v, scale, system)
            q = outcome.x
        if self.warm_start:
            system.keep("q", q)
        report = self.report(
            system.problem,
            iterations=operator.products,
            residual=outcome.residual,
            converged=outcome.converged,
            advice=outcome.advice,
            curvature=outcome.curvature,
        )
        return Solve(q=operator.split(q), report=report)


def at_least_one(engine: str, option: str, value: int) -> None:
    """Checks a count.

    Raises:
        EngineError: if it is not a positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EngineError(
            f"Engine {engine!r}: {option} must be an integer of at least 1, got {value!r}."
        )


def check_number(engine: str, option: str, value: object, *, positive: bool = False) -> None:
    """Checks an option that is a number.

    Raises:
        EngineError: if it is no number, is negative or, with `positive`, zero.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = " YAML reads 1e-3 as text: write 1.0e-3." if isinstance(value, str) else ""
        raise EngineError(f"Engine {engine!r}: {option} must be a number, got {value!r}.{hint}")
    if not (value > 0.0 if positive else value >= 0.0):
        wanted = "positive" if positive else "not be negative"
        raise EngineError(
            f"Engine {engine!r}: {option} must {'be ' if positive else ''}{wanted}, got {value!r}."
        )


def checked_step_size(engine: str, step_size: float | str) -> None:
    """Checks a step size.

    Raises:
        EngineError: if it is neither "auto" nor a positive number.
    """
    if step_size == "auto":
        return
    if (
        isinstance(step_size, (bool, str))
        or not isinstance(step_size, (int, float))
        or not step_size > 0.0
    ):
        raise EngineError(
            f"Engine {engine!r}: step_size must be 'auto' or a positive number, got {step_size!r}."
        )


def conjugate_gradients(
    operator: FlatOperator,
    b: Tensor,
    scale: float,
    *,
    max_steps: int,
    tol: float,
    precondition: Callable[[Tensor], Tensor] | None = None,
    more: str = "max_steps",
) -> Outcome:
    """Solves operator(x) = b from x = 0 for a symmetric positive definite operator.

    At a direction of curvature that is not positive it stops with what it has.

    Args:
        operator: the product.
        b: right-hand side, flat [n].
        scale: the norm to which residuals are relative.
        max_steps: most products.
        tol: relative residual at which it stops.
        precondition: r → an approximation of the solution for the right-hand side r, symmetric
            positive definite.
        more: what to raise when the steps are not enough.
    """
    x = torch.zeros_like(b)
    r = b
    z = p = r if precondition is None else precondition(r)
    rz = r @ z
    smallest: float | None = None
    residual = float(r.detach().norm()) / scale
    for _ in range(max_steps):
        if residual <= tol:
            break
        product = operator(p)
        curvature = p @ product
        met = float((curvature / (p @ p)).detach())
        smallest = met if smallest is None else min(smallest, met)
        if not met > 0.0:
            return Outcome(
                x=x,
                residual=residual,
                converged=False,
                advice=f"The curvature is {met:.3g} along a direction, so the Jacobian is not "
                "positive definite: add damping "
                f"above {-met:.3g}, or use 'minres' (symmetric) or 'gmres' (games).",
                curvature=smallest,
            )
        step = rz / curvature
        x, r = x + step * p, r - step * product
        residual = float(r.detach().norm()) / scale
        z = r if precondition is None else precondition(r)
        previous, rz = rz, r @ z
        p = z + (rz / previous) * p
    converged = residual <= tol
    advice = (
        "" if converged else f"Raise {more}, add damping, or accept the truncation by a larger tol."
    )
    return Outcome(x=x, residual=residual, converged=converged, advice=advice, curvature=smallest)


def fixed_noise(operator: FlatOperator, system: LinearSystem, columns: int) -> Tensor:
    """A standard normal matrix [n, columns] that is always the same for a parameter's name and
    shape.

    It depends neither on the cotangent, so that solves which use it stay linear in the cotangent,
    nor on the order in which parameters are registered.
    """
    flat = []
    for column in range(columns):
        parts = []
        for name, tensor in zip(system.names, system.parameters, strict=True):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{column}".encode()))
            parts.append(
                torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            )
        flat.append(operator.flatten(parts))
    return torch.stack(flat, dim=1)


def stiffness(u: Tensor, product: Tensor) -> float:
    """The 1/α of a step along u at which the component of u decays fastest, from u and Aᵀu.

    q ← q − α Aᵀq multiplies the component of an eigenvalue λ by 1 − αλ, which is least in modulus
    at α = Re λ / |λ|². For a symmetric positive definite A that is 1/λ; for the spirals of a game
    it is smaller than 1/|λ|, at which they grow. It is ⟨u, Aᵀu⟩ / ‖Aᵀu‖² here, but at least a
    hundredth of 1/|λ|: at eigenvalues near the imaginary axis, or of both signs, no step makes
    everything decay, and one that is nearly zero would only stand still.
    """
    size, along = float(product.norm()), float(u @ product)
    if size == 0.0:
        return 0.0
    ratio = size / float(u.norm())
    return min(size * size / along, 100.0 * ratio) if along > 0.0 else ratio


def largest_stiffness(operator: FlatOperator, system: LinearSystem, products: int = 10) -> float:
    """Estimates the stiffness (λmax of a positive definite matrix) by power iteration."""
    u = fixed_noise(operator, system, 1)[:, 0]
    estimate = 0.0
    with torch.no_grad():
        for _ in range(products):
            u = u / u.norm()
            product = operator(u).detach()
            estimate = stiffness(u, product)
            if estimate == 0.0:
                break
            u = product
    return estimate


def persistent_step_size(
    step_size: float | str, operator: FlatOperator, system: LinearSystem, *, observed: float
) -> float:
    """Returns α; for "auto" 1 / λmax (see `stiffness`), kept from one solve to the next.

    Args:
        step_size: the option.
        operator: estimates λmax when there is no estimate yet, and anew every `REFRESH` solves, so
            that a batch of unusual curvature is forgotten.
        system: keeps the estimate.
        observed: ‖Aᵀu‖ / ‖u‖ of a vector met since, a lower bound of λmax; a vector that diverges
            turns to the direction of the largest eigenvalue, so the estimate grows before it can
            blow up.
    """
    if not isinstance(step_size, str):
        return float(step_size)
    known, age = system.recall("curvature"), system.recall("age")
    solves = 0 if age is None else int(age)
    largest = (
        largest_stiffness(operator, system)
        if known is None or solves % REFRESH == 0
        else float(known)
    )
    if math.isfinite(observed):
        largest = max(largest, observed)
    if not math.isfinite(largest):
        return 0.0  # of a gradient that is lost itself; nothing is kept of it
    system.keep("curvature", torch.tensor(largest, dtype=torch.float64))
    system.keep("age", torch.tensor(solves + 1))
    return 1.0 / largest if largest > 0.0 else 1.0
