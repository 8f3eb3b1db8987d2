"""What was received, in a message of bounded length."""

from __future__ import annotations

import pytest

from lfmcw_app.errors import InputError, NumbersWarning, shown


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, list(range(10_000)), 10**10_000, {"k": "v" * 999}],
    ids=["text", "list", "integer", "mapping"],
)
def test_whatever_was_received_is_shown_in_a_line(value):
    text = shown(value)
    assert 0 < len(text) < 200
    assert "\n" not in text


def test_a_short_value_is_shown_as_it_is():
    assert shown("a\nb") == r"'a\nb'"
    assert shown([1, None]) == "[1, None]"


def test_an_object_that_cannot_show_itself_is_named():
    class Broken:
        def __repr__(self):
            raise ValueError("no")

    assert "Broken" in shown(Broken())


def test_a_wrong_input_is_a_value_error():
    """A wrong input is a ValueError, and lost numbers are a warning."""
    assert issubclass(InputError, ValueError)
    assert issubclass(NumbersWarning, UserWarning)
