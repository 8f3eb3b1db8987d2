"""What a folder's files are: channels, range and size of all; mixtures; damaged files; words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deep_pictures import write_png
from PIL import Image
from small_pictures import load, write, write_classes

from lfmcw_app import image_survey
from lfmcw_app.data import load_dataset
from lfmcw_app.decoding import DamagedImage, Decoding
from lfmcw_app.errors import InputError
from lfmcw_app.folders import list_folder
from lfmcw_app.image_survey import DecodingOptions, in_threads, survey, without_damaged
from lfmcw_app.recipe import Data

CLASSES = {"a": 5, "b": 5}


def surveyed(folder, size=8, others=(), **options):
    train = sorted(str(path) for path in folder.rglob("*.*") if path not in others)
    return survey(train, [str(path) for path in others], DecodingOptions(**options), size)


def write_deep(folder, lowest, highest, count=5, kind=np.uint16):
    """Grey files of 8×8 pixels, together from the lowest to the highest value."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.linspace(lowest, highest, count + 1)
    for k in range(count):
        values = np.linspace(ends[k], ends[k + 1], 64).reshape(8, 8).astype(kind)
        name = f"{k}.png" if kind is np.uint16 else f"{k}.tif"
        Image.fromarray(values).save(folder / name)


def test_options_are_the_keys_of_a_recipe():
    data = Data(fit="pad", channels=1, bits=12, background="black", on_damaged="skip")
    options = DecodingOptions.of(data)
    assert options == DecodingOptions(
        fit="pad", channels=1, bits=12, background="black", on_damaged="skip"
    )
    assert DecodingOptions.of(Data()) == DecodingOptions()
    with pytest.raises(InputError, match=r"data\.background .*folder:PATH.* not digits"):
        load_dataset("digits", options=options)
    assert load_dataset("digits", options=DecodingOptions()).channels == 1


# ------------------------------ channels


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_training_images_have_one_channel(tmp_path, mode):
    for name in "abc":
        write(tmp_path / f"{name}.png", mode="L")
        with Image.open(tmp_path / f"{name}.png") as image:
            image.convert(mode).save(tmp_path / f"{name}.png")
    assert surveyed(tmp_path)[0].channels == 1
    assert surveyed(tmp_path, channels=3)[0].channels == 3
    test = tmp_path / "test.png"
    write(test)
    decoding, reading = surveyed(tmp_path, others=[test])
    assert decoding.channels == 1
    assert "1 with colours, made grey" in reading.summary()
    decoding, reading = surveyed(tmp_path)
    assert decoding.channels == 3
    assert "made grey" not in reading.summary()
    assert surveyed(tmp_path, channels=1)[0].channels == 1


def test_grey_images_of_16_bits_with_opacity_have_one_channel(tmp_path):
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 65536, (8, 8, 2)))
    assert surveyed(tmp_path)[0].channels == 1


# ------------------------------ the range


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_deep_training_images_take_all_levels(tmp_path, kind):
    low, high = (100, 4000) if kind is np.uint16 else (-1000, 3000)
    for name in CLASSES:
        write_deep(tmp_path / "train" / name, low, high, kind=kind)
        write_deep(tmp_path / "test" / name, low - 90, high + 1000, kind=kind)
    data = load(tmp_path)
    assert (data.decoding.low, data.decoding.high) == (low, high)
    for part in (data.train, data.test):
        levels = part.pixels.unique()
        assert (int(levels[0]), int(levels[-1])) == (0, 255)
        assert len(levels) > 220
    assert f"values {low:,} to {high:,} → 0–255" in data.summary
    lazy = load_dataset(f"folder:{tmp_path}", in_memory=False)
    assert torch.equal(lazy.train.pixels[torch.arange(10)], data.train.pixels)
    assert lazy.decoding == data.decoding


def test_bits_fix_the_range_and_what_is_beyond_is_told(tmp_path):
    write_deep(tmp_path, 100, 4000)
    decoding, reading = surveyed(tmp_path, bits=12)
    assert (decoding.low, decoding.high, decoding.takes_8_bits) == (0, 4095, True)
    assert not surveyed(tmp_path)[0].takes_8_bits
    assert "values 0 to 4,095 → 0–255," in reading.summary() + ","
    decoding, reading = surveyed(tmp_path, bits=8)
    assert (decoding.low, decoding.high) == (0, 255)
    assert "training images have 100 to 4,000: values outside are clipped" in reading.summary()


