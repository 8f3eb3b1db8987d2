"""Runs an `mlo` graph on Betty's `Engine`, to compare one declaration on both libraries."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mlo.batches import BatchStream
from mlo.betty.engines import BettyDarts, BettyEngine, betty_version
from mlo.errors import EngineError
from mlo.graph import DependencyGraph
from mlo.hypergradient.registry import EngineChoice, engines_for
from mlo.optimizer import MultilevelOptimizer
from mlo.problem import Problem
from mlo.records import Record
from mlo.solution import AbstractEngine

__all__ = ["describe", "run"]


def describe() -> str:
    """Says which Betty is installed and what it cannot do.

    Raises:
        EngineError: if none is.
    """
    installed = betty_version()
    lines = [
        f"Betty {installed}: it solves once for every path of the graph, replays no noise in its "
        "finite differences,",
        "  leaves the optimizer's weight decay out of the Hessian and reports no residual. It "
        "cannot run: games, neumann or cg",
        "  on a problem whose own gradient contains a response, accumulation, warm-up of single "
        "problems, bf16 on a CPU,",
        "  compiled modules, ReduceLROnPlateau.",
    ]
    if installed.startswith("0.1."):
        lines += [
            "  0.1.1 besides: darts leaves the lower parameters displaced by alpha / ‖v‖ (it "
            "forgets to add in place); the",
            "  lower problems of one upper problem must have the same number of steps; an unused "
            "parameter is an error.",
        ]
    return "\n".join(lines)


def run(
    graph: Sequence[Problem] | DependencyGraph | MultilevelOptimizer,
    *,
    steps: int,
    hypergradient: EngineChoice | Mapping[str, EngineChoice] = "betty-darts",
) -> list[Record]:
    """Runs problems on Betty's `Engine`.

    Their modules and optimizers move as in `MultilevelOptimizer.run`. It prints which Betty it is
    and what that one cannot do.

    Args:
        graph: problems from the innermost to the outermost, their graph, or an optimizer of them.
        steps: number of updates of the outermost problem.
        hypergradient: one of the `betty-*` engines, or a dict problem → engine with "default".

    Returns:
        One record per round, with the last loss and gradient norm of each problem.

    Raises:
        EngineError: for what the installed Betty cannot run, or if it fails.
    """
    if isinstance(graph, MultilevelOptimizer):
        graph = graph.graph
    elif not isinstance(graph, DependencyGraph):
        graph = DependencyGraph(graph)
    if isinstance(hypergradient, Mapping) and "name" not in hypergradient:
        hypergradient = {"default": "betty-darts", **hypergradient}
    print(describe())
    chosen = _checked(graph, engines_for(graph.problems, hypergradient))
    for line in _left_out(graph):
        print(line)
    runner = _Runner(graph, chosen)
    return [runner.round(index + 1) for index in range(steps)]


def _checked(graph: DependencyGraph, engines: Mapping[str, Any]) -> dict[str, BettyEngine]:
    """The engines, if Betty can run this graph with them."""
    read = {lower for name in graph.problems for lower in graph.reads_below[name]}
    chosen: dict[str, BettyEngine] = {}
    for name, problem in graph.problems.items():
        # Nothing differentiates an outermost problem's response.
        engine = engines[name] if name in read else BettyDarts()
        reason = _why_not(graph, problem, engine)
        if reason:
            raise EngineError(f"Betty {betty_version()} cannot run problem {name!r}: {reason}.")
        chosen[name] = engine
    if betty_version().startswith("0.1."):
        for name in graph.problems:
            counts = {graph.problems[lower].steps for lower in graph.reads_below[name]}
            if len(counts) > 1:
                raise EngineError(
                    f"Betty {betty_version()} cannot run problem {name!r}: the problems below it "
                    f"have different steps ({sorted(counts)})."
                )
    return chosen


def _why_not(graph: DependencyGraph, problem: Problem, engine: AbstractEngine) -> str:
    """Why Betty cannot run a problem; empty if it can."""
    if not isinstance(engine, BettyEngine):
        return f"its engine is {engine.label!r}; choose betty-darts, betty-neumann or betty-cg"
    if problem.is_game:
        return "it is a game"
    if len(problem.optimizers) > 1:
        return f"it has {len(problem.optimizers)} optimizers"
    if problem.accumulate > 1:
        return f"accumulate={problem.accumulate}"
    if problem.warmup_steps > 0:
        return f"warmup_steps={problem.warmup_steps}"
    if problem.precision is not None:
        return f"precision={problem.precision!r}"
    if problem.compile:
        return "it is compiled"
    if any(isinstance(s, ReduceLROnPlateau) for s in problem.schedulers.values()):
        return "its scheduler is ReduceLROnPlateau"
    if not isinstance(engine, BettyDarts) and _paths_from(graph, problem.name):
        return f"{engine.label!r} refuses a problem whose own gradient contains a response"
    return ""


def _paths_from(graph: DependencyGraph, upper: str) -> list[str]:
    """The problems that are conditioned on `upper` and whose response comes back to it."""

    def reaches(lower: str) -> bool:
        above = [name for name in graph.problems if lower in graph.reads_below[name]]
        return upper in above or any(reaches(name) for name in above if name != upper)

    return [name for name in graph.problems if upper in graph.reads_above[name] and reaches(name)]


def _left_out(graph: DependencyGraph) -> list[str]:
    """The dependencies that Betty ignores, one line each.

    Its paths go from a solution to its readers only.
    """
    return [
        f"  It leaves out of the gradient of {name!r} that the solution of {lower!r} depends on "
        f"the one of {middle!r}."
        for name in graph.problems
        if _paths_from(graph, name)
        for lower in graph.solutions_in[name]
        for middle in graph.reads_above[lower]
        if middle in graph.solutions_in[name]
    ]


class _Runner:
    """Betty's problems and engine for a graph."""

    def __init__(self, graph: DependencyGraph, engines: Mapping[str, BettyEngine]) -> None:
        configs = importlib.import_module("betty.configs")
        self._problems: dict[str, Any] = {}
        for name, problem in graph.problems.items():
            config = configs.Config(
                **engines[name].config(),
                unroll_steps=problem.steps,
                gradient_clipping=problem.grad_clip or 0.0,
                retain_graph=bool(_paths_from(graph, name)),
            )
            reads = {read: graph.problems[read] for read in graph.reads[name]}
            self._problems[name] = _bridged(problem, reads, config)

        # Betty wants the edges from us: from a solution to its readers ("l2u"), and from an upper
        # problem to those whose response comes back to it ("u2l").
        bridged = self._problems
        above: dict[Any, list[Any]] = {}
        below: dict[Any, list[Any]] = {}
        for name in graph.problems:
            for lower in graph.reads_below[name]:
                above.setdefault(bridged[lower], []).append(bridged[name])
            if conditioned := _paths_from(graph, name):
                below[bridged[name]] = [bridged[lower] for lower in conditioned]
        with _quiet():
            self._engine = importlib.import_module("betty.engine").Engine(
                problems=list(bridged.values()),
                config=_engine_config(configs, next(iter(graph.problems.values())).device),
                dependencies={"l2u": above, "u2l": below},
            )
        self._engine.train()

    def round(self, number: int) -> Record:
        """Lets Betty's leaves step until the outermost problem has moved once more."""
        # A step of Betty's engine moves its leaves, which call the problems above them when due.
        outermost = list(self._problems.values())[-1]
        record = Record(round=number)
        target = outermost.count + 1
        try:
            while outermost.count < target:
                self._engine.global_step += 1
                self._engine.train_step()
        except (RuntimeError, AssertionError, TypeError) as error:
            raise EngineError(
                f"Betty {betty_version()} failed: {type(error).__name__}: {error}"
            ) from error
        for name, problem in self._problems.items():
            if problem.last is not None:
                loss, norm = problem.last
                record.add(name, loss=loss, metrics={}, gradient_norm=norm)
        return record


