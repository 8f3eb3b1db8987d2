"""Betty's `Config(type=…)` as an engine: its inverse, with exact products or Betty's own numbers.

For an upper loss with the gradient v in the lower parameters, all methods return −Bᵀ q with the
mixed derivative B of the lower gradient, and differ in q ≈ A⁻¹ v:

    type                 q                                      here
    "darts"              v (no learning rate)                   `identity`
    "neumann"            α Σ_{k ≤ K} (I − α A)ᵏ v               `neumann` with K + 1 terms
    "cg"                 K steps of conjugate gradients         `cg`
    "sama", Adam & co.   (∂θ'/∂g)ᵀ v of the optimizer's step    `one_step`
    "sama", SGD          v (no learning rate)                   `identity`

Betty computes Bᵀ q by finite differences in "darts" and "sama", and so does `formulas="betty"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mlo.betty.engines import BettyConjugateGradient, BettyDarts, BettyNeumann, BettySama
from mlo.errors import ConfigurationError, nearest
from mlo.hypergradient import (
    ConjugateGradient,
    FirstOrder,
    Identity,
    Neumann,
    OneStep,
    Unroll,
    engine_from,
)
from mlo.solution import AbstractEngine

if TYPE_CHECKING:
    from mlo.compat.betty.problems import Problem

__all__ = ["engine_of"]

TYPES = ("darts", "neumann", "cg", "sama")


def engine_of(problem: Problem, formulas: str, uppers: list[Problem]) -> AbstractEngine:
    """The engine that differentiates a problem's solution.

    Args:
        problem: whose solution.
        formulas: "exact" or "betty".
        uppers: the problems whose gradients contain its response.

    Raises:
        ConfigurationError: if its type is unknown, or if the uppers disagree on `first_order`.
    """
    answers = {upper.config.first_order for upper in uppers}
    if len(answers) > 1:
        raise ConfigurationError(
            f"The problems above {problem.name!r} ({', '.join(u.name for u in uppers)}) have "
            "different first_order in their configurations, but its solution can be "
            "differentiated in one way only. Give them the same value."
        )
    # Betty: with first_order=False an upper problem takes no best-response Jacobians, and autograd
    # follows the steps of an iterative problem instead.
    if answers == {False}:
        if problem.unrolls:
            return Unroll(steps=problem.config.unroll_steps)
        return FirstOrder()
    config = problem.config
    if not isinstance(config.type, str) or config.type not in TYPES:
        return _engine_of_mlo(problem.name, config.type)
    return _of_betty(config) if formulas == "betty" else _exact(problem)


def _engine_of_mlo(problem: str, choice: Any) -> AbstractEngine:
    if isinstance(choice, str):
        # A name alone could be either library's, and the two mean different things by "darts".
        raise ConfigurationError(
            f"Problem {problem!r}: type is {choice!r}. {nearest(choice, TYPES)} An engine of mlo "
            f'is given as a mapping, {{"name": "nystrom"}}, or an object.'
        )
    return engine_from(choice)


def _exact(problem: Problem) -> AbstractEngine:
    config = problem.config
    if config.type == "neumann":
        # Betty's user has chosen the number of terms, so only a growing series causes a warning.
        return Neumann(
            num_terms=config.neumann_iterations + 1, step_size=config.neumann_alpha, tol=1.0
        )
    if config.type == "cg":
        return ConjugateGradient(max_steps=config.cg_iterations)
    if config.type == "sama" and not isinstance(problem.optimizer, torch.optim.SGD):
        return OneStep()
    return Identity()


def _of_betty(config: Any) -> AbstractEngine:
    if config.type == "neumann":
        return BettyNeumann(iterations=config.neumann_iterations, alpha=config.neumann_alpha)
    if config.type == "cg":
        return BettyConjugateGradient(iterations=config.cg_iterations, alpha=config.cg_alpha)
    if config.type == "sama":
        return BettySama(alpha=config.sama_adam_alpha)
    return BettyDarts(alpha=config.darts_alpha)
