"""Betty's problems: what a user's subclass defines, calls and overrides.

How a problem moves is in `driver.py`; `Problem.step` hands over to the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlo.compat.betty.configs import Config
from mlo.compat.betty.loading import Passes, moved
from mlo.compat.betty.loggers import LoggerBase, log_from_loss_dict
from mlo.compat.betty.steps import call, give_groups
from mlo.errors import ProblemError

if TYPE_CHECKING:
    from mlo.compat.betty.envs import Env

__all__ = [
    "HigherIterativeProblem",
    "ImplicitProblem",
    "IterativeProblem",
    "MetaIterativeProblem",
    "Problem",
]

MADE_BY_MLO = (
    "backward",
    "cache_states",
    "check_ready",
    "clip_grad",
    "functional_one_step_descent",
    "get_loss",
    "gradient_accumulation_boundary",
    "one_step_descent",
    "optimizer_step",
    "patch_everything",
    "patch_optimizer",
    "patch_scheduler",
    "recover_states",
    "set_grads",
    "step_after_roll_back",
    "step_normal",
    "synchronize_params",
    "zero_grad",
)
"""Methods of Betty's that take part in a step, which mlo makes elsewhere."""

OF_A_STEP = (
    "mlo makes the step, and that method of Betty's has no part in it. The hooks around a step "
    "are grad_callback, param_callback, custom_optimizer_step and training_step_exec."
)


