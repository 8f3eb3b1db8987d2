"""Solutions of any solver, differentiated: `mlo.implicit_solution` beside JAXopt and TorchOpt.

The same solutions, conditions and upper losses go to `mlo.implicit_solution`, to `custom_root` and
`custom_fixed_point` of JAXopt, and to `custom_root` of TorchOpt. `engines.py --problem solutions`
runs this: a process for each row. The solver is a function that returns the given solution, so what
is timed is the decorated call, the upper loss and its backward pass.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from measuring import Ratio, Worker, answers, asked_in_turns

__all__ = ["SOLUTION_LEGEND", "serve_row", "solution_rows", "solution_table"]

Arrays = dict[str, np.ndarray]
TOL, STEPS = 1e-10, 400

METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "ridge": {
        "mlo": ("cg", "gmres", "direct"),
        "JAXopt": ("solve_cg", "solve_normal_cg", "solve_cg, jit"),
        "TorchOpt": ("solve_cg", "solve_normal_cg"),
    },
    "deep equilibrium": {
        "mlo": ("gmres", "neumann"),
        "JAXopt": ("solve_gmres", "solve_normal_cg", "solve_normal_cg, jit"),
        "TorchOpt": ("solve_normal_cg",),
    },
    "lasso": {
        "mlo": ("gmres", "direct"),
        "JAXopt": ("solve_gmres", "solve_normal_cg", "solve_normal_cg, jit"),
        "TorchOpt": ("solve_normal_cg",),
    },
}
"""Problem → library → linear solvers. JAXopt's and TorchOpt's default is `solve_normal_cg`."""

SOLUTION_LEGEND = f"""
The solution is given, to rounding. *error*: ‖found − exact‖ / ‖exact‖ of the gradients in all that
the solution depends on, in float64, against closed forms (ridge, lasso) or autograd through 500
iterations (deep equilibrium). Iterative solvers: tolerance {TOL:g} (relative), at most {STEPS}
steps (`neumann`: as many terms, α = 1). *ms*: median processor time in float32 of one decorated
call with the backward pass, at a tolerance of 1e-5; *mlo ÷ it*: ratio of the time of the problem's
first row to it, with quartiles over the turns; *jit*: the whole of it compiled, without the time to
compile. mlo's calls contain its checks (the residual of the solution, tensors that are read but not
declared), the others have none.
"""

MODULES = {"mlo": "mlo", "JAXopt": "jaxopt", "TorchOpt": "torchopt"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, in any array library.

    Attributes:
        solution: θ*.
        reads: what it depends on, all of it differentiable.
        constants: what is given beside it.
        residual: (θ, reads, constants, numpy of the library) → F.
        exact: reads → θ*, by plain autograd of torch.
        is_fixed_point: whether F is θ − T.
    """

    solution: np.ndarray
    reads: Arrays
    constants: Arrays
    residual: Callable[[Any, dict[str, Any], dict[str, Any], ModuleType], Any]
    exact: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], torch.Tensor]
    is_fixed_point: bool


# ------------------------------ the problems


def _ridge(*, quick: bool) -> Case:
    """One strength per feature, and the targets."""
    examples, features = (40, 10) if quick else (1000, 200)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(examples, features))
    reads = {"decay": np.exp(generator.normal(size=features)), "y": generator.normal(size=examples)}

    def residual(w: Any, reads: dict[str, Any], constants: dict[str, Any], xp: ModuleType) -> Any:
        x = constants["x"]
        return x.T @ (x @ w - reads["y"]) + reads["decay"] * w

    def exact(reads: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]) -> torch.Tensor:
        x = constants["x"]
        return torch.linalg.solve(x.T @ x + reads["decay"].diag(), x.T @ reads["y"])

    return _case(reads, {"x": x}, residual, exact, is_fixed_point=False)


