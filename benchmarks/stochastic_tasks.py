"""Bilevel tasks of benchopt's bilevel suite's kinds, in torch and, for the suite's solvers, in jax.

Quadratics of a given condition number, data cleaning, and one regulariser per feature. Each task's
data are blocks of 64 samples. `value` judges x alone: it solves the lower problem to the end. (So a
method that keeps several copies of the lower variable, as F2SA does, is not judged by one of them.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

BATCH = 64
Loss = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One bilevel problem.

    Attributes:
        name: as in the table.
        z0, x0: where both variables begin.
        lower, upper: losses of z, x and the tensors of a batch.
        lower_data, upper_data: tensors whose rows are divided into blocks.
        rows: rows per block of 64 samples.
        jax_losses: makes the suite's `f_inner` and `f_outer`.
        value: x → what is minimised, and a second number to report.
        unit: what these are.
    """

    name: str
    z0: np.ndarray
    x0: np.ndarray
    lower: Loss
    upper: Loss
    lower_data: tuple[Tensor, ...]
    upper_data: tuple[Tensor, ...]
    rows: int
    jax_losses: Callable[[], tuple[Any, Any]]
    value: Callable[[np.ndarray], tuple[float, float]]
    unit: str

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of the lower and the upper data."""
        return len(self.lower_data[0]) // self.rows, len(self.upper_data[0]) // self.rows


# ------------------------------ quadratics


def quadratic(smallest: float, *, n: int = 2048, m: int = 1024, d: int = 50, p: int = 10) -> Task:
    """Means of ½ zᵀA_i z + ½ xᵀG_i x + xᵀC_i z + aᵀz + cᵀx, A's spectrum from `smallest` to 1.

    The Hessians of samples are a aᵀ with random a, as in the suite. Blocks are kept by their means,
    which are all that a batch's derivatives depend on.
    """
    rng = np.random.default_rng(7)

    def hessians(count: int, size: int, low: float) -> np.ndarray:
        basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
        root = (basis * np.logspace(np.log10(low) / 2, 0.0, size)) @ basis.T
        a = rng.standard_normal((count // BATCH, BATCH, size)) @ root
        return np.einsum("bki,bkj->bij", a, a) / BATCH

    def terms(count: int) -> list[np.ndarray]:
        u, _ = np.linalg.qr(rng.standard_normal((p, p)))
        v, _ = np.linalg.qr(rng.standard_normal((d, p)))
        cross = (u * np.logspace(np.log10(smallest), -1.0, p)) @ v.T
        noise = rng.standard_normal((count // BATCH, p, d)) * 0.1 / np.sqrt(BATCH)
        linear = rng.standard_normal((count // BATCH, BATCH, d + p)).mean(1)
        return [
            hessians(count, d, smallest),
            hessians(count, p, 0.1),
            cross + noise,
            linear[:, :d],
            linear[:, d:],
        ]

    lower, upper = terms(n), terms(m)
    (A, _, C, a, _), (F, G, K, f, k) = ([t.mean(0) for t in side] for side in (lower, upper))
    # The Hessian of the value function, both halves of its cross term included.
    J = -np.linalg.solve(A, C.T)
    hessian = J.T @ F @ J + G + K @ J + (K @ J).T
    assert np.linalg.eigvalsh(hessian)[0] > 0.0

    def value(x: np.ndarray) -> tuple[float, float]:
        z = np.linalg.solve(A, -a - C.T @ x)
        g = G @ x + K @ z + k - C @ np.linalg.solve(A, F @ z + K.T @ x + f)
        return float(g @ g), float("nan")

    def loss(z: Tensor, x: Tensor, batch: Sequence[Tensor]) -> Tensor:
        A, G, C, a, c = (t.mean(0) for t in batch)
        return (A @ z) @ z / 2 + (G @ x) @ x / 2 + x @ (C @ z) + a @ z + c @ x

    def in_jax() -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        def of(side: list[np.ndarray]) -> Any:
            arrays = [jnp.asarray(t, jnp.float32) for t in side]

            def f(z: Any, x: Any, start: Any = 0, batch_size: int = BATCH) -> Any:
                sizes = [(batch_size // BATCH, *t.shape[1:]) for t in arrays]
                A, G, C, a, c = (
                    jax.lax.dynamic_slice(t, (start // BATCH, *[0] * (t.ndim - 1)), s).mean(0)
                    for t, s in zip(arrays, sizes, strict=True)
                )
                return (A @ z) @ z / 2 + (G @ x) @ x / 2 + x @ (C @ z) + a @ z + c @ x

            return jax.jit(f, static_argnames="batch_size")

        return of(lower), of(upper)

    return Task(
        name=f"quadratic, condition {1 / smallest:.0f}",
        z0=np.zeros(d, np.float32),
        x0=-2.0 * np.ones(p, np.float32),
        lower=loss,
        upper=loss,
        lower_data=tuple(torch.tensor(t, dtype=torch.float32) for t in lower),
        upper_data=tuple(torch.tensor(t, dtype=torch.float32) for t in upper),
        rows=1,
        jax_losses=in_jax,
        value=value,
        unit="‖∇h‖²",
    )


# ------------------------------ digits


def digits(train: int, validation: int) -> list[np.ndarray]:
    """Standardised features and labels of scikit-learn's digits: train, validation, test."""
    X, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(X))
    X, y = X[order][:, X.std(0) > 0], y[order]
    mean, deviation = X[:train].mean(0), X[:train].std(0)
    X = (X - mean) / np.where(deviation > 0, deviation, 1.0)
    cuts = [train, train + validation]
    return [*np.split(X, cuts), *np.split(y, cuts)]


