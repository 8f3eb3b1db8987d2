"""A result file is read if its entries have their types, and refused otherwise, by the entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfmcw_app.errors import InputError
from lfmcw_app.result_file import check_complete, read_result

RIGHT = {
    "dataset": "digits", "test_error_percent": 2.5, "test_images": 9, "parameters": 100,
    "multiply_adds_millions": 1.5, "seed": 0, "something": {"new": [1]},
    "genotype": {"normal": [[["skip_connect", 0], ["skip_connect", 1]]]},
    "classes": [{"name": "cat", "images": 0, "error_percent": None}],
    "budget": {"parameters": {"met": True, "actual": 1, "limit": 2.5}},
}  # fmt: skip


def read(tmp_path, **changes):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(RIGHT | changes))
    return read_result(file)


def test_what_a_run_writes_is_read_as_it_stands(tmp_path):
    assert read(tmp_path) == RIGHT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_error_percent": "2"}, "test_error_percent: .* got '2'"),
        ({"test_error_percent": 101}, "test_error_percent"),
        ({"test_error_percent": float("nan")}, "test_error_percent: .*finite"),
        ({"test_error_percent": True}, "test_error_percent"),
        ({"parameters": -1}, "parameters"),
        ({"seed": 1.5}, "seed"),
        ({"genotype": {"normal": [[["skip_connect", -1]]]}}, r"genotype\.normal\.0\.0\.1"),
        ({"genotype": {"normal": [[["skip_connect"]]]}}, r"genotype\.normal\.0\.0"),
        ({"classes": [{"name": "cat"}]}, r"classes\.0\.images"),
        ({"lookup": {"rank": 1}}, r"lookup\.file: field required"),
        ({"budget": {"parameters": 3}}, r"budget\.parameters"),
        ({"changed": [{}]}, r"changed\.0\.key"),
        ({"doubt": []}, "doubt"),
    ],
)
def test_an_entry_of_another_type_is_refused_by_its_name(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, **changes)


def test_a_result_that_lacks_what_is_needed_is_refused():
    check_complete(RIGHT, Path("r.json"), ("seed",))
    with pytest.raises(InputError, match=r"r\.json is damaged: it lacks rank\. Delete it"):
        check_complete(RIGHT, Path("r.json"), ("seed", "rank"))
