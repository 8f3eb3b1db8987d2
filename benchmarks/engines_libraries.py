"""The same multi-level step in each library of `engines.py`, in that library's own interface.

One step of every program is one SGD step of every lower problem, then the hypergradient of the
outermost problem and one SGD step of it. Libraries are imported where they are used, so a missing
one loses only its own rows.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from engines_problems import Level, Task, Tensors, Values
from torch import Tensor

__all__ = ["LIBRARIES", "RECOMPUTED", "TO_ROUNDING", "Method", "Program", "Refused"]


class Refused(Exception):
    """A library lacks a method."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a library is asked for.

    Attributes:
        name: the method, by mlo's names.
        steps: products with the Hessian of an iterative method.
        step_size: α of a Neumann series.
    """

    name: str
    steps: int
    step_size: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """A task in a library.

    Attributes:
        step: makes one step.
        upper: the outermost problem's optimizer, which is given the hypergradient.
    """

    step: Callable[[], object]
    upper: torch.optim.Optimizer


Maker = Callable[[Task, Method], Program]


def _sgd(module: Values, level: Level) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=level.lr)


# ------------------------------ mlo


RECOMPUTED = "one_step, recomputed"
"""`one_step` without `keep_graph`."""

TO_ROUNDING = "cg, to rounding"
"""`cg` that ends once the relative residual is below the rounding of its dtype."""


def mlo_program(task: Task, method: Method) -> Program:
    """Problems that name what they read, and an engine by name."""
    import mlo

    options: dict[str, dict[str, Any]] = {
        # K products with the Hessian make K + 1 terms of the series.
        "neumann": {"num_terms": method.steps + 1, "step_size": method.step_size},
        # A tolerance of zero: as many products as the other libraries make.
        "cg": {"max_steps": method.steps, "tol": 0.0},
        TO_ROUNDING: {"max_steps": method.steps, "tol": torch.finfo(_dtype(task)).eps},
        "minres": {"max_steps": method.steps, "tol": 0.0},
        "gmres": {"max_steps": method.steps, "restart": method.steps, "tol": 0.0},
        "nystrom": {
            "rank": method.steps // 2,
            "max_steps": method.steps - method.steps // 2,
            "tol": 0.0,
        },
    }
    warnings.simplefilter("ignore", mlo.SolveWarning)
    problems = []
    for level in task.levels:
        module = Values(level.values)
        problems.append(
            mlo.Problem(
                level.name,
                module=module,
                optimizer=_sgd(module, level),
                loss=_named_reads(level),
                data=[level.batch],
            )
        )
    name = "cg" if method.name == TO_ROUNDING else method.name
    engine = {"name": name, **options.get(method.name, {})}
    if method.name == RECOMPUTED:
        engine = {"name": "one_step", "keep_graph": False}
    optimizer = mlo.MultilevelOptimizer(problems, engine)
    return Program(step=optimizer.step, upper=problems[-1].optimizers[problems[-1].name])


def _dtype(task: Task) -> torch.dtype:
    return next(iter(task.upper.values.values())).dtype


def _named_reads(level: Level) -> Callable[..., Tensor]:
    """The loss with the keyword-only arguments by which mlo sees what it reads."""

    def loss(own: Values, batch: tuple[Tensor, ...], **reads: Values) -> Tensor:
        tensors = {name: module.tensors() for name, module in reads.items()}
        return level.loss({**tensors, level.name: own.tensors()}, batch)

    kind = inspect.Parameter
    loss.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [kind("own", kind.POSITIONAL_OR_KEYWORD), kind("batch", kind.POSITIONAL_OR_KEYWORD)]
        + [kind(name, kind.KEYWORD_ONLY) for name in level.reads]
    )
    return loss


# ------------------------------ Betty


def betty_program(task: Task, method: Method) -> Program:
    """One `ImplicitProblem` per level; its `Engine` gets both directions of every edge."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    if method.name not in ("darts", "neumann", "cg"):
        raise Refused("not offered")

    class LevelProblem(ImplicitProblem):
        """One level; `Engine` sets the other problems as attributes of it by their names."""

        level: Level

        def training_step(self, batch: Sequence[Tensor]) -> Tensor:
            """The loss."""
            tensors = {name: getattr(self, name).module.tensors() for name in self.level.reads}
            tensors[self.level.name] = self.module.tensors()
            return self.level.loss(tensors, tuple(batch))

    problems = {}
    for level in task.levels:
        module = Values(level.values)
        config = Config(
            type=method.name,
            neumann_iterations=method.steps,
            neumann_alpha=method.step_size,
            cg_iterations=method.steps,
            # The outermost loss is differentiated once per path.
            retain_graph=level is task.upper,
        )
        problem = LevelProblem(
            name=level.name,
            config=config,
            module=module,
            optimizer=_sgd(module, level),
            train_data_loader=[level.batch],
        )
        problem.level = level
        problems[level.name] = problem

    # Betty is told the edges: which lower problems read the outermost one, and which problems read
    # each lower one.
    def readers(name: str, levels: Sequence[Level]) -> list[ImplicitProblem]:
        return [problems[level.name] for level in levels if name in level.reads]

    upper = problems[task.upper.name]
    up_to_low = {upper: readers(task.upper.name, task.lower)}
    low_to_up = {problems[level.name]: readers(level.name, task.levels) for level in task.lower}
    engine = Engine(
        problems=list(problems.values()),
        config=EngineConfig(strategy="cpu"),
        dependencies={"u2l": up_to_low, "l2u": low_to_up},
    )
    engine.train()

    def step() -> None:  # the body of the loop in Engine.run
        engine.global_step += 1
        engine.train_step()

    return Program(step=step, upper=upper.optimizer)


