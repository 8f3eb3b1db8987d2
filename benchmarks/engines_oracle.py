"""The references of `engines.py`: solutions of lower problems, and exact gradients there.

They use plain autograd in float64, and none of the measured libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from engines_problems import Level, Task, Tensors
from torch import Tensor

__all__ = ["Reference", "flat", "reference"]

DENSE = 800
"""Up to this many parameters a Hessian is written out; beyond, conjugate gradients solve."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The points at which errors are measured, and the exact gradients there.

    Attributes:
        values: problem → its parameters, every lower problem at its solution.
        implicit: the total gradient of the outermost loss by the implicit function theorem, flat.
        one_step: its total gradient through one SGD step of every lower problem, flat.
        step_size: 1 / λmax over the Hessians of the lower problems, for Neumann series.
        residual: largest gradient norm of a lower loss at its solution.
        sizes: problem → number of parameters.
    """

    values: dict[str, Tensors]
    implicit: Tensor
    one_step: Tensor
    step_size: float
    residual: float
    sizes: dict[str, int]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries as one vector [n]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(vector, [tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _leaves(values: Mapping[str, Tensors], names: Sequence[str]) -> dict[str, Tensors]:
    """Copies of the problems' tensors, as leaves of a new graph."""
    return {name: _leaves_of(values[name]) for name in names}


def _leaves_of(tensors: Tensors) -> Tensors:
    return {key: tensor.detach().clone().requires_grad_() for key, tensor in tensors.items()}


