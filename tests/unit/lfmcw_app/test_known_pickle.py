"""The unpickler of published files: plain values and listed names, and nothing that they reach."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict
from dataclasses import replace

import pytest

from lfmcw_app.known_pickle import Limits, PickleError, unpickled

ORDERED = {("collections", "OrderedDict"): OrderedDict}


LIMITS = Limits(content=10**6, operations=1000)


def read(content, known=ORDERED, limits=LIMITS, **options):
    return unpickled(io.BytesIO(content), known, limits=limits, **options)


@pytest.mark.parametrize("protocol", range(4, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_listed_names_are_read(protocol):
    held = {"a": [1, 2.5, None, True, "é"], ("x", 3): {1, 2}, "o": OrderedDict(b=b"bytes")}
    assert read(pickle.dumps(held, protocol)) == held


def test_another_name_is_refused_and_said():
    with pytest.raises(PickleError, match=r"it names collections\.OrderedDict"):
        read(pickle.dumps(OrderedDict()), {})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_in_a_pickle_is_not_made(protocol, tmp_path):
    mark = tmp_path / "mark"

    class Calls:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    content = pickle.dumps([Calls()], protocol)
    with pytest.raises(PickleError, match="it names"):
        read(content)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # an unguarded unpickler makes it


def test_no_name_is_reached_through_a_listed_one():
    """Protocol 4 has dotted names; the list is compared with the whole name."""
    dotted = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    assert callable(pickle.loads(dotted))
    with pytest.raises(PickleError, match=r"OrderedDict\.fromkeys"):
        read(dotted)


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1] * 99)[:-20], b"\x80\x7f.", b"(l(i0\nx\n."]
)
def test_damage_ends_in_a_message(content):
    with pytest.raises(PickleError, match=r"\w"):
        read(content)


# ------------------------------ what one file can do to the program

PROTO = b"\x80\x04"


def test_a_memo_of_any_index_takes_no_room():
    """The unpickler in C makes room for all indices below, here 768 million bytes."""
    tracemalloc.start()
    try:
        assert read(PROTO + b"Nr" + struct.pack("<I", 3 << 24) + b".") is None
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("code", [b"}", b"]", b"\x8f", b"(", b"N"])
def test_objects_are_bounded(code):
    many = PROTO + code * 10**5 + b"."
    with pytest.raises(PickleError, match="more operations than any published file"):
        read(many)
    with pytest.raises(PickleError, match="larger than any published file"):
        read(many, limits=Limits(content=10**4, operations=10**6))


def test_the_limits_are_reached_exactly():
    whole = pickle.dumps([1, 2, "x"], 2)
    operations = sum(1 for _ in pickletools.genops(whole))
    fits = Limits(content=len(whole), operations=operations)
    assert read(whole, limits=fits) == [1, 2, "x"]
    for short in (
        replace(fits, content=fits.content - 1),
        replace(fits, operations=operations - 1),
    ):
        with pytest.raises(PickleError, match="than any published file"):
            read(whole, limits=short)


@pytest.mark.parametrize(
    "content",
    [
        b"\x95" + struct.pack("<Q", 2**40) + b"N.",
        b"\x95" + struct.pack("<Q", 10**5) + b"N.",
        b"X" + struct.pack("<I", 2**31) + b"x.",
        b"B" + struct.pack("<I", 10**5) + b"x.",
        b"G1234.",
        b"I12",
    ],
    ids=["huge frame", "frame", "huge text", "bytes", "number", "line"],
)
def test_nothing_is_read_beyond_the_data(content):
    with pytest.raises(PickleError, match=r"ends too early|larger than any"):
        read(PROTO + content)


@pytest.mark.parametrize("code", [b"\x96" + b"\0" * 8, b"\x81", b"\x91", b"i", b"o", b"Q", b"2"])
def test_only_operations_of_plain_values_are_done(code):
    with pytest.raises(PickleError, match="which plain values do not need"):
        read(PROTO + b"](" + code + b".")


def test_a_key_that_takes_long_to_hash_is_refused():
    """Hashing a tuple visits all that it holds, and in C: 500,000 in one another end Python."""
    large = Limits(content=10**6, operations=10**6)
    key = b"\x85" * 500_000
    with pytest.raises(PickleError, match="tuples are longer or deeper"):
        read(PROTO + b"}K\x01" + key + b"Ns.", limits=large)
    with pytest.raises(PickleError, match="tuples are longer or deeper"):
        read(pickle.dumps((0,) * 17))
    with pytest.raises(PickleError, match="tuples are longer or deeper"):
        read(pickle.dumps((((),),)))
    assert read(pickle.dumps({((1,), *range(15)): ()})) == {((1,), *range(15)): ()}


def some_function(value=1):
    return value


class Changed:
    """Has a state that a pickle may set, and a class that it may not."""

    def __setstate__(self, state):
        self.state = state


KNOWN = {("m", "function"): some_function, ("m", "Changed"): Changed}


@pytest.mark.parametrize("name", ["function", "Changed"])
@pytest.mark.parametrize("slots", [False, True])
def test_a_file_changes_nothing_that_outlives_it(name, slots):
    """The state of a function is its attributes, and that of a class would be, too."""
    attributes = b"}\x8c\x0c__defaults__\x8c\x01x\x85s"
    state = b"N" + attributes + b"\x86" if slots else attributes
    content = PROTO + b"cm\n" + name.encode() + b"\n" + state + b"b."
    for states in ((), (Changed,)):
        with pytest.raises(PickleError, match="sets the state of an object that has none"):
            read(content, KNOWN, states=states)
    assert some_function() == 1
    assert not hasattr(Changed, "__defaults__")


def test_objects_of_given_types_get_their_state():
    content = PROTO + b"cm\nChanged\n)RK\x07b."
    assert read(content, KNOWN, states=(Changed,)).state == 7
    with pytest.raises(PickleError, match="sets the state of an object that has none"):
        read(content, KNOWN)


def test_texts_of_python_2_can_stay_bytes():
    assert read(b"S'\\xff'\n.", encoding="bytes") == b"\xff"
