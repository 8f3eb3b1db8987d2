"""When to make a costly check: at once, or at its occasions 1, 2, 4, 8, …."""

from __future__ import annotations

__all__ = ["CheckSchedule", "NoChecks", "is_power_of_two"]


def is_power_of_two(occasion: int) -> bool:
    """Whether an occasion, counted from 1, is one of 1, 2, 4, 8, …"""
    return occasion & (occasion - 1) == 0


class CheckSchedule:
    """Counts the occasions of checks by name."""

    def __init__(self) -> None:
        self._occasions: dict[str, int] = {}
        self._dismissed: set[str] = set()

    def is_due(self, check: str, *, once: bool = False) -> bool:
        """Counts an occasion of a check, and says whether to make it.

        Args:
            check: its name.
            once: whether it is made at the first occasion only; otherwise at 1, 2, 4, 8, …
        """
        occasion = self._occasions[check] = self._occasions.get(check, 0) + 1
        if check in self._dismissed or (once and occasion > 1):
            return False
        return is_power_of_two(occasion)

    def was_noted(self, check: str) -> bool:
        """Whether the check has had an occasion yet, or needs none."""
        return check in self._occasions or check in self._dismissed

    def dismiss(self, *checks: str) -> None:
        """Stops checks, since they have said everything."""
        self._dismissed.update(checks)

    def was_dismissed(self, check: str) -> bool:
        """Whether the check is made no more."""
        return check in self._dismissed


class NoChecks(CheckSchedule):
    """Makes no check: all were made, or there are no numbers to look at (the meta device)."""

    def is_due(self, check: str, *, once: bool = False) -> bool:
        """No."""
        return False

    def was_noted(self, check: str) -> bool:
        """As if it had been made."""
        return True

    def was_dismissed(self, check: str) -> bool:
        """Yes."""
        return True
