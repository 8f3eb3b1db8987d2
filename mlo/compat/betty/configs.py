"""Betty's `Config` of a problem and `EngineConfig`, with a few additional fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlo.errors import ConfigurationError, check_choice, nearest

__all__ = ["FORMULAS", "Config", "EngineConfig"]

FORMULAS = ("exact", "betty")
"""Whether products with derivatives are exact, or what Betty's own functions compute."""

PRECISIONS = ("fp32", "bf16")
STRATEGIES = ("default", "cpu", "gpu", "distributed")
LOGGERS = ("none", "tensorboard", "wandb")

INSTEAD = {
    "fp16": "Use precision='bf16', which needs no loss scale.",
    "zero": "Use strategy='distributed', which keeps the whole optimizer on every process.",
    "fsdp": "Use strategy='distributed'; for parameters that must be sharded, declare the problems "
    "with mlo itself (docs/distributed.md).",
    "accelerate": "Use strategy='distributed' under torchrun.",
}
"""Value of Betty's that is not supported → what to do."""


@dataclass
class Config:
    """How a problem is trained, and how its solution is differentiated by those above it.

    Attributes:
        type: "darts", "neumann", "cg" or "sama" in Betty's sense, with exact products. Or any
            engine of mlo: an object, or a mapping such as `{"name": "nystrom", "rank": 10}`.
        unroll_steps: steps per step of the problems above.
        first_order: for an *upper* problem: whether it differentiates the solutions below by their
            `type`. False: by unrolling the steps of an `IterativeProblem`, and of no other.
        retain_graph: not needed.
        allow_unused: not needed.
        gradient_accumulation: batches per step; of an upper problem, solves of those below it.
        gradient_clipping: largest norm of the gradient; 0: none.
        precision: "fp32" or "bf16".
        initial_dynamic_scale: of fp16, which is not supported.
        scale_factor: of fp16, which is not supported.
        warmup_steps: batches for which the problems *above* wait.
        log_step: batches per line of the log; -1: none.
        log_local_step: whether the logger counts this problem's own steps.
        darts_alpha: numerator of Betty's finite difference (`formulas="betty"`).
        darts_multitask: not supported.
        sama_adam_alpha: as `darts_alpha`, of "sama".
        sama_multitask: not supported.
        neumann_iterations: products of the series, which has one term more.
        neumann_alpha: step of the series.
        cg_iterations: most steps of conjugate gradients.
        cg_alpha: of Betty's formula (`formulas="betty"`); an exact solve does not depend on it.
        formulas: "exact" or "betty"; None: as the `EngineConfig` says.
    """

    type: Any = "darts"
    unroll_steps: int = 1
    first_order: bool = True
    retain_graph: bool = False
    allow_unused: bool = True

    gradient_accumulation: int = 1
    gradient_clipping: float = 0.0

    precision: str = "fp32"
    initial_dynamic_scale: float = 4096.0
    scale_factor: float = 2.0

    warmup_steps: int = 0

    log_step: int = -1
    log_local_step: bool = False

    darts_alpha: float = 0.01
    darts_multitask: bool = False

    sama_adam_alpha: float = 1.0
    sama_multitask: bool = False

    neumann_iterations: int = 1
    neumann_alpha: float = 1.0

    cg_iterations: int = 1
    cg_alpha: float = 1.0

    formulas: str | None = None

    def check(self, problem: str) -> None:
        """Refuses what is not supported.

        Args:
            problem: whose configuration it is.

        Raises:
            ConfigurationError: with what to do.
        """
        where = f"Problem {problem!r}: "
        _check_served(f"{where}precision", self.precision, PRECISIONS)
        check_choice(f"{where}formulas", self.formulas, (*FORMULAS, None))
        for name in ("darts_multitask", "sama_multitask"):
            if getattr(self, name):
                raise ConfigurationError(
                    f"{where}{name}=True leaves the lower parameters where a finite difference "
                    "has displaced them, but no gradient of mlo displaces them. Drop it, and let "
                    "the lower loss sum the tasks."
                )
        for name in ("unroll_steps", "gradient_accumulation"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(
                    f"{where}{name} must be an integer of at least 1, got {value!r}."
                )


@dataclass
class EngineConfig:
    """How the whole program runs.

    Attributes:
        train_iters: steps of the leaves.
        valid_step: steps per validation.
        logger_type: "none", "tensorboard" or "wandb".
        roll_back: whether lower problems return to their cycle's start after each step of those
            above, and make one step from there.
        backend: of `torch.distributed`.
        strategy: "default" (a GPU where there is one), "cpu", "gpu" or "distributed".
        early_stopping: whether a metric that no longer improves ends the run.
        early_stopping_mode: "min" or "max".
        early_stopping_tolerance: validations without improvement that end it.
        early_stopping_metric: an entry of what `validation` returns.
        formulas: "exact" or "betty", for every problem whose own configuration leaves it open.
        on_nonfinite: what happens when a loss or gradient is not finite: "stop" raises a
            `NonFiniteError`, "skip" leaves the step out, None steps all the same, as Betty does.
    """

    train_iters: int = 50000
    valid_step: int = 500

    logger_type: str = "none"

    roll_back: bool = False

    backend: str = "nccl"
    strategy: str = "default"

    early_stopping: bool = False
    early_stopping_mode: str = "min"
    early_stopping_tolerance: int = 5
    early_stopping_metric: str = "loss"

    formulas: str = "exact"
    on_nonfinite: Literal["stop", "skip"] | None = "stop"

    def check(self) -> None:
        """Refuses what is not supported.

        Raises:
            ConfigurationError: with what to do.
        """
        _check_served("strategy", self.strategy, STRATEGIES)
        check_choice("logger_type", self.logger_type, LOGGERS)
        check_choice("formulas", self.formulas, FORMULAS)
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip", None))


def _check_served(option: str, value: str, served: tuple[str, ...]) -> None:
    if value in INSTEAD:
        raise ConfigurationError(f"{option} is {value!r}, which is not supported. {INSTEAD[value]}")
    if value not in served:
        raise ConfigurationError(f"{option} is {value!r}. {nearest(str(value), served)}")
