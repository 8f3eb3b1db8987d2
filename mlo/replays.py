"""Compares a loss that is evaluated again with the value that it had.

Derivatives are taken of repeated evaluations, with the same batches, noise and buffers, and other
tensors in the places of the parameters. What else a loss depends on (a Python variable, a tensor
outside the modules, the identity of a parameter) may have changed, and shows in its value only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mlo.errors import ProblemError, warn_user

__all__ = ["Values", "check_replay", "check_stand_ins", "differing"]

Values = Mapping[str, Tensor]
"""Player → loss."""

Evaluate = Callable[[], Values]


def check_replay(
    problem: str, recorded: Values, evaluate: Evaluate, dtypes: Iterable[torch.dtype]
) -> bool:
    """Warns of a loss that has another value when it is evaluated again.

    Args:
        problem: whose loss.
        recorded: its values when its gradient was taken; empty if it was not.
        evaluate: evaluates it again.
        dtypes: those in which it is computed.

    Returns:
        Whether the value was the same.
    """
    dtypes = tuple(dtypes)
    first = evaluate()
    if recorded and differing(recorded, first, dtypes) is None:
        return True
    player = differing(first, second := evaluate(), dtypes)
    if player is not None:
        _warn_of_state(problem, first[player], second[player])
        return False
    player = differing(recorded, first, dtypes)
    if player is None:
        return True
    warn_user(
        f"The loss of problem {problem!r} was {float(recorded[player]):.6g} when the problem "
        f"moved, and is {float(first[player]):.6g} now that it is evaluated again at the same "
        "point to differentiate that step. Something else that it reads has changed meanwhile: a "
        "Python variable (a temperature that a hook or the loop sets), a tensor that is not in "
        "its module, a tensor that is filled again in place, a large frozen parameter. The "
        "derivative is that of another loss. Keep what changes in buffers of the module "
        "(register_buffer), which are recorded with each step, or in the batch."
    )
    return False


def check_stand_ins(
    problem: str,
    found: Values,
    in_place: Evaluate,
    with_stand_ins: Sequence[Evaluate],
    dtypes: Iterable[torch.dtype],
    *,
    calls: int = 1,
) -> bool:
    """Refuses a loss that takes another value if other tensors stand for the parameters.

    A loss that keeps state does so as well, which shows when it is evaluated more than once. It is
    warned of.

    Args:
        problem: whose loss.
        found: its values with tensors of the same values in the parameters' places.
        in_place: evaluates it with the parameters in their places.
        with_stand_ins: evaluate it with others; one does so as `found` was. None are given for a
            loss whose state an evaluation more would move for nothing: both causes are named then.
        dtypes: those in which it is computed.
        calls: how often an evaluation calls the loss.

    Returns:
        Whether the value was the same.

    Raises:
        ProblemError: if the values differ, and each repeats itself.
    """
    dtypes = tuple(dtypes)
    live = in_place()
    player = differing(found, live, dtypes)
    if player is None:
        return True
    if not with_stand_ins:
        times = "once" if calls == 1 else f"{calls} times (once for each batch)"
        warn_user(
            f"The loss of problem {problem!r} is {float(found[player]):.6g} in its first update "
            f"and, evaluated again at the same point, {float(live[player]):.6g}. If it keeps state "
            "between calls (a counter, a running mean, next() of an iterator, a generator of "
            f"random numbers), this check has moved that by calling the loss {times} more than "
            "its updates do, and is not made again. Count outside of the loss, in the loop or in "
            "after_update=, or in a buffer of its module; draw data with data=, and random numbers "
            "from the global random states. If it depends on which tensor objects it gets (id(p), "
            "`p is q`, a set or dict of parameters, optimizer.state[p], requires_grad), its "
            "updates use another loss than you wrote, since other tensors of the same values are "
            "in the places of the parameters that it reads. Tell parameters by name."
        )
        return False
    again = in_place()
    if not torch.equal(again[player], live[player]):
        _warn_of_state(problem, live[player], again[player])
        return False
    if not any(torch.equal(other()[player], found[player]) for other in with_stand_ins):
        _warn_of_state(problem, found[player], live[player])  # a first call that is another one
        return False
    raise ProblemError(
        f"The loss of problem {problem!r} is {float(live[player]):.6g} with the parameters in "
        f"their modules, and {float(found[player]):.6g} with other tensors of the same values in "
        "their places, at which solutions are differentiated. It tells parameters by their "
        "identity (id(p), `p is q`, a set or dict of parameters, optimizer.state[p]) or by "
        "requires_grad. Tell them by name (`for name, p in module.named_parameters()`) or by an "
        "attribute (`p.no_decay = True`), and keep other tensors in buffers."
    )


def _warn_of_state(problem: str, first: Tensor, second: Tensor) -> None:
    """Warns of a loss that is evaluated again by an engine, and keeps state."""
    warn_user(
        f"The loss of problem {problem!r} is {float(first):.6g} and, evaluated again at the same "
        f"point, {float(second):.6g}. It keeps state between calls (a counter, a running mean, "
        "next() of an iterator), or draws random numbers that are not replayed "
        "(numpy.random.default_rng(), a torch.Generator that is not in generators=). Its "
        "derivative would be that of another loss. Keep state in buffers of the module or in "
        "metrics, draw data with data=, and random numbers from the global random states."
    )


def differing(one: Values, other: Values, dtypes: Sequence[torch.dtype]) -> str | None:
    """A player whose losses differ by more than their rounding, or None."""
    # Half of the digits: kernels that do not repeat themselves differ in the last ones.
    for player, value in one.items():
        if player not in other:
            continue
        eps = max(torch.finfo(dtype).eps for dtype in [value.dtype, *dtypes])
        if bool((value - other[player]).abs() > eps**0.5 * value.abs()):
            return player
    return None