def test_single_bright_pixels_that_darken_the_rest_are_told(tmp_path):
    write_deep(tmp_path, 0, 4000)
    assert surveyed(tmp_path)[1].mostly_below is None
    hot = np.zeros((8, 8, 1), dtype=np.uint16)
    hot[3, 3] = 65535
    write_png(tmp_path / "hot.png", hot)
    _, reading = surveyed(tmp_path)
    assert reading.measured == (0, 65535)
    assert "half of the training images stay below 3,200: set data.bits" in reading.summary()
    assert surveyed(tmp_path, bits=12)[1].mostly_below is None


def test_files_of_one_value_are_refused_only_if_all_are(tmp_path):
    for name in "ab":
        write_png(tmp_path / f"{name}.png", np.full((8, 8, 1), 700))
    with pytest.raises(InputError, match=r"have the value 700 .*a\.png"):
        surveyed(tmp_path)
    write_png(tmp_path / "c.png", np.full((8, 8, 1), 900))
    decoding, _ = surveyed(tmp_path)
    assert (decoding.low, decoding.high) == (700, 900)
    assert decoding.decode(tmp_path / "a.png").unique().tolist() == [0]


def test_mixed_depths_have_no_common_range_without_bits(tmp_path):
    write_deep(tmp_path, 0, 4000, count=3)
    eight = tmp_path / "eight.png"
    image = write(eight, mode="L")
    message = r"3 files have whole numbers of more than 8 bits, such as .*0\.png; 1 files have 8 bi"
    with pytest.raises(InputError, match=f"no common range: {message}.*data.bits"):
        surveyed(tmp_path)
    with pytest.raises(InputError, match="no common range"):
        surveyed(tmp_path, others=[eight])
    decoding, _ = surveyed(tmp_path, bits=12)
    assert torch.equal(decoding.decode(eight), Decoding(size=8, channels=1).decode(image))
    assert surveyed(tmp_path, others=[tmp_path / f"{k}.png" for k in range(2)], bits=12)
    with pytest.raises(InputError, match="none of the training images has"):
        surveyed(tmp_path, others=[tmp_path / f"{k}.png" for k in range(3)], bits=12)


def test_numbers_of_two_kinds_are_refused(tmp_path):
    write_deep(tmp_path, 0, 1, count=2, kind=np.float32)
    with pytest.raises(
        InputError, match=r"data\.bits is 12.*some files have floating-point numbers"
    ):
        surveyed(tmp_path, bits=12)
    write_deep(tmp_path, 0, 4000, count=2)
    with pytest.raises(InputError, match=r"no common range: .*floating-point.*alike\.$"):
        surveyed(tmp_path)


def test_bits_of_files_that_have_8_are_refused(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"data\.bits is 12.*all files have 8 bits .*a\.png"):
        surveyed(tmp_path, bits=12)


def test_a_file_with_nan_is_named_with_the_others(tmp_path):
    write_deep(tmp_path, 0, 1, count=2, kind=np.float32)
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "nan.tif")
    (tmp_path / "x.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 images .*nan\.tif .not finite|2 images .*not finite"):
        surveyed(tmp_path)


# ------------------------------ the size


@pytest.mark.parametrize(("fit", "size"), [("crop", 20), ("pad", 40), ("stretch", 40)])
def test_images_of_one_size_need_no_other(tmp_path, fit, size):
    write_classes(tmp_path, {"a": 5, "b": 5}, size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 8
    write(tmp_path / "a" / "x.png", (20, 40)).save(tmp_path / "a" / "x.png", exif=exif)
    write(tmp_path / "b" / "x.tif", (20, 40)).save(tmp_path / "b" / "x.tif", exif=exif)
    data = load(tmp_path, fit=fit)
    assert data.image_size == size
    done = {"crop": "cropped to a square", "pad": "padded with black", "stretch": "stretched"}[fit]
    assert f"40×20 → {size}×{size}, 3 channels, values 0–255, 12 {done}" in data.summary
    assert ", 2 turned" in data.summary


def test_sizes_that_differ_need_one(tmp_path):
    write_classes(tmp_path, {"a": 5}, size=(8, 8))
    write_classes(tmp_path, {"b": 5}, size=(12, 8))
    with pytest.raises(InputError, match=r"no common size .*(12×8|8×8).*data\.image_size"):
        load(tmp_path)
    data = load(tmp_path, 12)
    assert data.image_size == 12
    assert "8×8 to 12×8 → 12×12" in data.summary


def test_what_was_read_is_told(tmp_path):
    for k in range(4):
        write(tmp_path / f"{k}.png", (30 + 4 * k, 40), mode="RGBA")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "z.gif", save_all=True, append_images=frames[1:])
    _, reading = surveyed(tmp_path, 16, background="black")
    assert reading.summary() == (
        "8×8 to 42×40 → 16×16, 3 channels, values 0–255, 4 cropped to a square, 4 with "
        "transparency, laid over black, 1 with several pictures, of which the first is read"
    )


