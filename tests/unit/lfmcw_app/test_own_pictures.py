"""Pictures given one by one, in the forms that libraries have; none of these is imported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import lfmcw_app
from lfmcw_app import own_datasets
from lfmcw_app.data import load_dataset
from lfmcw_app.decoding import Decoding
from lfmcw_app.errors import InputError
from lfmcw_app.image_survey import DecodingOptions
from lfmcw_app.readers import Images

NAMES = ("cat", "dog", "bee")
COUNT = 15
LABELS = [place % 3 for place in range(COUNT)]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(own_datasets, "_REGISTERED", {})


def photo(place, mode="RGB"):
    """A picture whose size depends on its place."""
    numbers = np.random.default_rng(place)
    array = numbers.integers(256, size=(20 + place, 24, 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


PHOTOS = [photo(place) for place in range(COUNT)]


def loaded(train, test=None, *, size=8, names=NAMES, options=None, more=()):
    lfmcw_app.register_dataset("mine", lambda root: (train, test, names, *more))
    return load_dataset("mine", image_size=size, options=options)


class Flowers:
    """A data set as torchvision's: it decodes when it is indexed, and its length is its end."""

    def __init__(self, pictures=PHOTOS, labels=LABELS, transform=lambda picture: picture):
        self.pictures, self.labels, self.transform = pictures, labels, transform
        self.fetched = []

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, place):
        self.fetched.append(place)
        return self.transform(self.pictures[place % COUNT]), self.labels[place % COUNT]