def _engine_config(configs: Any, device: torch.device) -> Any:
    if betty_version().startswith("0.1."):
        return configs.EngineConfig()
    return configs.EngineConfig(strategy="gpu" if device.type == "cuda" else "cpu")


class _quiet:
    """Silences Betty's verbose logger while Betty is set up."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.INFO)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._before)


def _bridged(problem: Problem, reads: Mapping[str, Problem], config: Any) -> Any:
    """An `mlo` problem as one of Betty's."""
    problems = importlib.import_module("betty.problems")

    class Bridged(problems.ImplicitProblem):  # type: ignore[misc, name-defined]
        """Betty's problem with an `mlo` problem's module, optimizer, loss and data, unpatched."""

        last: tuple[Tensor, Tensor] | None = None

        def get_batch(self) -> Any:
            return stream.next()

        def training_step(self, batch: Any) -> Tensor:
            value = problem.loss(
                problem.module, batch, **{name: other.module for name, other in reads.items()}
            )
            loss: Tensor = value[0] if isinstance(value, tuple) else value
            return loss

        def get_loss(self, batch: Any) -> Any:
            found = super().get_loss(batch)
            self._loss = torch.tensor(found[1]["loss"], dtype=torch.float64)
            return found

        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            gradients = [p.grad for p in problem.parameters.values() if p.grad is not None]
            self.last = (self._loss, torch.nn.utils.get_total_norm(gradients))
            super().optimizer_step(*arguments, **options)

        def trainable_parameters(self) -> list[Tensor]:
            return list(problem.parameters.values())

        parameters = trainable_parameters

        def patch_everything(self) -> None:
            """Does nothing; Betty 0.2.1 would rebuild the optimizer and move the module.

            It makes the optimizer from its defaults, which fails for AdamW.
            """

        def train(self) -> None:
            self._training = True  # the module's own flags are the user's

    stream = BatchStream(problem.data, problem.name)
    options: dict[str, Any] = (
        {"device": problem.device} if betty_version().startswith("0.1.") else {}
    )
    optimizer, schedulers = (
        next(iter(problem.optimizers.values())),
        list(problem.schedulers.values()),
    )
    return Bridged(
        name=f"mlo_{problem.name}",  # Betty makes attributes from the names, and has its own
        config=config,
        module=problem.module,
        optimizer=optimizer,
        scheduler=schedulers[0] if schedulers else None,
        **options,
    )
