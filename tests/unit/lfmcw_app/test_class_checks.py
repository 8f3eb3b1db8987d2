"""Classes without images in a part are named before anything is computed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from small_pictures import load, write_classes

from lfmcw_app.class_checks import check_classes
from lfmcw_app.data_checks import read_data
from lfmcw_app.errors import DataWarning, InputError
from lfmcw_app.recipe_loading import load_recipe

SMALL = {
    "data.image_size": 8,
    "search.batch_size": 4,
    "evaluation.batch_size": 4,
    "data.search_images": None,
    "data.train_images": None,
    "data.test_images": None,
}


def recipe(folder, **settings):
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return load_recipe("smoke", overrides={**SMALL, "dataset": f"folder:{folder}", **changes})


def said(folder, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_data(recipe(folder, **settings), Path("data"))
    told = [str(each.message) for each in caught if issubclass(each.category, DataWarning)]
    # (The small pictures of classes with names of one length are equal.)
    return [each for each in told if "among the training images" not in each]


def test_classes_that_lack_a_part_are_named_with_what_it_means(tmp_path):
    write_classes(tmp_path, {"cat": 20, "dog": 20, "eel": 3})
    assert said(tmp_path) == []
    write_classes(tmp_path, {"fox": 2, "gnu": 1})
    test, val = said(tmp_path)
    assert "2 classes (fox, gnu) of folder:" in val
    assert "no images in the D_val part. The search does not measure mistakes on them" in val
    assert "1 class (gnu)" in test
    assert "no images in the test part. The test error says nothing about them" in test
    assert said(tmp_path, search__method="random") == [test]


def test_images_that_a_recipe_leaves_out_count_too(tmp_path):
    write_classes(tmp_path, {f"class{index}": 5 for index in range(20)})
    found = said(tmp_path, data__search_images=20, data__test_images=8, data__train_images=10)
    assert [each.split("no images in the ")[1].split(" part")[0] for each in found] == [
        "training", "test", "D_tr", "D_val",
    ]  # fmt: skip
    assert "10 classes (class" in found[0]
    assert "and 6 more" in found[0]


def test_matched_batches_are_checked_at_the_start(tmp_path):
    write_classes(tmp_path, {"cat": 20, "dog": 20, "fox": 2})
    with pytest.raises(InputError, match=r"matched, .*1 class .fox.* has none there"):
        said(tmp_path, search__validation_batch="matched")
    write_classes(tmp_path, {"fox": 4})
    assert said(tmp_path, search__validation_batch="matched") == []


def test_validation_images_of_ones_own_are_d_val(tmp_path):
    for part, count in {"train": 8, "val": 6, "test": 2}.items():
        write_classes(tmp_path / part, {"cat": count, "dog": count})
    assert said(tmp_path) == []
    with pytest.raises(InputError, match=r"search\.batch_size is 13, but .* only 12 images"):
        said(tmp_path, search__batch_size=13)
    with pytest.raises(InputError, match="its own validation images"):
        said(tmp_path, data__search_fractions=(0.8, 0.2))


def test_all_classes_everywhere_say_nothing(tmp_path):
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    data = load(tmp_path)
    both = torch.tensor([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_classes(data, {"D_tr": both, "D_val": both, "test": both}, matched=True)
