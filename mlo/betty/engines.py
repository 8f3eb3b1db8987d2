"""Betty's four methods as engines: `betty-darts`, `betty-neumann`, `betty-cg` and `betty-sama`.

They call Betty's own functions. `mlo` supplies the graph, the point, the batch and the noise. The
inverse and the mixed product are what the installed Betty computes, including its errors. These
engines are for comparisons: each has a counterpart in `mlo` that does what its name says.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.hypergradient.options import count, number
from mlo.records import SolveReport
from mlo.response import Cotangent, Pullback, PullbackEngine
from mlo.tensors import zeros_for_none

__all__ = [
    "BettyConjugateGradient",
    "BettyDarts",
    "BettyEngine",
    "BettyNeumann",
    "BettySama",
    "betty_version",
]


def betty_version() -> str:
    """The version of the installed betty-ml.

    Raises:
        EngineError: if it is not installed.
    """
    try:
        return version("betty-ml")
    except PackageNotFoundError:
        raise EngineError(
            "The engines betty-darts, betty-neumann, betty-cg and betty-sama need the package "
            "betty-ml, which is not installed. Run: pip install --ignore-requires-python --no-deps "
            "betty-ml==0.2.1"
        ) from None


@dataclass(frozen=True, kw_only=True)
class BettyEngine(PullbackEngine):
    """Base of the engines that call a function of `betty.hypergradient`.

    Attributes:
        alpha: as in Betty's `Config`: the numerator of the finite difference, the step of the
            series, the scale of CG.
    """

    alpha: float = number(1.0, positive=True)

    needs_symmetry: ClassVar[bool] = True  # and one loss per problem: Betty has no games
    takes_sharded: ClassVar[bool] = False
    method: ClassVar[str]
    truncates: ClassVar[bool] = False
    """Whether it solves the system with a number of steps, and does not say how well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        betty_version()

    @property
    def differentiable(self) -> bool:
        return False

    def config(self) -> dict[str, Any]:
        """The options of `betty.configs.Config` that choose this method."""
        return {"type": self.method, f"{self.method}_alpha": self.alpha}

    def pullback(
        self, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        # Imported here, since betty-ml is optional.
        module = importlib.import_module(f"betty.hypergradient.{self.method}")
        function = getattr(module, self.method)
        point = call.solution.evaluation.parameters
        parameters = {key: t.detach().clone().requires_grad_() for key, t in point.items()}
        inputs = call.input_aliases()
        v = zeros_for_none(cotangent, list(parameters.values()))
        # Stand-ins for Betty's problems, with the few methods that its functions call.
        lower = _Lower(self.config(), call, parameters, inputs)
        upper = _Upper(call.select(inputs))
        arguments = {"vector": v, "curr": lower, "prev": upper, "sync": False}
        taken = inspect.signature(function).parameters  # 0.1.1 has no sync
        try:
            with torch.enable_grad():
                found = function(**{key: value for key, value in arguments.items() if key in taken})
        except (RuntimeError, TypeError) as error:
            raise EngineError(
                f"Problem {call.solution.name!r}: the function of Betty {betty_version()} behind "
                f"{self.name!r} failed: {error} (It needs a loss in which every parameter and "
                f"every problem read takes part.) Use {self.method!r}."
            ) from error
        report = self.report(call.solution.name, converged=not self.truncates)
        return call.scatter([tensor.detach() for tensor in found]), report


@dataclass(frozen=True, kw_only=True)
class BettyDarts(BettyEngine):
    """Betty's `darts`: no inverse (q = v) and finite differences at ± alpha / ‖v‖.

    Unlike DARTS's own formula it has no learning rate.
    """

    alpha: float = number(0.01, positive=True)

    name: ClassVar[str] = "betty-darts"
    method: ClassVar[str] = "darts"

    @property
    def uses_second_derivatives(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class BettyNeumann(BettyEngine):
    """Betty's `neumann`: alpha times the first `iterations` + 1 terms of the series.

    Nothing checks that the series converges.
    """

    iterations: int = count(1)

    truncates: ClassVar[bool] = True
    name: ClassVar[str] = "betty-neumann"
    method: ClassVar[str] = "neumann"

    def config(self) -> dict[str, Any]:
        return {**super().config(), f"{self.method}_iterations": self.iterations}


@dataclass(frozen=True, kw_only=True)
class BettyConjugateGradient(BettyNeumann):
    """Betty's `cg`, which does not converge beyond one iteration.

    Its directions use the last residual.
    """

    name: ClassVar[str] = "betty-cg"
    method: ClassVar[str] = "cg"


@dataclass(frozen=True, kw_only=True)
class BettySama(BettyDarts):
    """Betty's `sama`: `darts` on the transpose of Adam's step, without its bias correction.

    The last gradient is what `optimizer.state[parameter]["last_grad"]` holds, where Betty's own
    problem puts it; without the entry it counts as zero. With SGD it is `darts`.
    """

    alpha: float = number(1.0, positive=True)

    name: ClassVar[str] = "betty-sama"
    method: ClassVar[str] = "sama"

    def config(self) -> dict[str, Any]:
        return {"type": self.method, "sama_adam_alpha": self.alpha}


class _Lower:
    """What Betty's functions ask of the problem whose response they differentiate."""

    _strategy = "default"
    paths: tuple[()] = ()

    def __init__(
        self,
        config: dict[str, Any],
        call: Pullback,
        parameters: dict[str, Tensor],
        inputs: Sequence[Tensor],
    ) -> None:
        self.config = importlib.import_module("betty.configs").Config(**config)
        self.cur_batch = None  # the evaluation holds the batch
        self._call, self._parameters, self._inputs = call, parameters, inputs
        # `sama` asks for the state of the optimizer, which knows the live parameters.
        problem = call.solution.evaluation.loss.problem
        self.optimizer = next(iter(problem.optimizers.values()))
        self._live = {id(t): problem.parameters[key] for key, t in parameters.items()}

    def training_step_exec(self, batch: None) -> Tensor:
        (loss,) = self._call.stack.enter_context(
            self._call.losses(self._parameters, self._inputs)
        ).values()
        return loss

    def parameters(self) -> list[Tensor]:
        return list(self._parameters.values())

    trainable_parameters = meta_trainable_parameters = parameters

    def get_opt_param_group_for_param(self, param: Tensor) -> dict[str, Any]:
        live = self._live[id(param)]
        (found,) = [
            group
            for group in self.optimizer.param_groups
            if any(member is live for member in group["params"])
        ]
        return found

    def get_opt_state_for_param(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state[self._live[id(param)]]
        return state


class _Upper:
    """What Betty's functions ask of the problems above it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)

    def trainable_parameters(self) -> list[Tensor]:
        return self._parameters