class Column:
    """A column of a Hugging Face data set: a sequence that is no list and has no shape."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, place):
        return self.values[place]


class Frame:
    """A column of pandas after rows were shuffled: indexed by its labels, iterated in its order."""

    def __init__(self, values):
        self.values = values
        self.shape = (len(values),)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[(label + 7) % len(self.values)]

    def __iter__(self):
        return iter(self.values)


def expected(pictures, **how):
    return torch.stack([Decoding(size=8, **how).decode(picture) for picture in pictures])


def forms(folder):
    for place, picture in enumerate(PHOTOS):
        picture.save(folder / f"{place}.png")
    paths = [str(folder / f"{place}.png") for place in range(COUNT)]
    words = [NAMES[label] for label in LABELS]
    arrays = [np.array(picture) for picture in PHOTOS]
    tensors = [torch.from_numpy(array).movedim(-1, 0) for array in arrays]
    return {
        "data set": Flowers(),
        "medmnist": Flowers(labels=[np.array([label]) for label in LABELS]),
        "tensors": Flowers(pictures=tensors, labels=list(torch.tensor(LABELS))),
        "columns": (Column(PHOTOS), Column(LABELS)),
        "table": (Frame(paths), Frame(words)),
        "paths": (list(map(Path, paths)), LABELS),
        "arrays of texts": (np.array(paths), np.array(words)),
        "lists": (arrays, LABELS),
        "items": list(zip(PHOTOS, LABELS, strict=True)),
        "stream": iter(list(zip(PHOTOS, LABELS, strict=True))),
    }


FORMS = (
    "data set", "medmnist", "tensors", "columns", "table", "paths", "arrays of texts", "lists",
    "items", "stream",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_pictures_become_pixels_as_files_of_a_folder_do(form, tmp_path):
    given = forms(tmp_path)[form]
    data = loaded(given, Flowers(PHOTOS[:3]), more=(Flowers(PHOTOS[3:6]),))
    assert torch.equal(data.train.pixels, expected(PHOTOS))
    assert data.train.labels.tolist() == LABELS
    assert torch.equal(data.validation.pixels, expected(PHOTOS[3:6]))
    assert data.decoding == Decoding(size=8)
    assert data.summary.startswith(
        "21 images, 3 classes, 15 train / 3 validation / 3 test, 24×20 to 24×34 → 8×8, 3 channels"
    )
    # No other part says that these are pictures.
    alone = loaded(forms(tmp_path)[form])
    assert alone.decoding == Decoding(size=8)
    assert (len(alone.train), len(alone.test)) == (12, 3)


def test_a_data_set_is_fetched_once_but_for_a_few_items():
    flowers = Flowers()
    loaded(flowers)
    assert flowers.fetched == [*range(COUNT), *range(8)]


def test_the_recipe_says_how_pictures_become_square():
    turned = PHOTOS[0].copy()
    turned.getexif()[0x112] = 6
    options = DecodingOptions(fit="pad", channels=1)
    data = loaded(Flowers([turned, *PHOTOS[1:]]), Flowers(), options=options)
    upright = [ImageOps.exif_transpose(turned), *PHOTOS[1:]]
    assert torch.equal(data.train.pixels, expected(upright, fit="pad", channels=1))
    assert data.decoding == Decoding(size=8, fit="pad", channels=1)


def test_the_channels_are_those_of_the_training_images():
    grey = [photo(place, "L") for place in range(COUNT)]
    data = loaded(Flowers(grey), Flowers())
    assert torch.equal(data.train.pixels, expected(grey, channels=1))
    assert torch.equal(data.test.pixels, expected(PHOTOS, channels=1))
    three = loaded(Flowers(grey), Flowers(), options=DecodingOptions(channels=3))
    assert torch.equal(three.train.pixels, expected(grey, channels=3))


def test_an_error_of_the_data_set_itself_is_passed_on():
    def broken():
        yield from zip(PHOTOS, LABELS, strict=True)
        raise ValueError("the server is down")

    for given in (broken(), ((picture for picture, _ in broken()), LABELS)):
        with pytest.raises(ValueError, match="the server is down"):
            loaded(given)


def test_a_tensor_beside_pictures_is_taken_image_by_image():
    arrays = np.stack([np.array(picture.resize((8, 8))) for picture in PHOTOS])
    pixels = torch.from_numpy(arrays).movedim(3, 1)
    labels = torch.tensor(LABELS)
    for given in (arrays, labels), (pixels.numpy(), labels), Images(pixels=pixels, labels=labels):
        data = loaded(given, Flowers())
        assert torch.equal(data.train.pixels, pixels)
        assert torch.equal(data.test.pixels, expected(PHOTOS))
    with pytest.raises(InputError, match="item 0 must be a pair of an image and its label"):
        loaded("ab", Flowers())


def test_damaged_files_are_left_out_or_named(tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    given = ([str(tmp_path / "bad.png"), *PHOTOS], [0, *LABELS])
    with pytest.raises(InputError, match=r"bad\.png cannot be read .*on_damaged=skip"):
        loaded(given)
    data = loaded(given, Flowers(), options=DecodingOptions(on_damaged="skip"))
    assert data.train.labels.tolist() == LABELS
    assert "1 skipped: damaged" in data.summary and "bad.png" in data.summary
    # Where items are fetched a second time, they are compared with themselves.
    pairs = Column(list(zip(*given, strict=True)))
    again = loaded(pairs, Flowers(), options=DecodingOptions(on_damaged="skip"))
    assert torch.equal(again.train.pixels, data.train.pixels)


def test_a_damaged_picture_without_a_file_is_named_by_its_place(tmp_path):
    PHOTOS[0].save(tmp_path / "half.png")
    content = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "half.png") as half:
        words = "The image The training images of the data set mine: item 1 cannot be read"
        with pytest.raises(InputError, match=words):
            loaded(([PHOTOS[1], half, *PHOTOS[2:]], LABELS))


DEEP = Image.fromarray(np.full((20, 20), 4000, np.uint16))


def jitter(picture):
    return picture.rotate(float(torch.rand(()) * 90))


@pytest.mark.parametrize(
    ("train", "size", "words"),
    [
        (Flowers(transform=jitter), 8, "item 0 is another image each time .*search.augmentation"),
        (Flowers(), None, r"no common size \(.*item 1 has 24×21, the first one 24×20"),
        (
            Flowers(transform=lambda picture: torch.rand(3, 8, 8)),
            8,
            "item 0: An array.*float32.*ToTensor",
        ),
        (Flowers(transform=lambda picture: np.array(picture) / 255), 8, "float64.*PILToTensor"),
        (Flowers([DEEP] * COUNT), 8, "item 0 has integers of more than 8 bits.*folder:PATH"),
        (Column([{"img": PHOTOS[0], "label": 0}]), 8, r"keys img, label.*\(data\[\"image\"\]"),
        (Column([(PHOTOS[0], 0, 1)]), 8, "item 0 must be a pair"),
        (Column([(torch.zeros(4, 3, 8, 8).byte(), [0])]), 8, "one image at a time"),
        ((PHOTOS, LABELS[1:]), 8, "as many images as labels"),
        ((PHOTOS, ["cat"] * 14 + ["cow"]), 8, "the label 'cow' is no class name.*'cat', 'dog'"),
        ((PHOTOS, np.zeros((COUNT, 14), int)), 8, "one class.*several cannot be searched on"),
        ((PHOTOS, np.eye(3, dtype=int)[LABELS]), 8, r"one-hot: give labels\.argmax\(1\)"),
        (3, 8, "must be a pair of images and labels"),
        (Column([]), 8, "none can be read"),
    ],
)
def test_what_is_no_picture_is_refused(train, size, words):
    with pytest.raises(InputError, match=f"(?s){words}"):
        loaded(train, size=size)


def test_keys_that_serve_other_data_are_refused():
    with pytest.raises(InputError, match=r"data\.bits is 12"):
        loaded(Flowers(), options=DecodingOptions(bits=12))
    tensors = (torch.zeros(6, 3, 8, 8).byte(), torch.arange(6) % 3)
    with pytest.raises(InputError, match=r"data\.fit.*the images of mine are tensors"):
        loaded(tensors, options=DecodingOptions(fit="pad"))
