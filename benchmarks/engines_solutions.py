"""Solutions of any solver, differentiated: `mlo.implicit_solution` beside JAXopt and TorchOpt.

The same solutions, conditions and upper losses go to `mlo.implicit_solution`, to `custom_root` and
`custom_fixed_point` of JAXopt, and to `custom_root` of TorchOpt. `engines.py --problem solutions`
runs this: a process for each row. The solver is a function that returns the given solution, so what
is timed is the decorated call, the upper loss and its backward pass.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["SOLUTION_LEGEND", "measure_row", "solution_tables"]

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
steps (`neumann`: as many terms, α = 1). *ms*: median time in float32, on one thread, of one
decorated call with the backward pass, at a tolerance of 1e-5; *range*: least and largest; *÷ mlo*:
ratio to the first row of the problem; *jit*: the whole of it compiled, without the time to compile.
mlo's calls contain its checks (the residual of the solution, tensors that are read but not
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


def measure_row(problem: str, library: str, method: str, *, quick: bool, repeats: int) -> None:
    """Prints error and times of one row as JSON; what it raises is a result too."""
    case = CASES[problem](quick=quick)
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        answer: dict[str, Any] = _measured(case, library, method, quick=quick, repeats=repeats)
    except Exception as error:  # noqa: BLE001 - whatever it raises is a result
        answer = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"}
    print(json.dumps(answer), file=answers, flush=True)


def _measured(
    case: Case, library: str, method: str, *, quick: bool, repeats: int
) -> dict[str, Any]:
    reads = _torch(case.reads, torch.float64, grad=True)
    exact = case.exact(reads, _torch(case.constants, torch.float64))
    expected = torch.autograd.grad(_upper(exact), list(reads.values()))
    found = LIBRARIES[library](case, method, torch.float64)()
    off, size = 0.0, 0.0
    for name, gradient in zip(reads, expected, strict=True):
        ours = torch.tensor(np.asarray(found[name]), dtype=torch.float64)
        off += float((ours - gradient).square().sum())
        size += float(gradient.square().sum())

    gradients = LIBRARIES[library](case, method, torch.float32)
    gradients()  # what is loaded or compiled at the first call
    seconds = []
    for _ in range(repeats):
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < (0.02 if quick else 0.3):
            gradients()
            count += 1
        seconds.append((time.perf_counter() - began) / count)
    return {"error": (off / size) ** 0.5, "seconds": seconds}


def solution_tables(script: str, *, quick: bool, repeats: int) -> Iterator[str]:
    """The lines of the table; one process per row runs `script`'s hidden command `solution`."""
    yield "| problem | library | solver | error | ms | range | ÷ mlo |"
    yield "|---|---|---|---|---|---|---|"
    for problem, libraries in METHODS.items():
        baseline: float | None = None
        for library, methods in libraries.items():
            if find_spec(MODULES[library]) is None:
                yield f"| {problem} | {library} | - | not installed | | | |"
                continue
            for method in methods:
                arguments = ["solution", problem, library, method, str(repeats)]
                command = [sys.executable, script, *arguments, *(["--quick"] if quick else [])]
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                lines = done.stdout.strip().splitlines()
                answer = json.loads(lines[-1]) if lines else {"failed": "the process ended"}
                if "failed" in answer:
                    yield f"| {problem} | {library} | {method} | {answer['failed']} | | | |"
                    continue
                times = [1e3 * second for second in answer["seconds"]]
                median = statistics.median(times)
                baseline = median if baseline is None else baseline
                yield (
                    f"| {problem} | {library} | {method} | {answer['error']:.1e} | {median:.2f} | "
                    f"{min(times):.2f}-{max(times):.2f} | {median / baseline:.2f} |"
                )
