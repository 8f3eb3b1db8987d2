"""Your own data sets: registered by name, checked, and offered by installed packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

import lfmcw_app
from lfmcw_app import own_datasets
from lfmcw_app.data import check_dataset, load_dataset
from lfmcw_app.errors import DataWarning, InputError
from lfmcw_app.readers import DATASETS, Images

NAMES = ("round", "square")


def images(count, channels=1, size=8):
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, channels, size, size), generator=generator).byte()
    return pixels, torch.arange(count) % 2


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(own_datasets, "_REGISTERED", {})


def loaded(returned):
    lfmcw_app.register_dataset("mine", lambda root: returned)
    return load_dataset("mine")


def test_tensors_are_a_data_set_by_name():
    train, test = images(20), images(6)
    data = loaded((train, test, NAMES))
    assert torch.equal(data.train.pixels, train[0])
    assert torch.equal(data.test.labels, test[1])
    assert data.class_names == NAMES
    assert data.summary == "26 images, 2 classes, 20 train / 6 test, 8×8, 1 channel"
    assert data.fingerprint != loaded((images(22), test, NAMES)).fingerprint


def test_arrays_and_images_will_do():
    pixels, labels = images(10, channels=3)
    arrays = (pixels.numpy(), labels.numpy().astype(np.int32))
    one = loaded((arrays, Images(pixels=pixels, labels=labels), list(NAMES)))
    assert torch.equal(one.train.pixels, one.test.pixels)
    assert one.train.labels.dtype == torch.int64


@pytest.mark.parametrize(
    "names",
    [
        {"dog": 1, "cat": 0},
        {1: "dog", 0: "cat"},
        {"cat": None, "dog": None}.keys(),
        np.array(["cat", "dog"]),
        (name for name in ("cat", "dog")),
    ],
    ids=lambda names: type(names).__name__,
)
def test_class_names_are_in_the_order_of_the_labels(names):
    assert loaded((images(20), None, names)).class_names == ("cat", "dog")


@pytest.mark.parametrize("names", [range(2), [0, np.int64(1)], torch.arange(2), np.arange(2)])
def test_integers_are_class_names(names):
    assert loaded((images(20), None, names)).class_names == ("0", "1")


@pytest.mark.parametrize(
    "names",
    [
        "ab", b"ab", [b"a", b"b"], {"a", "b"}, frozenset("ab"), None, 2, [None, "a"], [0.5, 1.5],
        [False, True], {"a": 0, "b": 2}, {"a": 0, "b": 0}, {"a": 1, "b": 2}, {1: 0, 0: 1},
        {0: "a", 2: "b"}, {"a": "b", "c": "d"}, {"a": [0], "b": [1]}, torch.tensor([0.5, 1.5]),
        [1, 0], np.array([2, 0, 1]),
    ],
)  # fmt: skip
def test_class_names_without_an_order_are_refused(names):
    with pytest.raises(InputError, match="needs a list of class names, texts or integers"):
        loaded((images(20), None, names))


def test_arrays_of_any_layout_are_taken_with_their_values():
    pixels, labels = images(10)
    expected = loaded(((pixels, labels), None, NAMES)).train
    array, numbers = pixels.numpy(), labels.numpy()
    flipped = np.ascontiguousarray(array[::-1])[::-1]
    held = np.empty(len(array), dtype=object)
    held[:] = list(array)
    for given in (
        (flipped, np.ascontiguousarray(numbers[::-1])[::-1]),
        (list(array), list(numbers)),
        (list(pixels), list(labels)),
        (pixels.to_sparse(), numbers.astype(">i8")),
        (np.asfortranarray(array), numbers.astype(np.uint64)),
        (held, numbers.astype(object)),
        (array, numbers.tolist()),
    ):
        found = loaded((given, None, NAMES)).train
        assert torch.equal(found.pixels, expected.pixels)
        assert torch.equal(found.labels, expected.labels)
        assert found.labels.dtype == torch.int64


def test_arrays_of_other_layouts_are_taken_if_they_are_clear():
    pixels, labels = images(10, channels=3)
    for given in (pixels.movedim(1, 3), pixels.movedim(1, 3).numpy()):
        found = loaded(((given, labels), None, NAMES)).train
        assert torch.equal(found.pixels, loaded(((pixels, labels), None, NAMES)).train.pixels)
    grey = pixels[:, 0]
    assert torch.equal(loaded(((grey, labels), (grey, labels), NAMES)).test.pixels[:, 0], grey)
    # As medmnist has them: an array of one label for each image, and names by texts of numbers.
    data = loaded(((pixels, labels[:, None].numpy()), None, {"1": "square", "0": "round"}))
    assert data.class_names == NAMES
    assert torch.equal(data.train.labels, loaded(((pixels, labels), None, NAMES)).train.labels)


def test_validation_images_may_come_fourth():
    data = loaded((images(20), images(6), NAMES, images(8)))
    assert torch.equal(data.validation.pixels, images(8)[0])
    held = loaded((images(20), None, NAMES, images(8)))
    assert (len(held.train), len(held.test), len(held.validation)) == (16, 4, 8)
    assert loaded((images(20), images(6), NAMES, None)).validation is None


def test_pixels_of_zeros_and_ones_are_told():
    pixels, labels = images(10)
    with pytest.warns(DataWarning, match="training images .* no value above 1.*multiply them"):
        loaded((((pixels > 128).byte(), labels), None, NAMES))


def test_a_fifth_is_held_out_without_test_images():
    data = loaded((images(50), None, NAMES))
    assert data.train.labels.bincount().tolist() == [20, 20]
    assert data.test.labels.bincount().tolist() == [5, 5]


def test_the_function_is_given_the_data_folder(tmp_path):
    torch.save({"images": images(10)[0]}, tmp_path / "mine.pt")

    def read(root):
        pixels = torch.load(root / "mine.pt", weights_only=True)["images"]
        return (pixels, torch.arange(10) % 2), None, NAMES

    lfmcw_app.register_dataset("mine", read)
    assert load_dataset("mine", tmp_path).num_classes == 2


FLOATS = (torch.rand(4, 1, 8, 8), torch.arange(4) % 2)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "must return .*got None"),
        ((images(4), images(4)), "must return"),
        ((images(4), None, ("one",)), "at least two class names"),
        ((images(4), None, ("one", "one")), "all different"),
        ((FLOATS, None, NAMES), r"uint8 \[N, C, H, W\] .* got float32 \[4, 1, 8, 8\]"),
        ((images(4, channels=4), None, NAMES), r"C = 1 or 3.*got uint8 \[4, 4, 8, 8\]"),
        (((images(4)[0][None], images(4)[1]), None, NAMES), r"got uint8 \[1, 4, 1, 8, 8\]"),
        (((images(4)[0], torch.rand(4)), None, NAMES), r"labels must be integers.*got float32"),
        (((images(4)[0], torch.arange(3)), None, NAMES), r"each of the 4 images; got int64 \[3\]"),
        (((images(4)[0], torch.arange(4)), None, NAMES), "0 to 1, since .* got 0 to 3"),
        (("ab", None, NAMES), "training images of the data set mine must be a pair"),
        (((images(2)[0], ["a", "b"]), None, NAMES), "^The .* mine: the label 'a' is no class name"),
        ((([images(2)[0][0], torch.zeros(1, 4, 4)], [0, 1]), None, NAMES), "got float32 .1, 4, 4"),
        ((("ab", [0, 1]), None, NAMES), "must be a pair"),
        ((images(4), None, NAMES, None, None), "must return"),
        ({"train": images(4), "test": images(4), "names": NAMES}, "must return"),
        (((images(4)[0], [[0], [1, 0], [1], [0]]), None, NAMES), "must be a pair .*inhomogeneous"),
        (((images(2)[0].to("meta"), [0, 1]), None, NAMES), "[Cc]annot copy out of meta"),
        ((images(8), images(8, size=12), NAMES), r"\(1, 8, 8\) and test images of shape \(1, 12"),
        ((images(8), images(0), NAMES), "test set of mine has 0 images"),
    ],
)
def test_what_is_no_data_set_is_refused(returned, words):
    with pytest.raises(InputError, match=words):
        loaded(returned)


@pytest.mark.parametrize("name", ["", "a b", "folder:x", "a/b", ".", "..", "-x", "a" * 101])
def test_a_name_that_commands_cannot_take_is_refused(name):
    with pytest.raises(InputError, match="letters, digits"):
        lfmcw_app.register_dataset(name, lambda root: None)


def test_the_names_of_the_application_are_taken():
    for name in (*DATASETS, "DIGITS", "folder", "Random"):
        with pytest.raises(InputError, match="a data set of the application"):
            lfmcw_app.register_dataset(name, lambda root: None)


def offered(root):
    return images(10), images(4), NAMES


def test_an_installed_package_offers_a_data_set(monkeypatch):
    group = own_datasets.ENTRY_POINTS
    points = [
        EntryPoint("theirs", f"{__name__}:offered", group),
        EntryPoint("broken", "no_such_module:f", group),
    ]
    with pytest.raises(InputError, match="Unknown data set 'theirs'"):
        check_dataset("theirs")
    monkeypatch.setattr(own_datasets, "entry_points", lambda group: points)
    monkeypatch.setattr(EntryPoint, "load", lambda self: _loaded(self))
    check_dataset("theirs")
    assert load_dataset("theirs").test.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match="broken of no_such_module:f cannot be imported"):
        load_dataset("broken")


def _loaded(point):
    if point.name == "broken":
        raise ModuleNotFoundError("No module named 'no_such_module'")
    return offered