# ------------------------------ TorchOpt


def torchopt_program(task: Task, method: Method) -> Program:
    """`custom_root` around each lower problem, composed by autograd.

    One step is made by the functional SGD.
    """
    import functorch
    import torchopt

    # It divides by zero once the residual is: the least tolerance that stops before that.
    solvers: dict[str, Callable[[], Any]] = {
        "cg": lambda: torchopt.linear_solve.solve_cg(
            maxiter=method.steps, rtol=torch.finfo(_dtype(task)).eps
        ),
        "neumann": lambda: torchopt.linear_solve.solve_inv(
            ns=True, maxiter=method.steps, alpha=method.step_size
        ),
        "direct": lambda: torchopt.linear_solve.solve_inv(),
    }
    solvers[TO_ROUNDING] = solvers["cg"]
    if method.name != "one_step" and method.name not in solvers:
        raise Refused("not offered")
    modules = {level.name: Values(level.values) for level in task.levels}
    optimizers = {level.name: _sgd(modules[level.name], level) for level in task.levels}

    def named(level: Level, flat: Sequence[Sequence[Tensor]]) -> dict[str, Tensors]:
        """Problem → its tensors, from the tuples of its own and of what it reads."""
        found = {}
        for name, tensors in zip((level.name, *level.reads), flat, strict=True):
            found[name] = dict(zip(modules[name].tensors(), tensors, strict=True))
        return found

    def implicit(level: Level) -> Callable[..., tuple[Tensor, ...]]:
        def loss(*flat: tuple[Tensor, ...]) -> Tensor:
            return level.loss(named(level, flat), level.batch)

        def optimality(own: tuple[Tensor, ...], *reads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return functorch.grad(loss, argnums=0)(own, *reads)

        @torchopt.diff.implicit.custom_root(
            optimality, argnums=tuple(range(1, 1 + len(level.reads))), solve=solvers[method.name]()
        )
        def solve(own: tuple[Tensor, ...], *reads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with torch.enable_grad():  # it runs in the forward pass of an autograd.Function
                loss = level.loss(named(level, (own, *reads)), level.batch)
                gradient = torch.autograd.grad(loss, own)
            return tuple(t.detach() - level.lr * g for t, g in zip(own, gradient, strict=True))

        return solve

    def unrolled(level: Level) -> Callable[..., tuple[Tensor, ...]]:
        sgd = torchopt.sgd(lr=level.lr)

        def solve(own: tuple[Tensor, ...], *reads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            loss = level.loss(named(level, (own, *reads)), level.batch)
            gradient = torch.autograd.grad(loss, own, create_graph=True)
            updates, _ = sgd.update(gradient, sgd.init(own), params=own, inplace=False)
            moved: tuple[Tensor, ...] = torchopt.apply_updates(own, updates, inplace=False)
            return moved

        return solve

    respond = unrolled if method.name == "one_step" else implicit
    responses = {level.name: respond(level) for level in task.lower}

    def step() -> None:
        flat = {task.upper.name: tuple(modules[task.upper.name].parameters())}
        for level in task.lower:
            own = tuple(modules[level.name].parameters())
            flat[level.name] = responses[level.name](own, *(flat[read] for read in level.reads))

        upper = task.upper
        of_upper = [flat[name] for name in (upper.name, *upper.reads)]
        loss = upper.loss(named(upper, of_upper), upper.batch)
        loss.backward(inputs=flat[upper.name])
        optimizers[upper.name].step()
        optimizers[upper.name].zero_grad()
        _keep(modules, flat, task)

    return Program(step=step, upper=optimizers[task.upper.name])


def _keep(modules: Mapping[str, Values], moved: Mapping[str, Sequence[Tensor]], task: Task) -> None:
    """Writes what the lower problems became into their modules."""
    with torch.no_grad():
        for level in task.lower:
            pairs = zip(modules[level.name].parameters(), moved[level.name], strict=True)
            for parameter, tensor in pairs:
                parameter.copy_(tensor)


# ------------------------------ higher


def higher_program(task: Task, method: Method) -> Program:
    """`innerloop_ctx` around each lower problem, one step in each."""
    import higher

    if method.name != "one_step":
        raise Refused("not offered")
    modules = {level.name: Values(level.values) for level in task.levels}
    optimizers = {level.name: _sgd(modules[level.name], level) for level in task.levels}

    def step() -> None:
        upper = task.upper
        with ExitStack() as stack:
            tensors = {upper.name: modules[upper.name].tensors()}
            moved = {}
            for level in task.lower:
                functional, inner = stack.enter_context(
                    higher.innerloop_ctx(modules[level.name], optimizers[level.name])
                )
                names = list(level.values)
                own = dict(zip(names, functional.parameters(), strict=True))
                inner.step(level.loss({**tensors, level.name: own}, level.batch))
                moved[level.name] = list(functional.parameters())
                tensors[level.name] = dict(zip(names, moved[level.name], strict=True))
            upper.loss(tensors, upper.batch).backward(inputs=list(modules[upper.name].parameters()))
            optimizers[upper.name].step()
            optimizers[upper.name].zero_grad()
        _keep(modules, moved, task)

    return Program(step=step, upper=optimizers[task.upper.name])


# ------------------------------ hypergrad


def hypergrad_program(task: Task, method: Method) -> Program:
    """The functions of `hypergrad.approx_hypergrad`, between SGD steps of torch."""
    from hypergrad import approx_hypergrad

    lower, upper = task.levels
    functions: dict[str, tuple[Callable[..., tuple[Tensor, ...]], dict[str, Any]]] = {
        "cg": (approx_hypergrad.conjugate_gradient, {"num_iters": method.steps, "lr": 1.0}),
        "neumann": (approx_hypergrad.neumann, {"num_iters": method.steps, "lr": method.step_size}),
        # rho as in its authors' examples
        "nystrom": (approx_hypergrad.nystrom, {"rank": method.steps, "rho": 0.01}),
    }
    if method.name not in functions:
        raise Refused("not offered")
    function, options = functions[method.name]
    inner, outer = Values(lower.values), Values(upper.values)
    optimizers = _sgd(inner, lower), _sgd(outer, upper)

    def loss_of(level: Level) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
        def loss(below: Sequence[Tensor], above: Sequence[Tensor]) -> Tensor:
            tensors = {
                lower.name: dict(zip(lower.values, below, strict=True)),
                upper.name: dict(zip(upper.values, above, strict=True)),
            }
            return level.loss(tensors, level.batch)

        return loss

    inner_loss, outer_loss = loss_of(lower), loss_of(upper)

    def step() -> None:
        below, above = tuple(inner.parameters()), tuple(outer.parameters())
        inner_loss(below, above).backward(inputs=below)
        optimizers[0].step()
        optimizers[0].zero_grad()
        at_below, at_above = tuple(t.detach() for t in below), tuple(t.detach() for t in above)
        found = function(inner_loss, outer_loss, at_below, at_above, **options)
        for parameter, gradient in zip(above, found, strict=True):
            parameter.grad = gradient.detach()
        optimizers[1].step()
        optimizers[1].zero_grad()

    return Program(step=step, upper=optimizers[1])


# ------------------------------ BOAT


def boat_loss(
    feed: dict[str, Any], upper: Values, lower: Any, params: Sequence[Tensor] | None = None
) -> Tensor:
    """A loss in BOAT's form; it is found by its dotted name, so the level comes with the data."""
    level, names = feed["level"], feed["names"]
    own = dict(zip(feed["below"], lower.parameters() if params is None else params, strict=True))
    found: Tensor = level.loss({names[0]: own, names[1]: upper.tensors()}, level.batch)
    return found


def boat_program(task: Task, method: Method) -> Program:
    """`boat_torch.Problem` with one lower iteration (NGD) and the method's operation."""
    import boat_torch

    lower, upper = task.levels
    operations = {"one_step": "RAD", "darts": "FD", "cg": "CG", "neumann": "NS"}
    if method.name not in operations:
        raise Refused("not offered")
    inner, outer = Values(lower.values), Values(upper.values)
    # Its Neumann series takes the learning rate of the lower optimizer for α.
    lr = method.step_size if method.name == "neumann" else lower.lr
    optimizer, lower_optimizer = _sgd(outer, upper), torch.optim.SGD(inner.parameters(), lr=lr)
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": [operations[method.name]],
        "lower_level_model": inner,
        "upper_level_model": outer,
        "lower_level_var": list(inner.parameters()),
        "upper_level_var": list(outer.parameters()),
        "lower_level_opt": lower_optimizer,
        "upper_level_opt": optimizer,
        "lower_iters": 1,
        "device": "cpu",
        "loss_log_path": os.devnull,
        "accumulate_grad": False,
        "copy_last_param": True,
        "return_grad": False,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.0},
        "RGT": {"truncate_iter": 0},
        "FD": {"r": 0.01},
        "CG": {"tolerance": 0.0, "k": method.steps},
    }
    loss = {"function": f"{__name__}.boat_loss", "params": {}}
    problem = boat_torch.Problem(config, {"lower_level_loss": loss, "upper_level_loss": loss})
    problem.build_ll_solver()
    problem.build_ul_solver()
    shared = {"names": (lower.name, upper.name), "below": tuple(lower.values)}
    feeds = {"level": lower, **shared}, {"level": upper, **shared}
    return Program(step=lambda: problem.run_iter(*feeds, 0), upper=optimizer)


LIBRARIES: dict[str, tuple[str, Maker]] = {
    "mlo": ("mlo", mlo_program),
    "Betty": ("betty", betty_program),
    "TorchOpt": ("torchopt", torchopt_program),
    "BOAT": ("boat_torch", boat_program),
    "hypergrad": ("hypergrad", hypergrad_program),
    "higher": ("higher", higher_program),
}
"""Name in the tables → the package that is imported, and the maker of its programs."""