def _deep_equilibrium(*, quick: bool) -> Case:
    """The z of z = tanh(z W + x U + b), for a batch of inputs."""
    batch, width = (4, 6) if quick else (32, 64)
    generator = np.random.default_rng(0)
    w = generator.normal(size=(width, width))
    reads = {
        "w": 0.9 * w / np.linalg.norm(w, 2),
        "u": generator.normal(size=(width, width)) / width**0.5,
        "b": generator.normal(size=width),
        "x": generator.normal(size=(batch, width)),
    }

    def residual(z: Any, reads: dict[str, Any], constants: dict[str, Any], xp: ModuleType) -> Any:
        return xp.tanh(z @ reads["w"] + reads["x"] @ reads["u"] + reads["b"])

    def exact(reads: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]) -> torch.Tensor:
        z = torch.zeros_like(reads["x"])
        for _ in range(500):
            z = residual(z, reads, constants, torch)
        return z

    return _case(reads, {}, residual, exact, is_fixed_point=True)


def _lasso(*, quick: bool) -> Case:
    """The fixed point of the proximal step, of the strength and the targets."""
    examples, features = (40, 10) if quick else (400, 100)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(examples, features))
    sparse = np.where(np.arange(features) < features // 10 + 2, 3.0, 0.0)
    y = x @ sparse + generator.normal(size=examples)
    decay = np.asarray(0.2)
    eta = examples / np.linalg.norm(x, 2) ** 2
    w = np.zeros(features)
    for _ in range(20_000):
        moved = w - eta * x.T @ (x @ w - y) / examples
        w = np.sign(moved) * np.maximum(np.abs(moved) - eta * decay, 0.0)

    def residual(w: Any, reads: dict[str, Any], constants: dict[str, Any], xp: ModuleType) -> Any:
        x = constants["x"]
        moved = w - eta * (x.T @ (x @ w - reads["y"])) / examples
        threshold = eta * reads["decay"]
        return xp.where(
            xp.abs(moved) > threshold, moved - xp.sign(moved) * threshold, xp.zeros_like(moved)
        )

    active, signs = torch.from_numpy(w != 0), torch.from_numpy(np.sign(w))

    def exact(reads: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]) -> torch.Tensor:
        # X_Sᵀ (X_S w − y) / n + λ s = 0 on the active set S, which does not change nearby.
        part = constants["x"][:, active]
        right = part.T @ reads["y"] - examples * reads["decay"] * signs[active]
        values = torch.linalg.solve(part.T @ part, right)
        return torch.zeros(features, dtype=values.dtype).index_put((active,), values)

    return _case({"decay": decay, "y": y}, {"x": x}, residual, exact, is_fixed_point=True)


def _case(
    reads: Arrays,
    constants: Arrays,
    residual: Callable[..., Any],
    exact: Callable[..., torch.Tensor],
    *,
    is_fixed_point: bool,
) -> Case:
    solution = exact(_torch(reads, torch.float64), _torch(constants, torch.float64)).numpy()
    return Case(
        solution=solution,
        reads=reads,
        constants=constants,
        residual=residual,
        exact=exact,
        is_fixed_point=is_fixed_point,
    )


CASES: dict[str, Callable[..., Case]] = {
    "ridge": _ridge,
    "deep equilibrium": _deep_equilibrium,
    "lasso": _lasso,
}


# ------------------------------ the libraries

Gradients = Callable[[], dict[str, Any]]


def _torch(arrays: Arrays, dtype: torch.dtype, *, grad: bool = False) -> dict[str, torch.Tensor]:
    found = {}
    for name, array in arrays.items():
        found[name] = torch.tensor(array, dtype=dtype, requires_grad=grad)
    return found


def _upper(solution: Any) -> Any:
    return (solution**3).sum()


