"""Whatever stands in a file of a run or a table: a value, or an error for a user that names it."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from read_targets import ERRORS, TARGETS, Folder, edited, places, seeds

some = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, 10**400, -1, 2**63, 1e308, -0.0])
    | st.floats()
    | st.text(max_size=12)
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)

NASTY = {
    "nothing": b"",
    "deep lists": b"[" * 10_000 + b"]" * 10_000,
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep lists in a line": b'{"key": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
    "infinity": b'{"test_error_percent": 1e400, "seconds": 1e400, "round": 1e400}\n',
    "NaN": b'{"test_error_percent": NaN, "seconds": NaN, "round": NaN}\n',
    "digits": b'{"seed": ' + b"9" * 10_000 + b"}\n",
    "a long text": b'{"phase": "' + b"x" * 100_000 + b'"}\n',
    "zero bytes": b"\0" * 1000,
    "a byte-order mark": b"\xef\xbb\xbf{}\n",
    "UTF-16": '{"seed": 1}\n'.encode("utf-16"),
    "no UTF-8": b"\xff\xfe\xfd\n",
    "half a surrogate pair": b'{"phase": "\\ud800"}\n',
    "a key that stands twice": b'{"seed": 1, "seed": 2}\n',
    "ragged lists": b'{"normal": [[["none", 0], ["none"]], []], "reduction": [[]]}\n',
    "truth values": b'{"test_error_percent": true, "round": true, "seconds": false}\n',
    "wrong kinds": b'{"key": [], "old": {}, "new": 1, "phase": 3, "round": "x"}\n',
    "a list": b"[]\n",
    "a number": b"3\n",
    "quotes that do not end": b'table,arm\n"' + b"x" * 200_000,
    "aliases of aliases": b"a: &a {x: 1, y: 2}\n"
    + b"".join(
        b"%c: &%c {<<: [%s]}\n" % (name + 1, name + 1, b", ".join([b"*%c" % name] * 9))
        for name in range(ord("a"), ord("p"))
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("readers"))


def read(folder, name, data):
    """What a reader makes of bytes; None for an error of bounded length that names a file."""
    try:
        return TARGETS[name](folder, data)
    except ERRORS as error:
        said = str(error)
        assert len(said) < 2500
        # (A recipe is made of a file and of options; a message names the key.)
        named = name in ("state of a run", "recipe") or str(folder.above) in said
        assert named, said
        return None


@pytest.mark.parametrize("name", TARGETS)
def test_nasty_files_are_read_or_refused(folder, name):
    for data in NASTY.values():
        read(folder, name, data)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "network.pt"])
@some
@given(data=st.data())
def test_files_of_any_json_are_read_or_refused(folder, name, data):
    read(folder, name, json.dumps(data.draw(trees)).encode() + b"\n")


@pytest.mark.parametrize("name", TARGETS)
@some
@given(data=st.binary(max_size=300))
def test_files_of_any_bytes_are_read_or_refused(folder, name, data):
    read(folder, name, data)


OF_JSON = sorted(name for name in TARGETS if name.endswith((".json", ".jsonl")))


@pytest.mark.parametrize("name", OF_JSON)
@some
@given(data=st.data())
def test_one_entry_of_a_right_file_may_be_anything(folder, name, data):
    text = seeds(folder).get(name, [b"{}"])[0]
    entry = json.loads(text.splitlines()[0] if name.endswith("l") else text)
    if entry:
        path = data.draw(st.sampled_from(list(places(entry))))
        entry = edited(entry, path, data.draw(trees))
    read(folder, name, json.dumps(entry).encode() + b"\n")


@pytest.mark.parametrize(
    "name", [name for name in TARGETS if name not in ("network.pt", "runs.csv", "search.json")]
)
def test_the_readers_take_what_is_right(folder, name):
    for data in seeds(folder)[name]:
        if name != "state of a run":  # these are edits
            TARGETS[name](folder, data)