def solved(objective: Callable[[Tensor], Tensor], size: int, start: np.ndarray) -> np.ndarray:
    """The minimiser of a smooth loss, in double precision."""

    def both(z: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(z, requires_grad=True)
        loss = objective(at)
        loss.backward()
        return float(loss.detach()), at.grad.numpy()

    start = start if np.isfinite(start).all() else np.zeros(size)
    found = minimize(both, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return np.asarray(found.x)


def cleaning(corrupted: float, *, train: int = 1280, validation: int = 256) -> Task:
    """Labels are wrong with this probability; x are the weights of the training samples."""
    Xt, Xv, Xs, yt, yv, ys = digits(train, validation)
    rng = np.random.RandomState(32)
    wrong = rng.rand(train) < corrupted
    yt = np.where(wrong, rng.randint(0, 10, train), yt)
    features, decay = Xt.shape[1], 0.01
    size = features * 10

    def lower(z: Tensor, x: Tensor, batch: Sequence[Tensor]) -> Tensor:
        X, y, rows = batch
        each = cross_entropy(X @ z.view(features, 10), y, reduction="none")
        return (torch.sigmoid(x[rows]) * each).mean() + decay * (z * z).sum()

    def upper(z: Tensor, x: Tensor, batch: Sequence[Tensor]) -> Tensor:
        X, y = batch
        return cross_entropy(X @ z.view(features, 10), y) + 0.0 * x.sum()

    rows = torch.arange(train)
    double = (torch.tensor(Xt), torch.tensor(yt), rows)

    def value(x: np.ndarray) -> tuple[float, float]:
        weights = torch.tensor(x, dtype=torch.float64)
        z = solved(lambda z: lower(z, weights, double), size, np.zeros(size))
        at = torch.tensor(z)
        h = upper(at, weights, (torch.tensor(Xv), torch.tensor(yv)))
        error = (Xs @ z.reshape(features, 10)).argmax(1) != ys
        return float(h), float(error.mean())

    def in_jax() -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        jXt, jXv = jnp.asarray(Xt, jnp.float32), jnp.asarray(Xv, jnp.float32)
        jyt, jyv = jax.nn.one_hot(yt, 10), jax.nn.one_hot(yv, 10)

        def each(z: Any, X: Any, y: Any, start: Any, count: int) -> Any:
            X = jax.lax.dynamic_slice(X, (start, 0), (count, features))
            y = jax.lax.dynamic_slice(y, (start, 0), (count, 10))
            return -(y * jax.nn.log_softmax(X @ z.reshape(features, 10))).sum(1)

        def f_in(z: Any, x: Any, start: Any = 0, batch_size: int = BATCH) -> Any:
            weights = jax.nn.sigmoid(jax.lax.dynamic_slice(x, (start,), (batch_size,)))
            return (weights * each(z, jXt, jyt, start, batch_size)).mean() + decay * (z * z).sum()

        def f_out(z: Any, x: Any, start: Any = 0, batch_size: int = BATCH) -> Any:
            return each(z, jXv, jyv, start, batch_size).mean()

        jitted = [jax.jit(f, static_argnames="batch_size") for f in (f_in, f_out)]
        return jitted[0], jitted[1]

    return Task(
        name=f"cleaning, {corrupted:.0%} corrupted",
        z0=np.zeros(size, np.float32),
        x0=np.zeros(train, np.float32),
        lower=lower,
        upper=upper,
        lower_data=(torch.tensor(Xt, dtype=torch.float32), torch.tensor(yt), rows),
        upper_data=(torch.tensor(Xv, dtype=torch.float32), torch.tensor(yv)),
        rows=BATCH,
        jax_losses=in_jax,
        value=value,
        unit="h, test error",
    )


def regularisation(*, train: int = 960, validation: int = 768) -> Task:
    """Odd digits against even ones; x are the logarithms of one regulariser per feature."""
    Xt, Xv, _, yt, yv, _ = digits(train, validation)
    yt, yv = (np.where(y % 2, 1.0, -1.0) for y in (yt, yv))
    features = Xt.shape[1]

    def lower(z: Tensor, x: Tensor, batch: Sequence[Tensor]) -> Tensor:
        X, y = batch
        return -logsigmoid(y * (X @ z)).mean() + (x.exp() * z) @ z / 2

    def upper(z: Tensor, x: Tensor, batch: Sequence[Tensor]) -> Tensor:
        X, y = batch
        return -logsigmoid(y * (X @ z)).mean() + 0.0 * x.sum()

    double = [(torch.tensor(X), torch.tensor(y)) for X, y in ((Xt, yt), (Xv, yv))]

    def value(x: np.ndarray) -> tuple[float, float]:
        at = torch.tensor(x, dtype=torch.float64)
        z = solved(lambda z: lower(z, at, double[0]), features, np.zeros(features))
        h = upper(torch.tensor(z), at, double[1])
        return float(h), float("nan")

    def in_jax() -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        jXt, jyt, jXv, jyv = (jnp.asarray(t, jnp.float32) for t in (Xt, yt, Xv, yv))

        def logistic(z: Any, X: Any, y: Any, start: Any, count: int) -> Any:
            X = jax.lax.dynamic_slice(X, (start, 0), (count, features))
            y = jax.lax.dynamic_slice(y, (start,), (count,))
            return -jax.nn.log_sigmoid(y * (X @ z)).mean()

        def f_in(z: Any, x: Any, start: Any = 0, batch_size: int = BATCH) -> Any:
            return logistic(z, jXt, jyt, start, batch_size) + (jnp.exp(x) * z) @ z / 2

        def f_out(z: Any, x: Any, start: Any = 0, batch_size: int = BATCH) -> Any:
            return logistic(z, jXv, jyv, start, batch_size)

        jitted = [jax.jit(f, static_argnames="batch_size") for f in (f_in, f_out)]
        return jitted[0], jitted[1]

    start = np.random.RandomState(1)
    single = [tuple(t.float() for t in side) for side in double]
    return Task(
        name="regularisation",
        z0=start.standard_normal(features).astype(np.float32),
        x0=np.log(start.rand(features)).astype(np.float32),
        lower=lower,
        upper=upper,
        lower_data=single[0],
        upper_data=single[1],
        rows=BATCH,
        jax_losses=in_jax,
        value=value,
        unit="h",
    )


TASKS: dict[str, Callable[[], Task]] = {
    "quadratic10": lambda: quadratic(0.1),
    "quadratic100": lambda: quadratic(0.01),
    "cleaning50": lambda: cleaning(0.5),
    "cleaning90": lambda: cleaning(0.9),
    "regularisation": regularisation,
}
