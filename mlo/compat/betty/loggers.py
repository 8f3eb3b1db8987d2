"""Betty's loggers: lines on the terminal, and numbers for TensorBoard or Weights & Biases."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from torch import Tensor

from mlo.errors import ConfigurationError, check_choice

__all__ = ["LoggerBase", "TensorBoardLogger", "WandBLogger", "log_from_loss_dict", "logger"]


def logger(logger_type: str = "none") -> LoggerBase:
    """Makes a logger.

    Raises:
        ConfigurationError: if its package is not installed.
    """
    check_choice("logger_type", logger_type, LOGGERS)
    return LOGGERS[logger_type]()


class LoggerBase:
    """Writes lines to standard output, and numbers nowhere."""

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        """Takes numbers for a picture.

        Args:
            stats: name → number, tensor of one element, or a list or tuple of these.
            tag: what they are of; it comes before their names.
            step: when they were taken.
        """

    def debug(self, message: str) -> None:
        """Writes a line that is shown when debugging."""
        _terminal().debug(message)

    def info(self, message: str) -> None:
        """Writes a line."""
        _terminal().info(message)

    def warning(self, message: str) -> None:
        """Writes a warning."""
        _terminal().warning(message)

    def error(self, message: str) -> None:
        """Writes an error."""
        _terminal().error(message)


class TensorBoardLogger(LoggerBase):
    """Also writes the numbers to `betty_tensorboard/`, for TensorBoard."""

    def __init__(self) -> None:
        tensorboard = _imported("torch.utils.tensorboard", "tensorboard")
        when = datetime.now().strftime("%b%d_%H-%M-%S")
        folder = os.path.join("betty_tensorboard", f"{when}_{socket.gethostname()}")
        self.writer = tensorboard.SummaryWriter(log_dir=folder)

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        """See `LoggerBase.log`."""
        for name, number in _numbers(stats, tag):
            self.writer.add_scalar(name, number, step)
        self.writer.flush()


class WandBLogger(LoggerBase):
    """Also sends the numbers to Weights & Biases, as project `betty`."""

    def __init__(self) -> None:
        self._wandb = _imported("wandb", "wandb")
        if self._wandb.run is None:
            self._wandb.init(project="betty")

    def log(
        self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None
    ) -> None:
        """See `LoggerBase.log`."""
        self._wandb.log({**dict(_numbers(stats, tag)), "global_step": step})


LOGGERS: dict[str, type[LoggerBase]] = {
    "none": LoggerBase,
    "tensorboard": TensorBoardLogger,
    "wandb": WandBLogger,
}


def log_from_loss_dict(loss_dict: Mapping[str, Any]) -> str:
    """One line of numbers, as Betty writes it: `loss: 0.5 || acc: 81.0`."""
    return " || ".join(f"{name}: {number}" for name, number in _numbers(loss_dict, None))


def _numbers(stats: Mapping[str, Any], tag: str | None) -> Iterator[tuple[str, Any]]:
    prefix = "" if tag is None else f"{tag}/"
    for name, value in stats.items():
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for index, entry in enumerate(value):
                yield f"{prefix}{name}_{index}", _number(entry)
        else:
            yield f"{prefix}{name}", _number(value)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"logger_type={extra!r} needs the package {extra}, which cannot be imported ({error}). "
            f"Run: pip install 'torch-mlo[{extra}]'; or use logger_type='none'."
        ) from error


class _StandardOutput(logging.Handler):
    """Writes to what is `sys.stdout` at the time of a line (a notebook exchanges it)."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        print(self.format(record), file=sys.stdout)


def _terminal() -> logging.Logger:
    """The logger `mlo.compat.betty`, which writes to standard output unless it was set up."""
    found = logging.getLogger("mlo.compat.betty")
    if not found.handlers:
        handler = _StandardOutput()
        handler.setFormatter(
            logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        found.addHandler(handler)
        found.propagate = False
        if found.level == logging.NOTSET:
            found.setLevel(logging.INFO)
    return found