class Problem:
    """One level of a program: subclass it and define `training_step`.

    Args:
        name: other problems, the engine and the environment find this problem under it.
        config: how it is trained and differentiated.
        module: what it trains; or define `configure_module`.
        optimizer: over the module's parameters; or define `configure_optimizer`.
        scheduler: of the optimizer's learning rate; or define `configure_scheduler`.
        train_data_loader: an iterable of batches, or a tuple of several; or define
            `configure_train_data_loader`, or `get_batch`.
        extra_config: whatever the user wants to find as `self.cfg`.
        device: is ignored; the engine says where modules are. (Betty 0.1 had it.)

    Raises:
        ConfigurationError: for settings that are not served.
        ProblemError: if the class overrides a method that is never called here.
    """

    unrolls = False
    """Whether its steps are unrolled for upper problems with `first_order=False`."""

    def __init__(
        self,
        name: str,
        config: Config | None = None,
        module: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        train_data_loader: Any = None,
        extra_config: Any = None,
        device: Any = None,
    ) -> None:
        self._name = name
        self._config = config if config is not None else Config()
        self._config.check(name)
        _check_overridden(self)
        self.cfg = extra_config
        # What the user gives, or `initialize` makes. (Of which types, the user's subclass knows.)
        self.module: Any = module
        self.optimizer: Any = optimizer
        self.scheduler: Any = scheduler
        self.train_data_loader: Any = train_data_loader
        self.train_data_iterator: list[Passes] = []
        self.cur_batch: Any = None
        self.epoch_counter: list[int] = []

        self.device: Any = None
        self.env: Env | None = None
        self.logger: Any = None
        self.precision = self._config.precision
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.gas = self._config.gradient_accumulation
        self.gradient_clipping = self._config.gradient_clipping
        self.warmup_steps = self._config.warmup_steps
        self.log_step = self._config.log_step
        self.log_local_step = self._config.log_local_step

        self._set_standing()

    def _set_standing(self) -> None:
        """Sets what changes in a run, and what the engine sets."""
        self._parents: list[Problem] = []
        self._children: list[Problem] = []
        self._paths: list[list[Problem]] = []
        self._leaf = False
        self._count = 0
        self._global_step: int | None = 0
        self._training = True
        self._inner_loop_start = True
        self._roll_back = False
        self._strategy: str | None = None
        self._backend: str | None = None
        self._world_size, self._rank, self._local_rank = 1, 0, 0
        self._engine: Any = None  # which steps it

    def __getattr__(self, name: str) -> Any:
        """Called for a missing attribute: says why a part of Betty's step does not exist."""
        why = f" {OF_A_STEP}" if name in MADE_BY_MLO else ""
        if not why and (engine := self.__dict__.get("_engine")) is not None:
            others = [other.name for other in engine.problems if other is not self]
            why = f" The other problems are attributes by their names: {', '.join(others)}."
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.{why}")

    # ------------------------------ what a user defines or calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `forward`."""
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module; a subclass may do otherwise."""
        return self.module(*args, **kwargs)

    def training_step(self, batch: Any) -> Any:
        """The loss on a batch: a scalar, or a dict with "loss" and numbers to log.

        It may be evaluated several times per step, so it should keep no state.
        """
        raise NotImplementedError(f"Problem {self._name!r}: define training_step(self, batch).")

    def training_step_exec(self, batch: Any) -> Any:
        """Calls `training_step`. (Within a step, under autocast where `precision` is "bf16".)"""
        return self.training_step(batch)

    def get_batch(self) -> Any:
        """The next batch: one of each loader."""
        batch = tuple([self.get_batch_single_loader(i) for i in range(len(self.epoch_counter))])
        return batch[0] if len(batch) == 1 else batch

    def get_batch_single_loader(self, idx: int) -> Any:
        """The next batch of one loader, on the problem's device."""
        return moved(self.train_data_iterator[idx].next(), self.device)

    def step(self, global_step: int | None = None) -> None:
        """Makes a step of a leaf, and of the problems above that are due then."""
        self._engine.step_leaf(self, global_step)

    def parameters(self) -> list[Tensor]:
        """All parameters of the module."""
        return list(self.module.parameters())

    def trainable_parameters(self) -> list[Tensor]:
        """The parameters that move; a subclass may return some of the module's."""
        return self.parameters()

    def meta_trainable_parameters(self) -> list[Tensor]:
        """The parameters through which upper gradients flow: here always those that move."""
        return self.trainable_parameters()

    def is_implemented(self, fn_name: str) -> bool:
        """Whether there is a method of this name."""
        return callable(getattr(self, fn_name, None))

    def is_rank_zero(self) -> bool:
        """Whether this is the first process."""
        return self._rank == 0

    def train(self) -> None:
        """Puts the module into training mode."""
        self._training = True
        self.module.train()

    def eval(self) -> None:
        """Puts the module into evaluation mode."""
        self._training = False
        self.module.eval()

    def log(self, stats: Mapping[str, Any], global_step: int | None) -> None:
        """Writes numbers to the log."""
        of_all = "" if global_step is None else f" [Global Step {global_step}]"
        self.logger.info(
            f'[Problem "{self._name}"]{of_all} [Local Step {self._count}] '
            f"{log_from_loss_dict(stats)}"
        )
        local = global_step is None or self.log_local_step
        self.logger.log(stats, tag=self._name, step=self._count if local else global_step)

    def state_dict(self) -> dict[str, Any]:
        """The states of module, optimizer and scheduler. (`Engine.state_dict` has all of a run.)"""
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self.module.load_state_dict(state_dict["module"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.scheduler is not None and "scheduler" in state_dict:
            self.scheduler.load_state_dict(state_dict["scheduler"])

    # ------------------------------ setting up

    def initialize(self) -> None:
        """Makes what was not given, and puts it on the device.

        Raises:
            ProblemError: if something is missing.
        """
        for part in ("train_data_loader", "module", "optimizer", "scheduler"):
            if getattr(self, part) is None and self.is_implemented(f"configure_{part}"):
                setattr(self, part, getattr(self, f"configure_{part}")())
            if getattr(self, part) is None and part in ("module", "optimizer"):
                raise ProblemError(
                    f"Problem {self._name!r} has no {part}. Pass {part}= or define "
                    f"configure_{part}(self)."
                )
        if self.train_data_loader is None and type(self).get_batch is Problem.get_batch:
            raise ProblemError(
                f"Problem {self._name!r} has no batches. Pass train_data_loader= or define "
                "configure_train_data_loader(self) or get_batch(self)."
            )
        self.patch_module()
        groups = getattr(self, "param_groups", None)
        if callable(groups):
            give_groups(self.optimizer, self.scheduler, groups())
        _freeze_others(self)
        if self.train_data_loader is not None:
            loaders = self.train_data_loader
            self.train_data_loader = list(loaders) if isinstance(loaders, tuple) else [loaders]
            self.epoch_counter = [0] * len(self.train_data_loader)
            self.train_data_iterator = [
                self.patch_data_loader(loader, index)
                for index, loader in enumerate(self.train_data_loader)
            ]
        self._announce()

    def _announce(self) -> None:
        if self.is_rank_zero():
            paths = [[problem.name for problem in path] for path in self._paths]
            self.logger.info("*** Problem Information ***")
            self.logger.info(f"Name: {self._name}")
            self.logger.info(f"Uppers: {[problem.name for problem in self._parents]}")
            self.logger.info(f"Lowers: {[problem.name for problem in self._children]}")
            self.logger.info(f"Paths: {paths}\n")

    def patch_module(self) -> None:
        """Puts the module on the device. With several processes it is not wrapped."""
        self.module.to(self.device)
        if self._strategy == "distributed" and not hasattr(self.module, "module"):
            # Programs for Betty reach through DistributedDataParallel by `.module`. (In the
            # instance's dict, so that the module does not become a submodule of itself.)
            self.module.__dict__["module"] = self.module

    def patch_data_loader(self, loader: Any, idx: int = 0) -> Passes:
        """The endless batches of a loader; several processes take turns."""

        def ended() -> None:
            if idx == 0:
                self.epoch_callback_exec()
            self.epoch_counter[idx] += 1

        return Passes(loader, self._name, ended, (self._rank, self._world_size))

    def epoch_callback_exec(self) -> None:
        """Calls the user's `epoch_callback`, at the end of each pass of the first loader."""
        call(self, "epoch_callback")

    def set_module(self, module: nn.Module) -> None:
        """Exchanges the module, between rounds."""
        self.module = module
        self.patch_module()
        self._engine.rebuild()

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Exchanges the optimizer, between rounds."""
        self.optimizer = optimizer
        self._engine.rebuild()

    def set_scheduler(self, scheduler: LRScheduler) -> None:
        """Exchanges the scheduler."""
        self.scheduler = scheduler

    def set_train_data_loader(self, loader: Any, idx: int = 0) -> None:
        """Exchanges a loader; its next batch comes from the new one."""
        self.train_data_loader[idx] = loader
        self.train_data_iterator[idx] = self.patch_data_loader(loader, idx)

    def configure_distributed_training(self, dictionary: Mapping[str, Any]) -> None:
        """Takes strategy, number of processes and rank."""
        self._strategy, self._backend = dictionary["strategy"], dictionary["backend"]
        self._world_size, self._rank = dictionary["world_size"], dictionary["rank"]
        self._local_rank = dictionary["local_rank"]

    def configure_roll_back(self, roll_back: bool) -> None:
        """Takes whether lower problems roll back after each step of those above."""
        self._roll_back = bool(self._parents) and roll_back

    def configure_device(self, device: Any) -> None:
        """Takes the device."""
        self.device = device

    def get_opt_param_group_for_param(self, param: Tensor) -> dict[str, Any] | None:
        """The optimizer's group that holds a parameter."""
        for group in self.optimizer.param_groups:
            if any(member is param for member in group["params"]):
                found: dict[str, Any] = group
                return found
        return None

    def get_opt_state_for_param(self, param: Tensor) -> dict[str, Any]:
        """The optimizer's state of a parameter."""
        state: dict[str, Any] = self.optimizer.state[param]
        return state

    def add_child(self, problem: Problem) -> None:
        """Adds a problem directly below."""
        self._add(self._children, problem, "child")

    def add_parent(self, problem: Problem) -> None:
        """Adds a problem directly above."""
        self._add(self._parents, problem, "parent")

    def _add(self, to: list[Problem], problem: Problem, kind: str) -> None:
        if problem in to:
            raise ProblemError(
                f"Problem {problem.name!r} is already a {kind} of {self._name!r}; name each edge "
                "once in dependencies."
            )
        to.append(problem)

    def add_paths(self, paths: list[list[Problem]]) -> None:
        """Adds paths from this problem down and back, along which its gradient flows."""
        self._paths.extend(paths)

    def add_logger(self, logger: LoggerBase) -> None:
        """Takes a logger, unless there is one."""
        if self.logger is None:
            self.logger = logger

    def add_env(self, env: Env) -> None:
        """Takes the environment, unless there is one."""
        if self.env is None:
            self.env = env

    def clear_dependencies(self) -> None:
        """Forgets the problems above and below."""
        self._children, self._parents, self._paths = [], [], []

    # ------------------------------ facts

    @property
    def name(self) -> str:
        """The name."""
        return self._name

    @property
    def config(self) -> Config:
        """The configuration."""
        return self._config

    @property
    def children(self) -> list[Problem]:
        """The problems directly below."""
        return self._children

    @property
    def parents(self) -> list[Problem]:
        """The problems directly above."""
        return self._parents

    @property
    def paths(self) -> list[list[Problem]]:
        """The paths from this problem down and back, along which its gradient flows."""
        return self._paths

    @property
    def leaf(self) -> bool:
        """Whether there is no problem below."""
        return self._leaf

    @leaf.setter
    def leaf(self, leaf: bool) -> None:
        self._leaf = leaf

    @property
    def count(self) -> int:
        """The number of batches (of a leaf) or solves (of a problem above) so far."""
        return self._count


class ImplicitProblem(Problem):
    """A problem whose solution is differentiated at its current point, by its `Config.type`."""


class IterativeProblem(Problem):
    """A problem whose last `unroll_steps` steps upper problems with `first_order=False` unroll."""

    unrolls = True

    @property
    def params(self) -> tuple[Tensor, ...]:
        """The parameters, for `fmodule`."""
        return tuple(self.module.parameters())

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers, for `fmodule`."""
        return tuple(self.module.buffers())

    def fmodule(self, params: Any, buffers: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the module with other parameters and buffers, in the module's order."""
        tensors: dict[str, Tensor] = {}
        for named, given in (
            (self.module.named_parameters(), params),
            (self.module.named_buffers(), buffers),
        ):
            for (name, _), tensor in zip(named, given, strict=True):
                tensors[name] = tensor
        return functional_call(self.module, tensors, args, kwargs)


class HigherIterativeProblem(IterativeProblem):
    """An `IterativeProblem`; it does not need the package `higher`."""


MetaIterativeProblem = HigherIterativeProblem
"""The name in older versions, which one of Betty's examples still imports."""


def _check_overridden(problem: Problem) -> None:
    found = [name for name in MADE_BY_MLO if hasattr(type(problem), name)]
    if found:
        raise ProblemError(
            f"Problem {problem.name!r} defines {found[0]}, which would never be called: {OF_A_STEP}"
        )


def _freeze_others(problem: Problem) -> None:
    """Freezes the module's parameters that an overridden `trainable_parameters` leaves out."""
    if type(problem).meta_trainable_parameters is not Problem.meta_trainable_parameters:
        raise ProblemError(
            f"Problem {problem.name!r} overrides meta_trainable_parameters: in mlo, upper "
            "gradients flow through all parameters that move. Put the others into a separate "
            "module, or detach them in the upper problem's training_step."
        )
    if type(problem).trainable_parameters is not Problem.trainable_parameters:
        kept = {id(parameter) for parameter in problem.trainable_parameters()}
        for parameter in problem.module.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
