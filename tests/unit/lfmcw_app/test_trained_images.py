"""Which images are recognised as those that a run was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_pictures import write_classes

from lfmcw_app import fingerprint
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.pictures import describe_dataset
from lfmcw_app.prediction import ImageFile
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import EVALUATED
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.trained_images import TrainedImages


def begun(pictures, run, **parts):
    """A run folder that has read a folder of pictures."""
    for part, classes in parts.items():
        write_classes(pictures if part == "whole" else pictures / part, classes)
    recipe = load_recipe("smoke", overrides={"dataset": f"folder:{pictures}"})
    folder = RunFolder.create(run, recipe)
    folder.keep = "metrics"
    describe_dataset(load_dataset(recipe.dataset, image_size=8), folder)
    return folder.path


@pytest.fixture
def places(tmp_path):
    return tmp_path / "pictures", tmp_path / "run"


def held_out(pictures, run):
    """The paths of the pictures that the run was not trained on, in their order."""
    trained = TrainedImages.of(run)
    return [path for path in sorted(pictures.rglob("*.png")) if not trained.holds(path)]


def held_names(run):
    """The names of the test pictures of a run, by class."""
    described = json.loads((run / "dataset.json").read_text("utf-8"))
    parts = described["fingerprint"]["parts"]["test"]
    return {name: sorted(images["files"]) for name, images in parts.items()}


def test_all_but_the_test_pictures_were_trained_on(places):
    pictures, run = places
    begun(pictures, run, whole={"cat": 20, "horse": 9})
    found = held_out(pictures, run)
    by_class = {
        name: [path.name for path in found if path.parent.name == name] for name in ("cat", "horse")
    }
    assert by_class == held_names(run)
    assert 0 < len(found) < 29


def test_contents_decide_and_not_names(places, tmp_path):
    pictures, run = places
    begun(pictures, run, train={"cat": 4, "horse": 4}, test={"bird": 0, "cat": 1, "horse": 1})
    trained = TrainedImages.of(run)
    copy = shutil.copy(pictures / "train" / "cat" / "000.png", tmp_path / "other.png")
    assert trained.holds(Path(copy))
    other = tmp_path / "new" / "cat" / "001.png"
    other.parent.mkdir(parents=True)
    content = bytearray((pictures / "train" / "cat" / "001.png").read_bytes())
    content[-20] ^= 1  # of the same name and size
    other.write_bytes(content)
    assert not trained.holds(other)


def test_without_the_pictures_names_and_sizes_decide(places, tmp_path):
    pictures, run = places
    begun(pictures, run, whole={"cat": 20, "horse": 9})
    before = [path.relative_to(pictures) for path in held_out(pictures, run)]
    moved = pictures.rename(tmp_path / "moved")
    assert TrainedImages.of(run).folder is None
    assert [path.relative_to(moved) for path in held_out(moved, run)] == before


def test_moved_pictures_are_found_however_accents_are_written(places, tmp_path):
    """Some systems write é as e with an accent, also in a copy elsewhere."""
    pictures, run = places
    begun(pictures, run, train={"été": 2, "horse": 2}, test={"été": 1, "horse": 1})
    moved = pictures.rename(tmp_path / "moved")
    decomposed = (moved / "train" / "été").rename(moved / "train" / "e\u0301te\u0301")
    assert all(TrainedImages.of(run).holds(path) for path in decomposed.iterdir())


def test_pictures_that_chose_the_cell_are_not_held_out(places):
    """A search saw them; the evaluation of a given cell did not."""
    pictures, run = places
    parts = {part: {"cat": 3, "horse": 3} for part in ("train", "val", "test")}
    for seed, part in enumerate(parts):
        write_classes(pictures / part, {"cat": 3, "horse": 3}, size=(8, 8 + seed))
    begun(pictures, run)
    searched = {path.parts[-3] for path in held_out(pictures, run)}
    (run / EVALUATED).write_text("{}")
    evaluated = {path.parts[-3] for path in held_out(pictures, run)}
    assert (searched, evaluated) == ({"test"}, {"val", "test"})


def test_names_that_are_not_kept_are_listed_again(places, monkeypatch):
    pictures, run = places
    monkeypatch.setattr(fingerprint, "MOST_LETTERS", 0)
    begun(pictures, run, whole={"cat": 20, "horse": 9})
    assert 0 < len(held_out(pictures, run)) < 29
    write_classes(pictures, {"cat": 21})
    with pytest.raises(InputError, match="no longer as it was"):
        TrainedImages.of(run)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (None, "no dataset.json"),
        ({"name": "folder:x", "path": "/x", "fingerprint": {"parts": 3}}, "no dataset.json"),
        ({"name": "digits", "fingerprint": {"parts": {}, "digest": "1"}}, "trained on digits"),
    ],
)
def test_what_cannot_be_told_is_an_error(described, said, tmp_path):
    if described is not None:
        (tmp_path / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=said):
        TrainedImages.of(tmp_path)


def test_a_folder_that_is_no_data_set_any_more_is_told_by_names(places):
    pictures, run = places
    begun(pictures, run, whole={"cat": 20, "horse": 9})
    before = held_out(pictures, run)
    (pictures / "empty").mkdir()  # a class without images
    assert held_out(pictures, run) == before


def test_images_are_marked_one_by_one(places, tmp_path):
    pictures, run = places
    begun(pictures, run, train={"cat": 4, "horse": 4}, test={"cat": 1, "horse": 1})
    new = tmp_path / "new.png"
    new.write_bytes(b"other contents")
    images = [ImageFile(path=path) for path in (pictures / "train/cat/000.png", new, tmp_path)]
    marked = TrainedImages.of(run).marked(images)
    assert [image.trained_on for image in marked] == [True, False, False]
