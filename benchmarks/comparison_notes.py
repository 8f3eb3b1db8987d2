"""Measures figures in the notes of docs/comparison.md, with the other libraries that are installed.

    python benchmarks/comparison_notes.py

Each line names the note and the version of the library. A library that is not installed is named.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from measuring import installed
from torch import Tensor, nn

import mlo
from mlo.testing import bilevel_quadratic, relative_error


def betty_program(
    losses: Mapping[str, Callable[..., Tensor]],
    modules: Mapping[str, nn.Module],
    configs: Mapping[str, Mapping[str, Any]],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> Callable[[], Tensor]:
    """A program of Betty's own classes; problems are listed from the innermost to the outermost.

    Args:
        losses: problem → loss of its module, of the batch, and of the modules that its further
            parameters name.
        modules: problem → module.
        configs: problem → settings of Betty's `Config`.
        optimizers: problem → optimizer.

    Returns:
        what makes a step of the innermost problem and what follows it, and returns the gradient of
        the outermost one.
    """
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    def training_step(self: Any, batch: Any) -> Tensor:
        reads = list(signature(losses[self.name]).parameters)[2:]
        return losses[self.name](self.module, batch, *(getattr(self, r).module for r in reads))

    names, problems = list(losses), {}
    for name in names:
        kind = type(name, (ImplicitProblem,), {"training_step": training_step})
        problems[name] = kind(
            name=name,
            config=Config(**configs.get(name, {}), retain_graph=True),
            module=modules[name],
            optimizer=optimizers[name],
            train_data_loader=[()],
        )
    edges: dict[str, dict[Any, list[Any]]] = {"u2l": {}, "l2u": {}}
    for reader in names:
        for read in list(signature(losses[reader]).parameters)[2:]:
            direction = "u2l" if names.index(read) > names.index(reader) else "l2u"
            edges[direction].setdefault(problems[read], []).append(problems[reader])
    with redirect_stdout(io.StringIO()):
        engine = Engine(
            problems=list(problems.values()),
            config=EngineConfig(strategy="cpu"),
            dependencies=edges,
        )
    engine.train()
    found: list[Tensor] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        found.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))

    problems[names[-1]].optimizer.register_step_pre_hook(note)

    def step() -> Tensor:
        engine.global_step += 1
        engine.train_step()
        return found[-1]

    return step


def vector(value: Tensor) -> nn.ParameterDict:
    """A module with one parameter, v."""
    return nn.ParameterDict({"v": nn.Parameter(value.clone())})


def normal(seed: int) -> Callable[..., Tensor]:
    """Draws normal numbers of a shape, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def sgd(module: nn.Module, lr: float) -> torch.optim.SGD:
    """Plain SGD."""
    return torch.optim.SGD(module.parameters(), lr=lr)


def betty_levels() -> Iterator[str]:
    """Note 1: the middle problem's gradient contains the response of the lowest one.

    The lowest one has the Hessian I, so a step of size one solves it, and the identity in place of
    the inverse Hessian, which is Betty's `darts`, is exact there. It stands for the middle one's
    inverse Hessian in the reference too.
    """
    draw = normal(0)
    b, c, target, z, x = draw(4, 4), draw(4, 4), draw(4), draw(4), draw(4)
    losses = {
        "w": lambda w, _, z, x: 0.5 * w["v"] @ w["v"] - w["v"] @ (b @ (z["v"] * x["v"])),
        "z": lambda z, _, w: 0.5 * z["v"] @ z["v"] + 0.3 * w["v"] @ (c @ z["v"]),
        "x": lambda x, _, z: 0.5 * (z["v"] - target).square().sum(),
    }
    inner, outer = (value.clone().requires_grad_() for value in (z, x))
    middle = 0.5 * inner @ inner + 0.3 * (b @ (inner * outer)) @ (c @ inner)
    (gradient,) = torch.autograd.grad(middle, inner, create_graph=True)
    (exact,) = torch.autograd.grad(-(gradient @ (z - target)), outer)
    for method in ("darts", "neumann", "cg"):
        modules = {"w": vector(b @ (z * x)), "z": vector(z), "x": vector(x)}
        optimizers = {name: sgd(module, 0.0) for name, module in modules.items()}
        configs = {name: {"type": method} for name in modules}
        step = betty_program(losses, modules, configs, optimizers)
        try:
            said = f"error {relative_error(step(), exact):.2f}"
        except AssertionError as error:
            said = f"refused ({error})"
        yield f"note 1: three levels, {method}: {said}"


