"""Losses and gradients that are not finite: how they are noticed, explained and handled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mlo.errors import NonFiniteError
from mlo.problem import Problem, Tensors
from mlo.tensors import tensors_of
from mlo.total_gradient import TotalGradient

__all__ = [
    "ROLLBACKS",
    "SKIPS_IN_A_ROW",
    "SNAPSHOT_EVERY",
    "OnNonFinite",
    "nonfinite_error",
]

OnNonFinite = Literal["stop", "skip", "rollback"]

SKIPS_IN_A_ROW = 10
"""How many updates of one problem may be left out in a row; after more, it will not recover."""

ROLLBACKS = 3
"""How often a run returns to the same state."""

SNAPSHOT_EVERY = 100
"""Rounds between the states that `rollback` keeps."""


def nonfinite_error(
    problem: Problem,
    found: TotalGradient,
    *,
    round_number: int,
    update: int,
    lowers: Sequence[str],
    reads: Mapping[str, Problem],
    gradient: Callable[[frozenset[str]], Tensors],
) -> NonFiniteError:
    """Returns the error that says what is not finite in a total gradient.

    Args:
        problem: whose gradient it is.
        found: the gradient.
        round_number: number of the round.
        update: number of the problem's update.
        lowers: the problems whose responses are in it, from the innermost to the outermost.
        reads: the problems that the loss reads.
        gradient: repeats the gradient at the same point, with the solutions of the given problems
            treated as constants.
    """
    term = _term(problem, found, lowers, gradient)
    # What may have caused it: the batch, or parameters and buffers that were lost before.
    batches = [tensor for batch in found.evaluation.batches for tensor in tensors_of(batch)]
    lost = [
        f"{name}.{key}"
        for name, other in {problem.name: problem, **reads}.items()
        for key, tensor in other.module.state_dict(keep_vars=True).items()
        if not _all_finite(tensor)
    ]
    bad_batch = not all(map(_all_finite, batches))
    causes = " Its batch holds values that are not finite." if bad_batch else ""
    if lost:
        causes += (
            f" {len(lost)} parameters or buffers are not finite already ({', '.join(lost[:3])})."
        )
    # (Of a round that stops or is rolled back there is no record.)
    failed = {report.problem: report for report in found.reports if report.failed}
    for report in failed.values():
        causes += (
            f" The engine {report.engine!r} did not converge on problem {report.problem!r}: "
            f"{report.advice}"
        )
    return NonFiniteError(
        f"Round {round_number}, problem {problem.name!r}: its {term} is not finite, so its step "
        f"was not made.{causes} Lower a learning rate, clip gradients, or choose another "
        "on_nonfinite.",
        problem=problem.name,
        round=round_number,
        term=term,
        data={
            "problem": problem.name,
            "round": round_number,
            "update": update,
            "term": term,
            "losses": {player: float(loss) for player, loss in found.losses.items()},
            "gradient_norms": {key: float(tensor.norm()) for key, tensor in found.gradient.items()},
            "nonfinite_tensors": lost,
            "nonfinite_batch": bad_batch,
            "gradient": {
                key: tensor.detach().cpu().clone() for key, tensor in found.gradient.items()
            },
            "batches": [tensor.detach().cpu().clone() for tensor in batches],
            "random": [state.state_dict() for state in found.evaluation.random_states],
        },
    )


def _term(
    problem: Problem,
    found: TotalGradient,
    lowers: Sequence[str],
    gradient: Callable[[frozenset[str]], Tensors],
) -> str:
    """The first part of a total gradient that is not finite.

    The gradient is taken again with fewer and fewer solutions held constant, and the outermost
    problem's is released first. What turns non-finite when a solution is released flows through
    that problem.
    """
    for player, loss in found.losses.items():
        if not _all_finite(loss):
            return f"loss of player {player!r}" if problem.is_game else "loss"
    if all(map(_all_finite, found.gradient.values())):
        return "gradient's norm, which overflows,"
    held = list(lowers)
    part = "direct gradient"
    while True:
        if not all(map(_all_finite, gradient(frozenset(held)).values())):
            return part
        if not held:
            return "total gradient"  # which is finite when it is taken again
        part = f"implicit term through {held.pop()!r}"


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
