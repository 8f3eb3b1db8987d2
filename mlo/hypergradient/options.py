"""Options of engines, which declare their ranges where they declare their defaults.

`AbstractEngine` runs the check of every option when an engine is made. So a wrong value is refused
before the first step, and the message names the engine, the option and the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from mlo.errors import EngineError

__all__ = ["count", "flag_or_auto", "number", "number_or_auto", "scheduled_number"]

AUTO = "auto"
LOWER = "lower"


def count(default: int, *, at_least: int = 1) -> Any:
    """An integer with a smallest value.

    Args:
        default: the value where none is given.
        at_least: the smallest value.
    """

    def check(engine: str, option: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise EngineError(
                f"Engine {engine!r}: {option} must be an integer of at least {at_least}, got "
                f"{value!r}."
            )

    return _option(default, check)


def number(default: float, *, positive: bool = False) -> Any:
    """A number that is not negative.

    Args:
        default: the value where none is given.
        positive: whether zero is refused too.
    """

    def check(engine: str, option: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise EngineError(
                f"Engine {engine!r}: {option} must be a number, got {value!r}.{_yaml_hint(value)}"
            )
        if not (value > 0.0 if positive else value >= 0.0):
            wanted = "be positive" if positive else "not be negative"
            raise EngineError(f"Engine {engine!r}: {option} must {wanted}, got {value!r}.")

    return _option(default, check)


def number_or_auto(default: float | str = AUTO) -> Any:
    """A positive number, or "auto".

    Args:
        default: the value where none is given.
    """

    def check(engine: str, option: str, value: object) -> None:
        if value != AUTO and not _is_positive(value):
            raise EngineError(
                f"Engine {engine!r}: {option} must be 'auto' or a positive number, got "
                f"{value!r}.{_yaml_hint(value)}"
            )

    return _option(default, check)


def flag_or_auto(default: bool | str = AUTO) -> Any:
    """True, False or "auto".

    Args:
        default: the value where none is given.
    """

    def check(engine: str, option: str, value: object) -> None:
        if not isinstance(value, bool) and value != AUTO:
            raise EngineError(
                f"Engine {engine!r}: {option} must be true, false or 'auto', got {value!r}."
            )

    return _option(default, check)


def scheduled_number(default: float | str = AUTO) -> Any:
    """A positive number, "auto", "lower", or a function of the number of updates.

    Args:
        default: the value where none is given.
    """

    def check(engine: str, option: str, value: object) -> None:
        if not (callable(value) or value in (AUTO, LOWER) or _is_positive(value)):
            raise EngineError(
                f"Engine {engine!r}: {option} must be 'auto', 'lower', a positive number or a "
                f"function of the number of updates, got {value!r}.{_yaml_hint(value)}"
            )

    return _option(default, check)


def _is_positive(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value > 0.0  # type: ignore[operator]  # it is a number


def _yaml_hint(value: object) -> str:
    return " YAML reads 1e-3 as text: write 1.0e-3." if isinstance(value, str) else ""


def _option(default: Any, check: Callable[[str, str, object], None]) -> Any:
    # `Any`, as dataclasses.field itself: the annotation of the class says the type.
    return field(default=default, metadata={"check": check})
