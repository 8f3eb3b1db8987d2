"""Predictions: of all images that can be read, and as the network makes them one by one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from small_pictures import write

from lfmcw_app.classifier import load_network
from lfmcw_app.errors import InputError
from lfmcw_app.prediction import ImageFile, Prediction, Predictions, find_images, predict

NAMES = ("cat", "dog", "été")


def test_images_are_found_with_their_classes(tmp_path):
    """On every level, under the folder of a class; those of other folders have none."""
    for name in ("dog/a.png", "test/cat/b.png", "test/cat/deep/c.PNG", "other/d.png", "e.png"):
        write(tmp_path / name)
    write(tmp_path / "e\u0301te\u0301" / "f.png")  # as some systems write the name
    (tmp_path / "dog" / "notes.txt").write_text("notes")
    (tmp_path / "dog" / ".hidden.png").write_text("")
    found = find_images([tmp_path], NAMES)
    labels = {str(image.path.relative_to(tmp_path)): image.label for image in found.images}
    decomposed = "e\u0301te\u0301/f.png"
    assert labels == {
        "dog/a.png": 1, "test/cat/b.png": 0, "test/cat/deep/c.PNG": 0, "other/d.png": None,
        "e.png": None, decomposed: 2,
    }  # fmt: skip
    assert found.skipped == {".txt": 1, "hidden": 1}


def test_a_class_is_found_however_a_script_has_written_it(tmp_path):
    write(tmp_path / "été" / "a.png")
    (image,) = find_images([tmp_path], ("cat", "e\u0301te\u0301")).images
    assert image.label == 1


def test_an_image_that_is_named_twice_counts_once(tmp_path):
    write(tmp_path / "cat" / "a.png")
    (tmp_path / "b.data").write_bytes((tmp_path / "cat" / "a.png").read_bytes())
    found = find_images([tmp_path / "b.data", tmp_path / "cat" / "a.png", tmp_path], NAMES)
    assert [image.path.name for image in found.images] == ["b.data", "a.png"]


def test_an_image_has_the_class_that_any_of_its_names_tells(tmp_path, monkeypatch):
    for name in ("cat/a.png", "cat/b.png", "dog/a.png"):
        write(tmp_path / "data" / name)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    os.link(tmp_path / "data" / "dog" / "a.png", tmp_path / "hard.png")
    monkeypatch.chdir(tmp_path)
    names = ["hard.png", "data/cat", "data/cat/a.png", "data", "link", str(tmp_path / "data")]
    for sources in (names, names[::-1]):
        found = find_images(list(map(Path, sources)), NAMES)
        assert sorted(image.label for image in found.images) == [0, 0, 1]
        assert found.ambiguous == ()


def test_an_image_in_two_classes_has_none_and_is_named(tmp_path):
    for name in ("cat/a.png", "dog/b.png"):
        write(tmp_path / name)
    (tmp_path / "dog" / "a.png").symlink_to(tmp_path / "cat" / "a.png")
    found = find_images([tmp_path, tmp_path], NAMES)
    labels = {image.path.name: image.label for image in found.images}
    assert labels == {"a.png": None, "b.png": 1}
    assert [path.name for path in found.ambiguous] == ["a.png"]


def test_what_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(InputError, match=r"a\.png, .*b\.png"):
        find_images([tmp_path / "a.png", tmp_path, tmp_path / "b.png"], NAMES)
    with pytest.raises(InputError, match="There are no images in"):
        find_images([tmp_path], NAMES)
    with pytest.raises(InputError, match=r"\*\.png\. A pattern in quotes stays as it is"):
        find_images([tmp_path / "*.png"], NAMES)
    with pytest.raises(InputError, match=r"no file or folder -\. .* standard input give --list -"):
        find_images([Path("-")], NAMES)


@pytest.fixture
def loaded(trained):
    return load_network(trained.path)


@torch.no_grad()
def test_predictions_are_the_networks_softmax(trained, loaded):
    """In batches of any size, in the order of the images."""
    network, preprocess, names = loaded
    images = find_images([trained.pictures], names).images
    assert len(images) == 39
    all_at_once = predict(network, preprocess, names, images, batch_size=64)
    in_parts = predict(network, preprocess, names, images, batch_size=7)
    assert not all_at_once.failed
    for image, whole, part in zip(images, all_at_once.done, in_parts.done, strict=True):
        expected = network(preprocess(image.path)[None])[0].double().softmax(0)
        assert whole.image is image
        assert torch.allclose(whole.probabilities, expected, atol=1e-6)
        assert torch.allclose(part.probabilities, expected, atol=1e-6)


def test_damaged_images_are_told_and_the_others_predicted(trained, loaded, tmp_path):
    good = next((trained.pictures / "test" / "cat").iterdir())
    bad = [tmp_path / f"{number}.png" for number in range(3)]
    for path in bad:
        path.write_bytes(good.read_bytes()[:40])
    images = [ImageFile(path=path) for path in (bad[0], good, bad[1], bad[2])]
    made = predict(*loaded, images, batch_size=2)
    assert [prediction.image.path for prediction in made.done] == [good]
    assert list(made.failed) == bad
    assert all(made.failed.values())
    assert "on_damaged" not in " ".join(made.failed.values())  # a setting of runs


def test_numbers_that_are_lost_are_no_prediction(trained, loaded):
    network, preprocess, names = load_network(trained.path)
    with torch.no_grad():
        network.network.classifier.bias[0] = float("nan")
    images = find_images([trained.pictures / "test"], names).images
    with pytest.raises(InputError, match="is not finite"):
        predict(network, preprocess, names, images)


def prediction(label, *probabilities):
    image = ImageFile(path="x.png", label=label)
    return Prediction(image=image, probabilities=torch.tensor(probabilities))


def test_of_equal_classes_the_first_is_likelier():
    """As in the run's test."""
    assert [label for label, _ in prediction(None, 0.2, 0.4, 0.4).top(2)] == [1, 2]
    assert len(prediction(None, 0.2, 0.8).top(5)) == 2


def test_errors_are_counted_class_by_class():
    done = (
        prediction(0, 0.6, 0.3, 0.1),
        prediction(0, 0.3, 0.6, 0.1),
        prediction(2, 0.3, 0.6, 0.1),
        prediction(None, 0.3, 0.6, 0.1),
    )
    scores = Predictions(class_names=NAMES, done=done, failed={}).scores()
    assert [(score.label, score.images, score.wrong) for score in scores] == [(0, 2, 1), (2, 1, 1)]
    assert scores[0].error_percent == 50.0
