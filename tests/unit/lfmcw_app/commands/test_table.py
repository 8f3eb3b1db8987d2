"""The command line of a table. Tables are tried in tests/integration."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from lfmcw_app.commands.table import table


def test_an_unknown_table_is_answered_with_its_nearest_name():
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(table)
    result = CliRunner().invoke(app, ["tabel2"])
    assert result.exit_code == 2
    assert "Did you mean 'table2'" in result.output
