"""JSON from files that anything may have written."""

import json

import pytest

from lfmcw_app.report.bounded import DEEPEST, LONGEST_STRING, parse_bounded


@pytest.mark.parametrize(
    "value",
    [{"a": [1, 2.5, None, True, "text"]}, 1e38, -3, float("inf"), "é" * LONGEST_STRING, []],
    ids=str,
)
def test_what_runs_write_is_read(value):
    assert parse_bounded(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "nested too deeply"),
        ("1e300", "beyond 1e"),
        ("[-1" + "0" * 400 + "]", "beyond 1e"),
        (json.dumps("x" * (LONGEST_STRING + 1)), "characters"),
        ('"' + "x" * 2**25 + '"', "more than a report reads"),
        ('{"\\ud800": 1}', "surrogates"),
        ("1" + "0" * 5000, "digits|beyond"),
    ],
    ids=["no JSON", "very deep", "deep", "large", "long", "text", "size", "surrogate", "digits"],
)
def test_what_is_beyond_a_bound_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_bounded(text)
