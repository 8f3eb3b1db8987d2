"""Betty's `Engine`: sets the problems up, lets the leaves step, validates, and stops."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

import mlo
from mlo.compat.betty.configs import EngineConfig
from mlo.compat.betty.early_stopping import EarlyStopping
from mlo.compat.betty.envs import Env
from mlo.compat.betty.loggers import LoggerBase, log_from_loss_dict, logger
from mlo.compat.betty.problems import Problem
from mlo.compat.betty.stepper import Stepper
from mlo.errors import CheckpointError, ConfigurationError, GraphError, ProblemError

__all__ = ["Engine"]


class Engine:
    """Runs a program: subclass it to define `validation`, or `train_step`.

    Args:
        problems: all problems.
        config: of the run.
        dependencies: `{"u2l": {upper: [lower, ...]}, "l2u": {lower: [upper, ...]}}`. "l2u" names,
            for each problem, those directly above it, whose losses read it. "u2l" names, for each
            upper problem, those whose losses read it and through which its gradient returns.
        env: what all problems share.

    Raises:
        ConfigurationError: for settings that are not supported.
        GraphError: if the dependencies are no valid graph.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        config: EngineConfig | None = None,
        dependencies: Mapping[str, Any] | None = None,
        env: Env | None = None,
    ) -> None:
        self.config = config if config is not None else EngineConfig()
        self.train_iters = self.valid_step = self.global_step = 0
        self.logger_type = "none"
        self.logger: LoggerBase = LoggerBase()
        self.problems = list(problems)
        self.leaves: list[Problem] = []
        self.dependencies = _complete(dependencies)
        self.env = env
        self.early_stopping: EarlyStopping | None = None
        self.device: Any = None
        self._strategy, self._backend = "default", "nccl"
        self._world_size, self._rank, self._local_rank = 1, 0, 0
        self._roll_back = False

        self._stepper: Stepper | None = None
        self._rounds_before = 0  # of optimizers that were replaced since
        self._iteration = 0
        self.initialize()

    # ------------------------------ running

    def run(self) -> None:
        """Makes `train_iters` steps of the leaves (the rest of them after a load)."""
        self.train()
        first, self._iteration = self._iteration, 0
        for iteration in range(first + 1, self.train_iters + 1):
            self._iteration = iteration
            self.global_step += 1
            self.train_step()
            if iteration % self.valid_step == 0 and self._validate():
                self.logger.info("Early stopping is executed!")
                break
        self._iteration = 0
        self.cleanup()

    def train_step(self) -> None:
        """Makes one step of every leaf, and of the problems above that are due then."""
        for leaf in self.leaves:
            leaf.step(global_step=self.global_step)

    def _validate(self) -> bool:
        """Validates, in the first process; returns whether to stop."""
        stop = False
        if self.do_validation():
            self.eval()
            stats = self.validation() or {}  # type: ignore[attr-defined]
            self.logger.info(
                f"[Validation] [Global Step {self.global_step}] {log_from_loss_dict(stats)}"
            )
            self.logger.log(stats, tag="validation", step=self.global_step)
            self.train()
            stop = self.early_stopping is not None and self.early_stopping(stats)
        if self.early_stopping is not None and self._world_size > 1:
            answer = [stop]
            dist.broadcast_object_list(answer, src=0)
            stop = answer[0]
        return stop

    def train(self) -> None:
        """Puts all modules into training mode."""
        for problem in self.problems:
            problem.train()

    def eval(self) -> None:
        """Puts all modules into evaluation mode."""
        for problem in self.problems:
            problem.eval()

    def step_leaf(self, leaf: Problem, global_step: int | None) -> None:
        """Makes a step of a leaf, and of the problems above that are due then.

        Raises:
            ProblemError: if another leaf is due, or the problem is none, or is in evaluation mode.
        """
        if not leaf.leaf or not leaf._training:
            what = "is in evaluation mode: call engine.train() first"
            if not leaf.leaf:
                what = "is not a leaf: it steps automatically after the problems below it"
            raise ProblemError(f"Problem {leaf.name!r} {what}.")
        for problem in self.problems:
            problem._global_step = global_step
        self._prepared().step(leaf)

    # ------------------------------ the state of a run

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to resume, as tensors and plain values.

        It can be saved by `mlo.save_checkpoint`, also within `validation`. (Loggers and the user's
        `Env` are not in it.)
        """
        stopping = self.early_stopping
        return {
            **self._prepared().state_dict(),
            "iteration": self._iteration,
            "global_step": self.global_step,
            "early_stopping": None
            if stopping is None
            else {"best_score": stopping.best_score, "counter": stopping.counter},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state_dict` returned; `run` then makes the rest of the run.

        Raises:
            CheckpointError: if the state is of another program.
        """
        if set(state.get("problems", ())) != {problem.name for problem in self.problems}:
            raise CheckpointError(
                f"The state is of the problems {sorted(state.get('problems', ()))}, this engine "
                f"has {sorted(problem.name for problem in self.problems)}. (A single problem's "
                "state is loaded by problem.load_state_dict.)"
            )
        self._prepared().load_state_dict(state)
        self._iteration, self.global_step = state["iteration"], state["global_step"]
        if self.early_stopping is not None and state["early_stopping"] is not None:
            self.early_stopping.best_score = state["early_stopping"]["best_score"]
            self.early_stopping.counter = state["early_stopping"]["counter"]

    # ------------------------------ setting up

    def initialize(self) -> None:
        """Reads the configuration and the dependencies, and initializes the problems."""
        self.parse_config()
        dist_dict = self.configure_systems()
        self.logger = logger(self.logger_type if self.is_rank_zero() else "none")
        if self.is_rank_zero():
            self.logger.info("Initializing Multilevel Optimization...\n")
        start = time.time()
        self.parse_dependency()
        for problem in self.problems:
            self.set_problem_attr(problem)
        if self.env is not None:
            self.env.configure_distributed_training(dist_dict)
            self.env.configure_device(self.device)
            self.env.initialize()
        for problem in self.problems:
            problem._engine = self
            problem.add_logger(self.logger)
            problem.configure_distributed_training(dist_dict)
            problem.configure_device(self.device)
            problem.configure_roll_back(self._roll_back)
            problem.initialize()
            if self.env is not None:
                problem.add_env(self.env)
        self._prepared()
        if self.is_rank_zero():
            self.logger.info(f"Time spent on initialization: {time.time() - start:.3f} (s)\n")

    def parse_config(self) -> None:
        """Reads the configuration.

        Raises:
            ConfigurationError: for what is not served.
        """
        config = self.config
        config.check()
        self.train_iters, self.valid_step = config.train_iters, config.valid_step
        self.logger_type, self._roll_back = config.logger_type, config.roll_back
        self._strategy, self._backend = config.strategy, config.backend
        if config.early_stopping:
            self.early_stopping = EarlyStopping(
                metric=config.early_stopping_metric,
                mode=config.early_stopping_mode,
                tolerance=config.early_stopping_tolerance,
            )

    def configure_systems(self) -> dict[str, Any]:
        """Starts `torch.distributed` on request, and chooses the device.

        Raises:
            ConfigurationError: if the backend needs GPUs and there are none.
        """
        gpu = torch.cuda.is_available()
        if self._strategy == "distributed":
            if self._backend == "nccl" and not gpu:
                raise ConfigurationError(
                    "backend is 'nccl', which needs GPUs, but there is none. Use backend='gloo'."
                )
            if not dist.is_initialized():
                dist.init_process_group(backend=self._backend)
            self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
            self._local_rank = self._rank % torch.cuda.device_count() if gpu else 0
        self.device = "cuda" if gpu and self._strategy != "cpu" else "cpu"
        if self._strategy == "gpu":
            self.device = "cuda"
        if self._strategy == "distributed" and gpu:
            torch.cuda.set_device(self._local_rank)
            self.device = torch.device("cuda", self._local_rank)
        return {
            "strategy": self._strategy,
            "backend": self._backend,
            "world_size": self._world_size,
            "rank": self._rank,
            "local_rank": self._local_rank,
        }

    def check_leaf(self, problem: Problem) -> bool:
        """Whether no problem is below this one."""
        return all(problem not in uppers for uppers in self.dependencies["l2u"].values())

    def find_paths(self, src: Problem, dst: Problem) -> list[list[Problem]]:
        """The paths from `dst` down to `src` and back to `dst`.

        Raises:
            GraphError: if "l2u" has no path from `src` to `dst`.
        """
        results: list[list[Problem]] = []
        self.dfs(src, dst, [src], results)
        if not results:
            raise GraphError(
                f"dependencies: 'u2l' says that {src.name!r} is below {dst.name!r}, but no path "
                f"in 'l2u' leads from {src.name!r} up to {dst.name!r}. Add the edges of a path to "
                "'l2u'."
            )
        return [[*reversed(path), dst] for path in results]

    def dfs(
        self, src: Problem, dst: Problem, path: list[Problem], results: list[list[Problem]]
    ) -> None:
        """Adds to `results` the paths from `src` up to `dst` that begin with `path`."""
        if src is dst:
            results.append(list(path))
            return
        for above in self.dependencies["l2u"].get(src, ()):
            self.dfs(above, dst, [*path, above], results)

    def parse_dependency(self) -> None:
        """Finds each problem's children, parents and paths, and the leaves.

        Raises:
            GraphError: for problems that are not in the list, or a circle.
        """
        _check_edges(self.problems, self.dependencies)
        for upper, lowers in self.dependencies["u2l"].items():
            for lower in lowers:
                upper.add_paths(self.find_paths(src=lower, dst=upper))
        for lower, uppers in self.dependencies["l2u"].items():
            for upper in uppers:
                lower.add_parent(upper)
                upper.add_child(lower)
        for problem in self.problems:
            problem.leaf = self.check_leaf(problem)
            if problem.leaf:
                self.leaves.append(problem)

    def set_dependency(self, dependencies: Mapping[str, Any]) -> None:
        """Exchanges the dependencies, between rounds."""
        self.dependencies = _complete(dependencies)
        self.leaves = []
        for problem in self.problems:
            problem.clear_dependencies()
        self.parse_dependency()
        for problem in self.problems:
            problem.configure_roll_back(self._roll_back)
        self.rebuild()

    def set_problem_attr(self, problem: Problem) -> str:
        """Makes a problem an attribute of the engine, the other problems and the environment.

        Raises:
            GraphError: if there is another attribute of its name.
        """
        owners: list[Any] = [self, *[other for other in self.problems if other is not problem]]
        for owner in owners:
            if hasattr(owner, problem.name):
                raise GraphError(
                    f"{type(owner).__name__} already has an attribute {problem.name!r}, so no "
                    "problem can have this name. Choose another."
                )
        if self.env is not None:
            owners.append(self.env)
        for owner in owners:
            setattr(owner, problem.name, problem)
        return problem.name

    def do_validation(self) -> bool:
        """Whether to validate: `validation` is defined, and this is the first process."""
        return self.is_implemented("validation") and self.is_rank_zero()

    def is_rank_zero(self) -> bool:
        """Whether this is the first process."""
        return self._rank == 0

    def is_implemented(self, fn_name: str) -> bool:
        """Whether there is a method of this name."""
        return callable(getattr(self, fn_name, None))

    def cleanup(self) -> None:
        """Leaves the process group."""
        if self._strategy == "distributed" and dist.is_initialized():
            dist.destroy_process_group()
        if self.is_rank_zero():
            self.logger.info("Multilevel optimization finished!")

    # ------------------------------ the optimizer behind it

    @property
    def mlo_optimizer(self) -> mlo.MultilevelOptimizer:
        """The `MultilevelOptimizer` behind it."""
        return self._prepared().optimizer

    @property
    def last_record(self) -> mlo.Record | None:
        """The record of the last update; None before the first."""
        return None if self._stepper is None else self._stepper.last_record

    def rebuild(self) -> None:
        """Rebuilds the optimizer before the next step, after part of a problem was exchanged.

        Raises:
            ProblemError: within a round.
        """
        if self._stepper is not None:
            self._rounds_before = self._stepper.leave()
            self._stepper = None

    def _prepared(self) -> Stepper:
        if self._stepper is None:
            self._stepper = Stepper(
                self.problems,
                self.dependencies["u2l"],
                self.config,
                rounds_before=self._rounds_before,
                distributed="exact" if self._world_size > 1 else None,
            )
        return self._stepper


def _complete(dependencies: Mapping[str, Any] | None) -> dict[str, dict[Problem, list[Problem]]]:
    given = dependencies or {}
    return {"u2l": dict(given.get("u2l", {})), "l2u": dict(given.get("l2u", {}))}


def _check_edges(
    problems: Sequence[Problem], dependencies: Mapping[str, Mapping[Problem, list[Problem]]]
) -> None:
    for kind, edges in dependencies.items():
        for start, ends in edges.items():
            for problem in (start, *ends):
                if problem not in problems:
                    raise GraphError(
                        f"dependencies[{kind!r}] names the problem {problem.name!r}, which is not "
                        "in the list of problems. Add it there."
                    )
    # A circle upwards would have no leaf to begin with.
    left = set(problems)
    while left:
        below = {lower for lower, uppers in dependencies["l2u"].items() if lower in left}
        raised = {upper for lower in below for upper in dependencies["l2u"][lower]}
        free = left - raised
        if not free:
            raise GraphError(
                f"dependencies['l2u'] has a circle among {sorted(p.name for p in left)}. An edge "
                "goes from a lower problem to one above it; 'u2l' is for the other way."
            )
        left -= free
