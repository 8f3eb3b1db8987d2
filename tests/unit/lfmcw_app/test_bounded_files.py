"""Files that anything may have written: read within bounds, or refused."""

import io
import json
import os
import threading
from pathlib import Path

import pytest

from lfmcw_app.bounded_files import (
    DEEPEST,
    LONGEST_STRING,
    MOST_SECTIONS,
    bytes_of,
    lines_of,
    parse_json,
    read_object,
    text_of,
)


@pytest.mark.parametrize(
    "value",
    [{"a": [1, 2.5, None, True, "text"]}, 1e38, -3, float("inf"), "é" * LONGEST_STRING, []],
    ids=str,
)
def test_what_runs_write_is_read(value):
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "nested too deeply"),
        ("1e300", "beyond 1e"),
        ("[-1" + "0" * 400 + "]", "beyond 1e"),
        (json.dumps("x" * (LONGEST_STRING + 1)), "characters"),
        ('"' + "x" * 2**25 + '"', "more than"),
        ('{"\\ud800": 1}', "surrogates"),
        ("1" + "0" * 5000, "digits|beyond"),
    ],
    ids=["no JSON", "very deep", "deep", "large", "long", "text", "size", "surrogate", "digits"],
)
def test_what_is_beyond_a_bound_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text, printable=True)


def test_halves_of_pairs_are_read_as_names_of_files_have_them():
    assert parse_json('["\\ud800"]') == ["\ud800"]


def test_many_empty_lists_are_refused_before_they_take_memory():
    with pytest.raises(ValueError, match="lists and objects"):
        parse_json("[" + "[]," * MOST_SECTIONS + "[]]")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"c": 1, "d": 2, "c": 3}}]'])
def test_a_key_that_stands_twice_is_refused(text):
    with pytest.raises(ValueError, match=r"the key '[ac]' stands twice"):
        parse_json(text)


def test_a_file_is_read_up_to_its_bound(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    assert bytes_of(file, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        bytes_of(file, 4)
    file.write_bytes(b"a\r\nb\rc\n")
    assert text_of(file) == "a\nb\nc\n"


def test_a_pipe_is_read_only_where_it_may_be_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="a pipe, a socket or a device"):
        bytes_of(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"text",))
    writer.start()
    assert text_of(pipe, pipes=True) == "text"
    writer.join()


def test_a_device_without_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a device"):
        text_of(Path("/dev/zero"))
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        text_of(Path("/dev/zero"), 1000, pipes=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"[]", "a list, not an object"), (b"\xff\xfe{\0}\0", "decode"), (b"\xef\xbb\xbf{}", "BOM")],
)
def test_an_object_is_one_of_a_text_in_utf_8(tmp_path, content, words):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_object(tmp_path / "f")


@pytest.mark.parametrize(
    ("content", "cut", "lines"),
    [
        (b"", True, []),
        (b"ab\n\ncd", False, [b"ab\n", b"\n"]),
        (b"ab\n\ncd", True, [b"ab\n", b"\n", b"cd"]),
        (b"abcdefghijkl\nm\n", False, [b"abcde", b"m\n"]),
        (b"m\nabcdefghijkl", False, [b"m\n"]),
        (b"m\nabcdefghij", True, [b"m\n", b"abcde"]),
    ],
)
def test_of_a_long_line_no_more_than_the_bound_is_held(content, cut, lines):
    assert list(lines_of(io.BytesIO(content), 4, cut=cut)) == lines