def _mlo(case: Case, method: str, dtype: torch.dtype) -> Gradients:
    import mlo

    tolerance = TOL if dtype == torch.float64 else 1e-5
    options: dict[str, dict[str, Any]] = {
        "cg": {"max_steps": STEPS, "tol": tolerance},
        "gmres": {"max_steps": STEPS, "tol": tolerance},
        "neumann": {"num_terms": STEPS if dtype == torch.float64 else 60, "step_size": 1.0},
    }
    reads, constants = _torch(case.reads, dtype, grad=True), _torch(case.constants, dtype)
    theta = torch.tensor(case.solution, dtype=dtype)

    def function(theta: torch.Tensor, reads: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = case.residual(theta, reads, constants, torch)
        return found

    condition = {"fixed_point" if case.is_fixed_point else "stationarity": function}

    def gradients() -> dict[str, Any]:
        engine = {"name": method, **options.get(method, {})}
        solution = mlo.implicit_solution(theta, reads, **condition, engine=engine)  # type: ignore[arg-type]
        found = torch.autograd.grad(_upper(solution), list(reads.values()))
        return dict(zip(reads, found, strict=True))

    return gradients


def _torchopt(case: Case, method: str, dtype: torch.dtype) -> Gradients:
    import torchopt

    reads, constants = _torch(case.reads, dtype, grad=True), _torch(case.constants, dtype)
    theta = torch.tensor(case.solution, dtype=dtype)
    names = list(reads)
    tolerance = TOL if dtype == torch.float64 else 1e-5
    solve = getattr(torchopt.linear_solve, method)(maxiter=STEPS, rtol=tolerance, atol=0.0)

    def optimality(theta: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = case.residual(
            theta, dict(zip(names, flat, strict=True)), constants, torch
        )
        return theta - found if case.is_fixed_point else found

    @torchopt.diff.implicit.custom_root(
        optimality, argnums=tuple(range(1, len(names) + 1)), solve=solve
    )
    def solver(theta: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        return theta

    def gradients() -> dict[str, Any]:
        solution = solver(theta, *reads.values())
        found = torch.autograd.grad(_upper(solution), list(reads.values()))
        return dict(zip(reads, found, strict=True))

    return gradients


def _jaxopt(case: Case, method: str, dtype: torch.dtype) -> Gradients:
    import jax
    import jaxopt
    from jax import numpy as jnp

    precision = jnp.float64 if dtype == torch.float64 else jnp.float32
    jax.config.update("jax_enable_x64", precision == jnp.float64)  # type: ignore[no-untyped-call]
    name, _, compiled = method.partition(", ")
    tolerance = TOL if dtype == torch.float64 else 1e-5
    reads = {key: jnp.asarray(array, precision) for key, array in case.reads.items()}
    constants = {key: jnp.asarray(array, precision) for key, array in case.constants.items()}
    theta = jnp.asarray(case.solution, precision)
    solver_of = getattr(jaxopt.linear_solve, name)

    def solve(matvec: Any, b: Any) -> Any:
        return solver_of(matvec, b, tol=tolerance, maxiter=STEPS)

    def function(theta: Any, reads: Any) -> Any:
        return case.residual(theta, reads, constants, jnp)

    kind = "custom_fixed_point" if case.is_fixed_point else "custom_root"
    decorate = getattr(jaxopt.implicit_diff, kind)(function, solve=solve)
    solver = decorate(lambda start, reads: theta)

    def upper(reads: Any) -> Any:
        return _upper(solver(theta, reads))

    gradient = jax.grad(upper)
    if compiled:
        gradient = jax.jit(gradient)

    def gradients() -> dict[str, Any]:
        found: dict[str, Any] = jax.block_until_ready(gradient(reads))
        return found

    return gradients


LIBRARIES: dict[str, Callable[[Case, str, torch.dtype], Gradients]] = {
    "mlo": _mlo,
    "JAXopt": _jaxopt,
    "TorchOpt": _torchopt,
}


# ------------------------------ measuring


def serve_row(problem: str, library: str, method: str, *, quick: bool) -> None:
    """Answers `start` by the error of one row, and `time` by its seconds per call."""
    case = CASES[problem](quick=quick)
    warnings.simplefilter("ignore")
    gradients: Gradients | None = None

    def start() -> dict[str, Any]:
        nonlocal gradients
        error = _error(case, LIBRARIES[library](case, method, torch.float64)())
        gradients = LIBRARIES[library](case, method, torch.float32)
        gradients()  # what is loaded or compiled at the first call
        return {"error": error}

    def timed() -> dict[str, Any]:
        assert gradients is not None
        began, count = time.process_time(), 0
        while time.process_time() - began < (0.02 if quick else 0.3):
            gradients()
            count += 1
        return {"seconds": (time.process_time() - began) / count}

    answers({"start": start, "time": timed})


def _error(case: Case, found: dict[str, Any]) -> float:
    """‖found − exact‖ / ‖exact‖ over all that the solution depends on."""
    reads = _torch(case.reads, torch.float64, grad=True)
    exact = case.exact(reads, _torch(case.constants, torch.float64))
    expected = torch.autograd.grad(_upper(exact), list(reads.values()))
    off, size = 0.0, 0.0
    for name, gradient in zip(reads, expected, strict=True):
        ours = torch.tensor(np.asarray(found[name]), dtype=torch.float64)
        off += float((ours - gradient).square().sum())
        size += float(gradient.square().sum())
    return float((off / size) ** 0.5)


LIMIT = 300.0
"""Seconds in which a process must answer."""


def solution_rows(script: str, *, quick: bool, repeats: int) -> list[dict[str, str]]:
    """The rows of all problems; one process per row runs `script`'s hidden command `solution`."""
    return [
        row
        for problem in METHODS
        for row in _rows_of(problem, script, quick=quick, repeats=repeats)
    ]


def _rows_of(problem: str, script: str, *, quick: bool, repeats: int) -> list[dict[str, str]]:
    """The rows of one problem: all are set up, then timed in turns."""
    workers: dict[str, Worker] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    rows = [(library, method) for library, of in METHODS[problem].items() for method in of]
    try:
        for library, method in rows:
            name = f"{library}, {method}"
            if find_spec(MODULES[library]) is None:
                failed[name] = "not installed"
                continue
            flags = ["--quick"] if quick else []
            worker = Worker([script, "solution", problem, library, method, *flags])
            answer = worker.ask("start", LIMIT)
            if "failed" in answer:
                failed[name] = answer["failed"]
                worker.close()
            else:
                workers[name], errors[name] = worker, answer["error"]
        times, late = asked_in_turns(workers, repeats, LIMIT)
    finally:
        for worker in workers.values():
            worker.close()
    failed |= late
    ours = times.get(f"{rows[0][0]}, {rows[0][1]}")
    return [
        {
            "problem": problem,
            "library": library,
            "method": method,
            **_cells(f"{library}, {method}", times, errors, ours),
            "failed": failed.get(f"{library}, {method}", ""),
        }
        for library, method in rows
    ]


def _cells(
    name: str,
    times: dict[str, list[float]],
    errors: dict[str, float],
    ours: list[float] | None,
) -> dict[str, str]:
    """Error, time and the ratio of mlo's first row to it; empty where it has none."""
    if name not in times:
        return dict.fromkeys(("error", "ms", "ratio", "ratio_low", "ratio_high"), "")
    found = {"error": f"{errors[name]:.1e}", "ms": f"{1e3 * statistics.median(times[name]):.3g}"}
    if ours is None:
        return found | dict.fromkeys(("ratio", "ratio_low", "ratio_high"), "")
    return found | Ratio.of(ours, times[name]).cells()


def solution_table(rows: list[dict[str, str]]) -> Iterator[str]:
    """The lines of the table."""
    yield "| problem | library | solver | error | ms | mlo ÷ it |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        ratio = f"{row['ratio']} ({row['ratio_low']}–{row['ratio_high']})" if row["ratio"] else ""
        error = row["failed"] or row["error"]
        cells = (row["problem"], row["library"], row["method"], error, row["ms"], ratio)
        yield f"| {' | '.join(cells)} |"
