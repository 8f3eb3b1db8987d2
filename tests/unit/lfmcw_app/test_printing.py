"""Lines are printed as they are."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from lfmcw_app.printing import print_table, say


def test_a_line_is_printed_as_it_is():
    """A path can be copied: it is not broken, and [red] in it is no colour."""
    console = Console(file=io.StringIO(), width=20, force_terminal=True)
    text = "runs/[red]a name that is longer than the line[/red]/12.png"
    say(console, text)
    assert console.file.getvalue() == f"{text}\n"


def test_a_quiet_console_shows_nothing():
    console = Console(file=io.StringIO(), quiet=True)
    say(console, "a line")
    assert console.file.getvalue() == ""


def test_no_character_steers_a_terminal():
    """Names of files may hold escape sequences, and others turn the direction of writing."""
    console = Console(file=io.StringIO())
    say(console, "a\x1b[2J\x9b31m\u202egpj.exe\r\x7f\nline é 日本 👩\u200d🔬")
    shown = "\N{REPLACEMENT CHARACTER}"
    assert console.file.getvalue() == (
        f"a{shown}[2J{shown}31m{shown}gpj.exe{shown}{shown}\nline é 日本 👩\u200d🔬\n"
    )


def test_only_a_terminal_wraps_a_table():
    """A file has each row on one line, and the console keeps its width."""
    table = Table("name")
    table.add_row("word " * 30 + "end")
    lines = {}
    for terminal in (False, True):
        console = Console(file=io.StringIO(), width=40, force_terminal=terminal)
        print_table(console, table)
        assert console.width == 40
        lines[terminal] = console.file.getvalue().splitlines()
    assert any("word " * 30 + "end" in line for line in lines[False])
    assert max(map(len, lines[True])) < 100
    assert len(lines[True]) > len(lines[False])
