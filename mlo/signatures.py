"""Which problems a problem's functions read, from the signatures of these functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from mlo.errors import ProblemError


class Signature(NamedTuple):
    """What a function of a problem reads.

    Attributes:
        required: keyword-only arguments without a default: problems that it reads.
        optional: arguments with a default: problems that it reads if they exist.
        ignored: positional arguments that are never passed. The graph refuses any that name a
            problem.
        positional: the number of positional arguments that are passed.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    ignored: tuple[str, ...]
    positional: int

    @property
    def names(self) -> tuple[str, ...]:
        """All problems that it may be called with."""
        return self.required + self.optional


NOTHING_READ = Signature(required=(), optional=(), ignored=(), positional=0)
"""The signature of a function that the problem does not have."""


def problems_read(
    problem: str,
    what: str,
    function: Callable[..., Any],
    *positional_names: str,
    optional: int = 0,
    reads: Sequence[str] | None = None,
) -> Signature:
    """Finds the problems that a function reads in its signature.

    Args:
        problem: the problem, for messages.
        what: what the function is to it: "loss", "after_step" or "settings".
        function: the function.
        positional_names: what its positional arguments are.
        optional: how many of the last ones are optional. It receives only those that have no
            default of their own (`mlo.constraints.simplex` has one for its total).
        reads: problems that are passed to it whatever its signature says (`**problems`).

    Raises:
        ProblemError: if it cannot be called so.
    """
    call = f"{what}({', '.join([*positional_names, '*', 'other', '...'])})"
    try:
        arguments = inspect.signature(_called(function)).parameters.values()
    except (TypeError, ValueError) as error:
        raise ProblemError(
            f"Problem {problem!r}: the signature of its {what} cannot be read ({error}). Wrap it "
            f"in a Python function `def {call}: ...`."
        ) from error

    # Exactly these positional arguments must fit.
    count, fewest = len(positional_names), len(positional_names) - optional
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    variadic = any(a.kind is a.VAR_POSITIONAL for a in arguments)
    required = [a for a in positional if a.default is a.empty]
    if len(required) > count or (len(positional) < fewest and not variadic):
        raise ProblemError(
            f"Problem {problem!r}: its {what} takes the positional arguments "
            f"({', '.join(a.name for a in positional)}), but it is called as {call}: "
            f"{_counted(fewest, count)}, then the problems that it reads, after a *."
        )
    keywords = [a for a in arguments if a.kind is a.KEYWORD_ONLY]
    named = [a.name for a in keywords if a.default is a.empty]
    for argument in arguments:
        if argument.kind is argument.VAR_KEYWORD:
            if reads is None:
                raise ProblemError(
                    f"Problem {problem!r}: its {what} takes **{argument.name}, from which it "
                    "cannot be told what it reads. Name the problems that it reads behind a *"
                    + (", or list them: reads=['task0', 'task1', ...]." if what == "loss" else ".")
                )
            break
    else:
        if unknown := [name for name in reads or () if name not in {a.name for a in keywords}]:
            raise ProblemError(
                f"Problem {problem!r}: reads= names {unknown[0]!r}, which its loss does not take. "
                "Add **problems to its arguments, or the name behind a *."
            )
    return Signature(
        required=tuple(dict.fromkeys([*named, *(reads or ())])),
        optional=tuple(
            a.name for a in keywords if a.default is not a.empty and a.name not in (reads or ())
        ),
        ignored=tuple(a.name for a in positional[count:]),
        positional=count if variadic else max(fewest, len(required)),
    )


def check_new_loss(
    problem: str, loss: Callable[..., Any], reads: Sequence[str], optional: Collection[str]
) -> None:
    """Refuses a loss that cannot be called as the declared one is, which it replaces.

    Args:
        problem: whose loss it is, for messages.
        loss: the new one.
        reads: all problems that the declared loss may be called with.
        optional: those among them that may not exist.

    Raises:
        ProblemError: saying what it lacks.
    """
    needed = [name for name in reads if name not in optional]
    found: TypeError | None = None
    for names in (reads, needed):
        try:
            inspect.signature(loss).bind(None, None, **dict.fromkeys(names))
        except ValueError:
            return  # a built-in function that does not tell its arguments
        except TypeError as error:
            found = error
        else:
            return
    raise ProblemError(
        f"Problem {problem!r} cannot call its new loss ({found}). A loss that replaces the "
        f"declared one reads the same problems: {', '.join(reads) or 'no problem'}. Otherwise make "
        "a new Problem with it, and a new optimizer."
    )


def _counted(fewest: int, most: int) -> str:
    if fewest < most:
        return f"{fewest} or {most} positional arguments"
    return {1: "one positional argument", 2: "two positional arguments"}[most]


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose arguments a call takes: a module passes all of them to its `forward`."""
    if isinstance(function, partial):
        return partial(_called(function.func), *function.args, **function.keywords)
    if isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__:
        return function.forward
    return function
