"""Which engines would work for a problem in place of its own, for advice that can be followed."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

__all__ = ["EXACT", "SOBA_FIRST", "WITHOUT_STEPS", "EngineAdvice"]

EXACT = ("one_step", "direct")
"""Engines to advise whose products are exact."""

WITHOUT_STEPS = ("cg", "gmres", "neumann")
"""Engines to advise that differentiate no step of an optimizer."""

SOBA_FIRST = ("soba", *WITHOUT_STEPS)
"""The same, with the one that corrects its products by estimators first."""

LOOKING: ContextVar[bool] = ContextVar("LOOKING", default=False)
"""Whether an engine is only being tried: the refusal that this may cause needs no advice."""


def _any_engine(name: str) -> bool:
    """Whether an engine works for a problem of which nothing else is known."""
    return True


@dataclass(frozen=True, kw_only=True)
class EngineAdvice:
    """Names engines in messages on one problem: only such as the library would accept there.

    Attributes:
        serves: whether an engine, given by its name, could differentiate the problem's solution.
        find_third: finds `third`.
        find_other: problem → advice on its engine, in the same run.
    """

    serves: Callable[[str], bool] = _any_engine
    find_third: Callable[[], str] = str
    find_other: Callable[[str], EngineAdvice] | None = None

    @cached_property
    def third(self) -> str:
        """What takes third derivatives of the problem's loss, in words; empty: nothing does."""
        return self.find_third()

    def on(self, other: str) -> EngineAdvice:
        """Advice on the engine of another problem, in the same run."""
        return self.find_other(other) if self.find_other else EngineAdvice()

    def phrase(self, text: str, *names: str) -> str:
        """The text with the engines that would work in place of its `{}`; empty if none would.

        Args:
            text: a part of a message, such as ", or use {}".
            names: of engines, the best one first.
        """
        if LOOKING.get():
            return ""
        token = LOOKING.set(True)
        try:
            quoted = [repr(name) for name in names if self.serves(name)]
        finally:
            LOOKING.reset(token)
        if not quoted:
            return ""
        *first, last = quoted
        return text.format(f"{', '.join(first)} or {last}" if first else last)
