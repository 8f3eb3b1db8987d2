"""An image in each form becomes a file's path or an image of Pillow; nothing else is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lfmcw_app.errors import InputError
from lfmcw_app.image_forms import picture_of


def test_arrays_and_tensors_are_the_same_picture():
    array = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for form in (array, torch.from_numpy(array).movedim(-1, 0), Image.fromarray(array)):
        picture = picture_of(form)
        assert picture.mode == "RGB" and picture.size == (3, 2)
        assert np.array_equal(np.array(picture), array)
    grey = array[..., :1]
    assert picture_of(grey).mode == picture_of(torch.from_numpy(grey[..., 0])).mode == "L"
    assert picture_of(grey[..., 0].astype(np.uint16)).mode == "I;16"


def test_a_path_is_not_read():
    assert picture_of("nowhere.png") == picture_of(Path("nowhere.png")) == Path("nowhere.png")


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4, 4), np.zeros((4, 4, 2), np.uint8), b"png", 3])
def test_what_is_no_image_is_refused(wrong):
    with pytest.raises(InputError, match=r"An (array of an )?image"):
        picture_of(wrong)
