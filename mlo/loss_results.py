"""Reads what a loss returned: a scalar, or one for each player of a game, and metrics beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlo.errors import ProblemError
from mlo.problem import Problem
from mlo.randomness import RandomState, forked
from mlo.tensors import map_tensors

__all__ = ["LossValue", "call_deferred", "is_number", "read_result"]


@dataclass(kw_only=True, eq=False)
class LossValue:
    """What a loss returned: player → scalar, and metrics.

    Players that were not requested are missing.
    """

    players: dict[str, Tensor]
    metrics: dict[str, Any]


def read_result(problem: Problem, result: Any, chosen: Collection[str] | None) -> LossValue:
    """Reads what a problem's loss returned.

    Args:
        problem: whose loss.
        result: a scalar, or a dict of one per player; or a pair of either and metrics.
        chosen: the players whose losses are needed; None: all.

    Raises:
        ProblemError: if it is anything else.
    """
    metrics: dict[str, Any] = {}
    loss = result
    if isinstance(result, tuple):
        loss, metrics = _with_metrics(problem.name, result)
    if problem.is_game:
        if not isinstance(loss, Mapping) or set(loss) != set(problem.players):
            is_mapping = isinstance(loss, Mapping)
            got = f"the players {sorted(loss)}" if is_mapping else f"a {type(loss).__name__}"
            raise ProblemError(
                f"The loss of the game {problem.name!r} returned {got}; return a dict with one "
                f"scalar for each of {sorted(problem.players)}."
            )
        # First the requested players, then their functions: the others are never called.
        players = {player: loss[player] for player in loss if chosen is None or player in chosen}
        functions = sum(map(callable, loss.values()))
        metrics |= call_deferred(players, problem.name, problem.generators, functions=functions)
    else:
        players = {problem.name: loss}
    for player, scalar in players.items():
        is_tensor = isinstance(scalar, Tensor)
        if not is_tensor or scalar.numel() != 1 or not scalar.dtype.is_floating_point:
            raise _no_scalar(problem, player, scalar)
        if scalar.dim():
            players[player] = scalar.reshape(())
    if metrics:
        metrics = map_tensors(metrics, _kept)
    return LossValue(players=players, metrics=metrics)


def call_deferred(
    players: dict[str, Any],
    problem: str = "",
    generators: Sequence[torch.Generator] = (),
    *,
    functions: int | None = None,
) -> dict[str, Any]:
    """Replaces losses that are functions by their values; returns the metrics beside them.

    Each function starts from the same random state, so its value does not depend on which others
    are called.

    Args:
        players: player → scalar or function, of the players that were requested; changed.
        problem: its name, for messages.
        generators: those that it names.
        functions: how many functions the loss returned for all players; None: these are all.
    """
    called = [player for player, loss in players.items() if callable(loss)]
    found: dict[str, Any] = {}
    if functions is None:
        functions = len(called)
    if functions < 2:
        for player in called:
            players[player], found = _with_metrics(problem, players[player]())
        return found
    # One state that several functions start from has no end that lies behind all that they draw,
    # as far as can be told. So they draw from a stream of their own, a new one at each evaluation;
    # the common one moves by the number that chooses it.
    if called:
        with forked(0, generators):
            state = RandomState.capture(generators)
            for player in called:
                state.restore(generators)
                players[player], metrics = _with_metrics(problem, players[player]())
                found |= metrics
    return found


def _with_metrics(problem: str, result: Any) -> tuple[Any, dict[str, Any]]:
    """A loss, and the metrics that may come with it."""
    if not (isinstance(result, tuple) and len(result) == 2):
        return result, {}
    loss, metrics = result
    if not isinstance(metrics, Mapping):
        raise ProblemError(
            f"The loss of problem {problem!r} returned a pair whose second part is a "
            f"{type(metrics).__name__}; return (scalar, {{metric name: value}})."
        )
    return loss, dict(metrics)


def is_number(value: Any) -> bool:
    """Whether a metric is averaged: a floating-point number, or a tensor of such."""
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _no_scalar(problem: Problem, player: str, value: Any) -> ProblemError:
    of = f" of player {player!r}" if problem.is_game else ""
    got = repr(value)
    if isinstance(value, Tensor):
        got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    advice = "Reduce it, for example by .mean()."
    if isinstance(value, Mapping) and not problem.is_game:
        advice = (
            "Return the loss and its metrics as a pair: `return loss, {'accuracy': accuracy}`. If "
            "several players have their own losses, declare them with players=."
        )
        if isinstance(value.get("loss"), Tensor):  # of transformers, of Lightning
            advice = (
                "Return its entry 'loss', or with metrics a pair: `return loss, {'accuracy': "
                "accuracy}`."
            )
        elif all(isinstance(part, Tensor) and part.numel() == 1 for part in value.values()):
            advice = "If these are parts of one loss, return their sum. " + advice
        got = f"a dict of {', '.join(map(repr, value))}"
    return ProblemError(
        f"The loss{of} of problem {problem.name!r} must be a floating-point scalar tensor (or a "
        f"pair of it and a dict of metrics), got {got}. {advice}"
    )