@pytest.mark.parametrize(
    ("wide", "size", "fit", "told"),
    [
        (2, (16, 12), "crop", True),
        (1, (16, 12), "crop", False),  # a quarter of the images, not more
        (4, (15, 12), "crop", False),  # a fifth of the area
        (4, (16, 12), "pad", False),
    ],
)
def test_crops_that_cut_much_off_are_told(tmp_path, wide, size, fit, told):
    for k in range(4):
        write(tmp_path / f"{k}.png", size if k < wide else (12, 12))
    _, reading = surveyed(tmp_path, 8, fit=fit)
    assert (f"{wide} lose a quarter of their area or more" in reading.summary()) == told


# ------------------------------ damaged files


def damage(*paths):
    """Files that are seen to be damaged at once, and every second one only when read whole."""
    for k, path in enumerate(paths):
        content = path.read_bytes()
        path.write_bytes(b"damaged" if k % 2 == 0 else content[: len(content) // 2])


def test_all_damaged_files_of_a_folder_are_named_at_once(tmp_path):
    for part in ("train", "val", "test"):
        write_classes(tmp_path / part, CLASSES, size=(16, 16))
    names = ["train/a/000.png", "train/b/001.png", "val/a/002.png", "test/b/003.png"]
    damage(*(tmp_path / name for name in names))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert text.startswith("4 images cannot be read: ")
    assert all(name in text.replace("\\", "/") for name in names)


def test_of_many_files_those_with_a_damaged_head_are_named(tmp_path, monkeypatch):
    write_classes(tmp_path, CLASSES, size=(16, 16))
    damage(tmp_path / "a" / "000.png", tmp_path / "b" / "001.png", tmp_path / "b" / "002.png")
    monkeypatch.setattr(image_survey, "CHECKED", 9)
    with pytest.raises(InputError, match=r"^2 images .*000\.png .*002\.png"):
        load(tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_files_can_be_left_out(tmp_path, in_memory):
    write_classes(tmp_path, {"a": 9, "b": 9}, size=(16, 16))
    whole = load(tmp_path)
    damage(tmp_path / "a" / "000.png", tmp_path / "b" / "001.png")
    options = DecodingOptions(on_damaged="skip")
    data = load_dataset(f"folder:{tmp_path}", in_memory=in_memory, options=options)
    assert len(data.train) + len(data.test) == 16
    assert "2 files skipped: 2 damaged (a/000.png, b/001.png)" in data.summary
    assert data.fingerprint != whole.fingerprint
    (tmp_path / "a" / "000.png").unlink()
    (tmp_path / "b" / "001.png").unlink()
    assert load(tmp_path).fingerprint == data.fingerprint


def test_a_class_whose_files_are_all_damaged_is_named(tmp_path):
    write_classes(tmp_path, {"a": 3, "b": 2}, size=(16, 16))
    damage(tmp_path / "a" / "000.png", *sorted((tmp_path / "b").iterdir()))
    with pytest.raises(InputError, match=r"No image of class 'b' can be read\. 3 images cannot be"):
        without_damaged(list_folder(tmp_path))


def test_floats_that_are_not_finite_are_left_out_as_well(tmp_path):
    write_deep(tmp_path / "a", 0, 1, kind=np.float32)
    write_deep(tmp_path / "b", 0, 1, kind=np.float32)
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "a" / "nan.tif")
    listing = without_damaged(list_folder(tmp_path))
    assert listing.skipped == {"damaged (a/nan.tif)": 1}
    assert len(listing.parts["train"]) == 10


def test_results_of_threads_keep_their_order_and_errors():
    def half(number):
        if number % 2:
            raise DamagedImage(str(number), "odd")
        return number // 2

    results = in_threads(half, range(40))
    assert results[::2] == list(range(20))
    assert [result.name for result in results[1::2]] == [str(k) for k in range(1, 40, 2)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // number, [1, 0])
