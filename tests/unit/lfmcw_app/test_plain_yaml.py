"""YAML that is read: one meaning or none."""

from __future__ import annotations

import math

import pytest

from lfmcw_app.plain_yaml import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("search: {channels: 4}\nseed: 1\nsearch: {layers: 3}", ("line 3", "line 1")),
        ("search:\n  layers: 3\n  nodes: 2\n  layers: 4", ("line 4", "line 2")),
        ("{a: 1, b: 2, a: 3}", ("line 1", "line 1")),
        ("seed: 1\n'seed': 2", ("line 2", "line 1")),
        ("seed: 1\n!!str seed: 2", ("line 2", "line 1")),
        ("a: {b: 1}\nc: {<<: {b: 2},\n <<: {b: 3}}", ("line 3", "line 2")),
    ],
)
def test_a_key_that_stands_twice_is_refused(text, lines):
    with pytest.raises(ValueError, match=f"^{lines[0]}: the key .* in {lines[1]};"):
        parse_yaml(text)


def test_a_merged_key_may_be_overridden():
    text = "base: &base {lr: 0.1, momentum: 0.9}\nw: &w {<<: *base, lr: 0.2}\nv: {<<: *w, lr: 0.3}"
    tree = parse_yaml(text)
    assert tree["w"] == {"lr": 0.2, "momentum": 0.9}
    assert tree["v"] == {"lr": 0.3, "momentum": 0.9}


@pytest.mark.parametrize(
    "value",
    ["010", "-010", "00", "0_8", "0o17", "0b11", "1:30", "190:20:30.15", "yes", "No", "ON", "off"],
)
def test_what_yaml_versions_read_differently_is_refused(value):
    with pytest.raises(ValueError, match=rf"^line 2: {value} is .* some readers of YAML"):
        parse_yaml(f"a: 1\nb: {value}")
    assert parse_yaml(f"b: '{value}'") == {"b": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1.0e-3", 0.001), ("2E+4", 20000.0), (".5", 0.5), ("1.", 1.0),
        ("-0.5", -0.5), ("007.5", 7.5), ("0x10", 16), ("0", 0), ("-12", -12), ("1_000", 1000),
        (".inf", math.inf), ("true", True), ("FALSE", False), ("~", None), ("null", None),
        ("2024-01-01", "2024-01-01"), ("'8'", "8"), ("1_0", "1_0"), ("y", "y"), ("=", "="),
        ("folder:a", "folder:a"), ("None", "None"), ("!!str 010", "010"),
    ],
)  # fmt: skip
def test_what_has_one_meaning_is_read(text, value):
    found = parse_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["1: 2", "~: 2", "true: 2", "? [a]\n: 2", "? {a: 1}\n: 2"])
def test_a_key_that_is_not_text_is_refused(text):
    with pytest.raises(ValueError, match=r"^line 1: a key must be text"):
        parse_yaml(text)


@pytest.mark.parametrize(
    "text",
    ["[", "a: 1\n---\nb: 2", "\x00", "!!python/object:os.system a", "!!timestamp 2020-13-45",
     "a: " + 5000 * "9", 3000 * "["],
)  # fmt: skip
def test_what_is_not_yaml_is_refused(text):
    with pytest.raises(ValueError, match=r"^it is not valid YAML"):
        parse_yaml(text)


def test_what_is_written_is_read_back():
    texts = ["yes", "010", "1e-3", "1:30", "0o17", "0x10", "null", "", "<<", "2024-01-01", "1_000",
             "true", ".inf", "x: y", "# a", "häß 猫", "None", "1.", "-", "0b1", "off"]  # fmt: skip
    data = {"texts": texts, "off": [1e-5, 1e20, 0.1, 3.0, 10**20, -1, None, True, math.inf]}
    assert parse_yaml(dump_yaml(data)) == data


def test_what_aliases_blow_up_is_refused_before_it_is_made():
    """Nine copies of nine copies, 15 times: by merges they would be made, by lists walked."""
    for inside in ("{<<: [%s]}", "[%s]"):
        lines = ["a: &a {x: 1}"]
        for before, name in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True):
            lines.append(f"{name}: &{name} " + inside % ", ".join([f"*{before}"] * 9))
        with pytest.raises(ValueError, match=r"line \d+: with its aliases it holds over 200,000"):
            parse_yaml("\n".join(lines))
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\n")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize("text", ["a: &a [*a]", "&a {b: {c: *a}}", "a: &a {<<: *a}"])
def test_what_holds_itself_is_refused(text):
    with pytest.raises(ValueError, match=r"line 1: \*a stands within what it repeats"):
        parse_yaml(text)


def test_a_text_beyond_any_recipe_is_refused():
    with pytest.raises(ValueError, match="more than 1,048,576 characters"):
        parse_yaml("#" * 2**21)
