"""Which images a folder holds; folders that cannot be used are refused with advice."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from small_pictures import load, write_classes

from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_a_split_folder_is_read_as_it_is(tmp_path, held_out):
    write_classes(tmp_path / "train", {"dog": 3, "cat": 2})
    write_classes(tmp_path / held_out, {"cat": 1, "dog": 2})
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 1, 1]
    assert (data.channels, data.image_size, data.num_classes) == (3, 8, 2)
    for images, part in ((data.train, "train"), (data.test, held_out)):
        expected = np.asarray(Image.open(tmp_path / part / "cat" / "000.png"))
        assert np.array_equal(images.pixels[0].permute(1, 2, 0).numpy(), expected)
    pixels = data.train.pixels.double() / 255.0
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-14)
    assert data.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-14)


def test_a_class_may_be_called_train_and_hidden_folders_are_none(tmp_path):
    write_classes(tmp_path, {"bus": 5, "train": 5, ".cache": 1})
    assert load(tmp_path).class_names == ("bus", "train")


def test_an_unusable_folder_is_refused_with_advice(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="needs the path"):
        load_dataset("folder:")
    with pytest.raises(InputError, match="at least two folders of images, one a class, and has 0"):
        load(tmp_path)
    write_classes(tmp_path, {"a": 2})
    with pytest.raises(InputError, match="has 1"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"class folder .*empty has no images"):
        load(tmp_path)


def test_training_images_need_test_images_of_the_same_classes(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 2})
    with pytest.raises(InputError, match="none in test, val, validation"):
        load(tmp_path)
    write_classes(tmp_path / "test", {"a": 2, "c": 2, "b": 1})
    with pytest.raises(
        InputError, match=r"train \(2\) and test \(3\): 'c' is in test and not in train"
    ):
        load(tmp_path)
    (tmp_path / "test" / "c").rename(tmp_path / "c")
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "d")
    with pytest.raises(InputError, match="'b' is in train and not in test"):
        load(tmp_path)
