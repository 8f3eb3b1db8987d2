"""Lines are printed as they are."""

from __future__ import annotations

import io

from rich.console import Console

from lfmcw_app.printing import say


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