def betty_frozen() -> Iterator[str]:
    """Note 4: a problem with a frozen parameter."""
    losses = {
        "w": lambda w, _, x: ((w["v"] + w["frozen"] - x["v"]) ** 2).sum(),
        "x": lambda x, _, w: (w["v"] ** 2).sum(),
    }
    lower = vector(torch.ones(3))
    lower["frozen"] = nn.Parameter(torch.ones(3), requires_grad=False)
    modules = {"w": lower, "x": vector(torch.ones(3))}
    optimizers = {"w": torch.optim.SGD([lower["v"]], lr=0.1), "x": sgd(modules["x"], 0.0)}
    step = betty_program(losses, modules, {"x": {"type": "darts"}}, optimizers)
    try:
        said = f"gradient {step().tolist()}"
    except (RuntimeError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
    yield f"note 4: a frozen parameter: {said}"


def betty_rate() -> Iterator[str]:
    """Note 5: `darts` beside the gradient through the lower problem's one step of SGD."""
    draw = normal(1)
    a, target, start, x, rate = draw(5, 5), draw(5), draw(5), draw(5), 0.1

    def lower_loss(w: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (a @ w).square().sum() - w @ x.tanh()

    losses = {
        "w": lambda w, _, x: lower_loss(w["v"], x["v"]),
        "x": lambda x, _, w: 0.5 * (w["v"] - target).square().sum(),
    }
    modules = {"w": vector(start), "x": vector(x)}
    optimizers = {"w": sgd(modules["w"], rate), "x": sgd(modules["x"], 0.0)}
    configs = {name: {"type": "darts"} for name in modules}
    found = betty_program(losses, modules, configs, optimizers)()

    before, upper = (value.clone().requires_grad_() for value in (start, x))
    (gradient,) = torch.autograd.grad(lower_loss(before, upper), before, create_graph=True)
    after = before - rate * gradient
    (right,) = torch.autograd.grad(0.5 * (after - target).square().sum(), upper)
    times = float(found.norm() / right.norm())
    cosine = float(found @ right / found.norm() / right.norm())
    yield (
        f"note 5: darts at a rate of {rate}: {times:.3g} times as long as the gradient through the "
        f"step, cosine {cosine:.4f}"
    )


def betty_dropout() -> Iterator[str]:
    """Note 9: the two sides of a finite difference draw different dropout masks."""
    draw = normal(2)
    features, target, start, x = draw(32, 8), draw(8), draw(8), draw(8)

    def loss(dropped: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return ((dropped @ w - features @ x.tanh()) ** 2).mean()

    def with_dropout(share: float) -> Callable[..., Tensor]:
        drop = nn.Dropout(share)
        return lambda w, _, x: loss(drop(features), w["v"], x["v"])

    for share in (0.0, 0.1):
        losses = {
            "w": with_dropout(share),
            "x": lambda x, _, w: 0.5 * (w["v"] - target).square().sum(),
        }
        modules = {"w": vector(start), "x": vector(x)}
        optimizers = {name: sgd(module, 0.0) for name, module in modules.items()}
        configs = {name: {"type": "darts"} for name in modules}
        torch.manual_seed(0)
        found = betty_program(losses, modules, configs, optimizers)()

        # The loss is linear in the mask but for a term without x, so its mean mask is exact.
        lower, upper = (value.clone().requires_grad_() for value in (start, x))
        (gradient,) = torch.autograd.grad(loss(features, lower, upper), lower, create_graph=True)
        (exact,) = torch.autograd.grad(-(gradient @ (start - target)), upper)
        yield f"note 9: darts, dropout of {share}: error {relative_error(found, exact):.2g}"


def betty() -> Iterator[str]:
    """Notes 1, 4, 5, 9 and 11."""
    warnings.simplefilter("ignore")  # of Betty's, on functions that PyTorch renames
    for note in (betty_levels, betty_frozen, betty_rate, betty_dropout):
        yield from note()
    errors = []
    for iterations in (1, 2, 3, 5, 10, 20):
        problem = bilevel_quadratic()
        engine = {"name": "betty-cg", "iterations": iterations}
        found = problem.optimizer(engine).gradient("x")["v"]
        errors.append(f"{relative_error(found, problem.exact):.2f}")
    yield f"note 11: cg after 1, 2, 3, 5, 10, 20 iterations: errors {', '.join(errors)}"


def torchopt() -> Iterator[str]:
    """Notes 2, 13 and 15: TorchOpt's linear solvers and its estimator."""
    import torchopt as library

    def root(solve: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """θ with θ³ + θ = x, by Newton's method, which the library differentiates."""

        @library.diff.implicit.custom_root(
            lambda theta, x: theta**3 + theta - x, argnums=1, solve=solve
        )
        def solved(theta: Tensor, x: Tensor) -> Tensor:
            for _ in range(50):
                theta = theta - (theta**3 + theta - x) / (3 * theta**2 + 1)
            return theta.detach()

        return solved

    start, at = torch.full((1,), 0.5, dtype=torch.float64), 2.0
    theta = torch.tensor(1.0, dtype=torch.float64)  # 1³ + 1 = 2
    second = float(-6 * theta / (3 * theta**2 + 1) ** 3)
    solves = library.linear_solve
    for name, solve in {
        "solve_cg": solves.solve_cg(),
        "solve_normal_cg": solves.solve_normal_cg(),
        "solve_inv(ns=False)": solves.solve_inv(ns=False),
    }.items():
        x = torch.full((1,), at, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(root(solve)(start, x).sum(), x, create_graph=True)
        found = 0.0
        if first.requires_grad:
            (again,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
            found = 0.0 if again is None else float(again)
        yield f"note 2: {name}: second derivative {found:.4f}; the right one is {second:.4f}"
    for name, solve in {"solve_cg": solves.solve_cg(), "solve_inv": solves.solve_inv()}.items():
        x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        try:
            (first,) = torch.autograd.grad(root(solve)(start[0], x), x)
            said = f"gradient {float(first):.4f}"
        except (RuntimeError, ValueError, IndexError) as error:
            said = f"{type(error).__name__}"
        yield f"note 13: {name}, without dimensions: {said}; the right one is 0.2500"
    for method in ("forward", "naive", "antithetic"):
        torch.manual_seed(0)
        value = torch.randn(20, dtype=torch.float64, requires_grad=True)
        matrix = torch.randn(20, 20, dtype=torch.float64)
        normal = torch.distributions.Normal(torch.zeros(20).double(), torch.ones(20).double())
        loss = library.diff.zero_order(
            normal.sample, argnums=0, method=method, num_samples=1000, sigma=0.01
        )(lambda v, m=matrix: ((m @ v) ** 2).sum() / 2)
        (found,) = torch.autograd.grad(loss(value), value)
        right = matrix.T @ matrix @ value.detach()
        cosine = float(found @ right / (found.norm() * right.norm()))
        yield f'note 15: zero_order(method="{method}"), 1,000 samples: cosine {cosine:.2f}'


LIBRARIES: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "betty-ml": ("betty", betty),
    "torchopt": ("torchopt", torchopt),
}
"""Package → the module that it installs, and what measures its notes."""


def main() -> None:
    """Prints a line per figure."""
    print(f"{time.strftime('%Y-%m-%d')}, {installed('torch')}, mlo {mlo.__version__}")
    for package, (module, notes) in LIBRARIES.items():
        print(installed(package))
        if find_spec(module) is not None:
            for note in notes():
                print(f"  {note}")


if __name__ == "__main__":
    main()
