"""Commands whose `--help` shows a flag by its name alone, and wraps paragraphs as a whole."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from lfmcw_app.commands.usage_errors import UsageError, clarify

__all__ = ["command_line"]


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        """The arguments and options, the command's own and those that Typer adds."""
        return _without_types_of_flags(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the arguments; an error says what was received and what was meant."""
        given = list(args)  # the parser takes from it
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            clarify(error, self.get_params(ctx), given)
            raise


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        """As for a command."""
        return _without_types_of_flags(super().get_params(ctx))


def _without_types_of_flags(params: list[Any]) -> list[Any]:
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag:
            param.metavar = ""  # what follows the name: a flag takes no value
    return params


def _paragraphs(command: Callable[..., None]) -> str:
    """The docstring with each paragraph on one line, which is wrapped where it is shown."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")


def command_line(
    commands: Sequence[Callable[..., None]], *, help: str | None = None
) -> typer.Typer:
    """Makes the command line of one function, or of several by their names.

    Without arguments the command line of several prints its help.

    Args:
        commands: what is run.
        help: about several; the help of one is its docstring.
    """
    app = typer.Typer(
        cls=_Group, help=help, no_args_is_help=len(commands) > 1, pretty_exceptions_enable=False
    )
    for command in commands:
        app.command(cls=_Command, help=_paragraphs(command))(command)
    return app
