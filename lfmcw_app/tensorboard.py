"""Optional event files for TensorBoard: the content of metrics.jsonl, one folder per phase."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lfmcw_app.errors import InputError

__all__ = ["EventFiles", "check_tensorboard"]

GROUPS = ("losses", "metrics", "gradient_norms", "solves", "gradient_terms", "quality")
"""The entries of a line of metrics.jsonl that become scalars."""


def check_tensorboard() -> None:
    """Refuses --tensorboard if it cannot work.

    Raises:
        InputError: if the package tensorboard is not installed.
    """
    if find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard needs the package tensorboard, which is not installed. Install it (pip "
            "install tensorboard, or this package with its extra: pip install -e "
            "'.[tensorboard]'), or drop the option."
        )


class EventFiles:
    """Writes every entry of a run's log as scalars: losses, metrics, gradients and solves.

    Rounds that a resumed run repeats replace those that were written before.

    Args:
        folder: where the event files go, with one folder per phase.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def __call__(self, entry: dict[str, Any]) -> None:
        """Writes one entry."""
        phase, step = entry["phase"], entry["round"]
        # From its first round on, this process's entries replace those of an interrupted one.
        if phase not in self._writers:
            self._writers[phase] = self._make(self._folder / phase, purge_step=step)
        for group in GROUPS:
            for tag, value in _scalars(group, entry.get(group, {})):
                self._writers[phase].add_scalar(tag, value, step)

    def close(self) -> None:
        """Writes what is still pending."""
        for writer in self._writers.values():
            writer.close()


def _scalars(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a tree of mappings and lists, under the path that leads to each."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(f"{tag}/{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _scalars(f"{tag}/{index}", inner)
    elif isinstance(value, int | float):
        yield tag, float(value)
