"""Commands in the process of a worker. Whole runs are tried in tests/integration."""

from __future__ import annotations

import sys

import pytest

from lfmcw_app.worker import exit_code


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of a text; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(text):
        (tmp_path / "job_to_do.py").write_text(text)
        return "job_to_do"

    return make


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('it is wrong')", 1),
        ("raise KeyboardInterrupt", 130),
        ("raise ValueError('it is a bug')", 1),
        ("import no_such_module", 1),
    ],
)
def test_a_command_ends_with_the_code_of_its_own_process(text, code, module, capsys):
    assert exit_code(["-m", module(text)]) == code
    errors = capsys.readouterr().err
    assert ("it is wrong" in errors) == ("wrong" in text)
    assert ("Traceback" in errors) == ("bug" in text or "no_such" in text)


def test_a_command_has_its_own_arguments_and_is_the_main_one(module, capsys):
    before = list(sys.argv)
    name = module("import sys; print(sys.argv[1:], __name__)")
    assert exit_code(["-m", name, "a", "b"]) == 0
    assert capsys.readouterr().out == "['a', 'b'] __main__\n"
    assert sys.argv == before


def test_a_command_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="-m MODULE"):
        exit_code(["-c", "print()"])