def _grouped(flat_tensors: Sequence[Tensor], like: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """Problem → the entries of its tensors as one vector, from the tensors of all of them."""
    rest, found = list(flat_tensors), {}
    for name, tensors in like.items():
        found[name] = flat(rest[: len(tensors)])
        rest = rest[len(tensors) :]
    return found


class _Hessian:
    """The gradient of a level's loss in its own parameters, and products with its derivatives."""

    def __init__(self, level: Level, values: Mapping[str, Tensors]) -> None:
        self._tensors = _leaves(values, (level.name, *level.reads))
        self._own = list(self._tensors[level.name].values())
        loss = level.loss(self._tensors, level.batch)
        self._gradient = torch.autograd.grad(loss, self._own, create_graph=True)
        self.gradient = flat(self._gradient).detach()

    def product(self, u: Tensor) -> Tensor:
        """H u."""
        found = torch.autograd.grad(
            self._gradient, self._own, _split(u, self._own), retain_graph=True
        )
        return flat(found)

    def mixed(self, u: Tensor, reads: Sequence[str]) -> dict[str, Tensor]:
        """What is read → (∂gradient / ∂read)ᵀ u, flat."""
        tensors = {read: self._tensors[read] for read in reads}
        inputs = [tensor for of_read in tensors.values() for tensor in of_read.values()]
        found = torch.autograd.grad(
            self._gradient, inputs, _split(u, self._own), retain_graph=True, materialize_grads=True
        )
        return _grouped(found, tensors)

    def solve(self, b: Tensor) -> Tensor:
        """H⁻¹ b.

        Raises:
            RuntimeError: if H is not positive definite or the residual stays above 1e-10.
        """
        x = self._dense(b) if len(b) <= DENSE else self._conjugate_gradients(b)
        residual = float((self.product(x) - b).norm() / b.norm())
        if not residual < 1e-10:
            raise RuntimeError(
                f"the oracle's system was solved to a relative residual of {residual:.1e} only"
            )
        return x

    def _dense(self, b: Tensor) -> Tensor:
        matrix = torch.stack([self.product(row) for row in torch.eye(len(b), dtype=b.dtype)])
        factor, info = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
        if int(info):
            raise RuntimeError(
                "the Hessian of a lower problem is not positive definite at its solution"
            )
        x = torch.cholesky_solve(b[:, None], factor)[:, 0]
        # The factorization leaves condition × 1e-16; one step of refinement takes that away.
        return x + torch.cholesky_solve((b - self.product(x))[:, None], factor)[:, 0]

    def _conjugate_gradients(self, b: Tensor) -> Tensor:
        x, r = torch.zeros_like(b), b
        p, rr = r, r @ r
        for _ in range(5 * len(b)):
            product = self.product(p)
            curvature = p @ product
            if not curvature > 0:
                raise RuntimeError(
                    "the Hessian of a lower problem is not positive definite at its solution"
                )
            x, r = x + rr / curvature * p, r - rr / curvature * product
            before, rr = rr, r @ r
            if rr.sqrt() < 1e-12 * b.norm():
                break
            p = r + rr / before * p
        return x

    def largest_eigenvalue(self) -> float:
        """λmax by power iteration, a little too large rather than too small."""
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(len(self.gradient), generator=generator, dtype=self.gradient.dtype)
        for _ in range(100):
            u = self.product(u / u.norm())
        return 1.02 * float(u.norm())


def _minimise(level: Level, values: dict[str, Tensors]) -> float:
    """Moves `values[level.name]` to a stationary point; returns the gradient's norm.

    By LBFGS, then Newton's method.
    """
    tensors = {name: dict(values[name]) for name in (level.name, *level.reads)}
    own = tensors[level.name] = _leaves_of(values[level.name])
    optimizer = torch.optim.LBFGS(
        own.values(),
        max_iter=1500,
        tolerance_grad=1e-4,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = level.loss(tensors, level.batch)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    values[level.name] = {key: tensor.detach() for key, tensor in own.items()}

    # LBFGS comes near; Newton's method converges to rounding from there.
    norm = float("inf")
    for _ in range(10):
        hessian = _Hessian(level, values)
        norm = float(hessian.gradient.norm())
        if norm < 1e-12:
            break
        own_values = values[level.name]
        step = _split(hessian.solve(hessian.gradient), list(own_values.values()))
        values[level.name] = {
            key: t - s for (key, t), s in zip(own_values.items(), step, strict=True)
        }
    if not norm < 1e-10:
        raise RuntimeError(
            f"the problem {level.name!r} was solved to a gradient norm of {norm:.1e} only"
        )
    return norm


def _implicit(task: Task, values: Mapping[str, Tensors]) -> Tensor:
    """One reverse sweep: each cotangent goes through H⁻¹ and the mixed derivatives."""
    upper = task.upper
    tensors = _leaves(values, (upper.name, *upper.reads))
    inputs = [tensor for name in tensors for tensor in tensors[name].values()]
    found = torch.autograd.grad(upper.loss(tensors, upper.batch), inputs, materialize_grads=True)
    cotangents = _grouped(found, tensors)
    for level in reversed(task.lower):
        hessian = _Hessian(level, values)
        q = hessian.solve(cotangents[level.name])
        for read, product in hessian.mixed(q, level.reads).items():
            cotangents[read] = cotangents.get(read, torch.zeros_like(product)) - product
    return cotangents[upper.name]


def _one_step(task: Task, values: Mapping[str, Tensors]) -> Tensor:
    """Nested autograd through θ' = θ − lr ∇L of every lower problem.

    Each reads what those before it became.
    """
    leaves = _leaves(values, [level.name for level in task.levels])
    tensors = dict(leaves)
    for level in task.lower:
        own = leaves[level.name]
        loss = level.loss({**tensors, level.name: own}, level.batch)
        gradient = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        tensors[level.name] = {
            key: t - level.lr * g for (key, t), g in zip(own.items(), gradient, strict=True)
        }
    upper = list(leaves[task.upper.name].values())
    loss = task.upper.loss(tensors, task.upper.batch)
    return flat(torch.autograd.grad(loss, upper, materialize_grads=True))


def reference(task: Task) -> Reference:
    """Solves the lower problems and differentiates the outermost loss exactly, both ways.

    Raises:
        RuntimeError: if a solution or a linear system was not reached to the accuracy that the
            errors need.
    """
    values = {level.name: dict(level.values) for level in task.levels}
    residual = max(_minimise(level, values) for level in task.lower)
    largest = max(_Hessian(level, values).largest_eigenvalue() for level in task.lower)
    sizes = {}
    for level in task.levels:
        sizes[level.name] = sum(tensor.numel() for tensor in level.values.values())
    return Reference(
        values=values,
        implicit=_implicit(task, values),
        one_step=_one_step(task, values),
        step_size=1.0 / largest,
        residual=residual,
        sizes=sizes,
    )
