"""The unpickler of published files: plain values and listed names, and nothing that they reach."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict

import pytest

from lfmcw_app.known_pickle import PickleError, unpickled

ORDERED = {("collections", "OrderedDict"): OrderedDict}


def read(content, known=ORDERED, **options):
    return unpickled(io.BytesIO(content), known, **options)


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


def test_texts_of_python_2_can_stay_bytes():
    assert read(b"S'\\xff'\n.", encoding="bytes") == b"\xff"
