"""The command line of a table. Tables are tried in tests/integration."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from lfmcw_app.commands.table import table
from lfmcw_app.errors import InputError


def test_an_unknown_table_is_answered_with_its_nearest_name():
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(table)
    result = CliRunner().invoke(app, ["tabel2"])
    assert result.exit_code == 2
    assert "Did you mean 'table2'" in result.output


def test_a_generator_that_does_not_fit_is_refused_before_any_run(tmp_path, monkeypatch):
    checked = []

    def refuses(recipe, dataset):
        checked.append((recipe.seed, dataset.name))
        raise InputError("it has seen D_val")

    monkeypatch.setattr("lfmcw_app.table_plan.check_generator_fits", refuses)
    monkeypatch.setattr("lfmcw_app.commands.table.sweep", lambda *_, **__: iter(()))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(table)
    places = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    result = CliRunner().invoke(app, ["table2", "digits", "--preset=smoke", *places])
    assert result.exit_code == 2
    assert "it has seen D_val" in result.output
    assert checked == [(0, "digits")]
    assert list(tmp_path.iterdir()) == []
