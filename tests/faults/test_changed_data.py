"""Pictures that change while a run is stopped: it resumes with no others."""

from __future__ import annotations

import json
import shutil

import pytest
from interrupted_runs import outcome
from small_pictures import write, write_classes

from lfmcw_app.errors import DataWarning, InputError

SETTINGS = {
    "data.image_size": 8,
    "data.search_images": None,
    "data.train_images": None,
    "data.test_images": None,
    "evaluation.min_steps": 0,
}
ROUNDS_OF_SEARCH = 6


@pytest.fixture
def pictures(tmp_path):
    write_classes(tmp_path / "pictures", {"cat": 30, "dog": 30})
    return tmp_path / "pictures"


def files_added(folder):
    for index in range(4):
        write(folder / "cat" / f"a{index}.png", seed=index)


def class_renamed(folder):
    (folder / "cat").rename(folder / "zero")


def file_replaced(folder):
    write(folder / "dog" / "001.png", size=(12, 12))


CHANGES = {
    files_added: r"4 images added to class 'cat' \(a0\.png, a1\.png, a2\.png, a3\.png\)",
    class_renamed: "class 'zero' is new, class 'cat' is gone",
    file_replaced: r"1 image of another size in class 'dog' \(001\.png\)",
}


@pytest.mark.parametrize("rounds", [2, ROUNDS_OF_SEARCH + 3, None], ids=["search", "training", ""])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_run_is_not_resumed_on_other_pictures(runs, pictures, tmp_path, change, rounds):
    """Stopped in the search, in the training, or complete; the folder stays as it is."""
    runs.start(tmp_path / "run", die_after=rounds, dataset=f"folder:{pictures}", **SETTINGS)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    change(pictures)
    with pytest.raises(InputError, match=CHANGES[change]):
        runs.resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_pictures_that_are_put_back_or_moved_are_the_same(runs, pictures, tmp_path):
    name = f"folder:{pictures}"
    runs.start(tmp_path / "whole", dataset=name, **SETTINGS)
    runs.start(tmp_path / "run", die_after=8, dataset=name, **SETTINGS)
    class_renamed(pictures)
    with pytest.raises(InputError, match="data have changed"):
        runs.resume(tmp_path / "run")
    (pictures / "zero").rename(pictures / "cat")
    shutil.move(pictures, tmp_path / "elsewhere")
    runs.resume(tmp_path / "run", dataset=f"folder:{tmp_path / 'elsewhere'}")
    whole, resumed = (outcome(tmp_path / run) for run in ("whole", "run"))
    assert whole["metrics.jsonl"] == resumed["metrics.jsonl"]
    assert whole["genotype.json"] == resumed["genotype.json"]


def test_a_folder_without_a_fingerprint_is_warned_of(runs, pictures, tmp_path):
    runs.start(tmp_path / "run", die_after=2, dataset=f"folder:{pictures}", **SETTINGS)
    path = tmp_path / "run" / "dataset.json"
    described = json.loads(path.read_text())
    del described["fingerprint"]
    path.write_text(json.dumps(described))
    with pytest.warns(DataWarning, match="cannot be checked"):
        runs.resume(tmp_path / "run")
    assert "fingerprint" in json.loads(path.read_text())
