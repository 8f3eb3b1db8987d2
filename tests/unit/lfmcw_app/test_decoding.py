"""How a file becomes pixels: upright, without transparency, in 8 bits, square."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
import torch
from deep_pictures import write_png, write_tiff
from PIL import Image
from small_pictures import write
from torchvision.transforms import functional as TF

from lfmcw_app import decoding
from lfmcw_app.augmentation import CROP_DRAWS, crop_box
from lfmcw_app.decoding import (
    NAMED,
    DamagedImage,
    Decoding,
    damaged_images,
    opened,
    orientation_of,
    value_range,
)
from lfmcw_app.errors import InputError

GRADIENT = np.arange(64, dtype=np.uint16).reshape(8, 8, 1) * 65  # 0 to 4095


def grey(path, size=8, **how):
    return Decoding(size=size, channels=1, **how).decode(path)[0]


# ------------------------------ the size


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (37, 23), (16, 16), (6, 5), (90, 1)])
@pytest.mark.parametrize("margin", [1.0, 256 / 224])
def test_crop_is_that_of_torchvision(tmp_path, size, margin):
    image = write(tmp_path / "a.png", size)
    expected = TF.center_crop(TF.resize(image, round(16 * margin)), [16, 16])
    pixels = Decoding(size=16, margin=margin).decode(tmp_path / "a.png")
    assert torch.equal(pixels, TF.pil_to_tensor(expected))
    assert torch.equal(Decoding(size=16, margin=margin).decode(image), pixels)


def test_pad_keeps_all_of_an_image_between_black_borders(tmp_path):
    image = write(tmp_path / "a.png", (40, 20))
    pixels = Decoding(size=16, fit="pad").decode(tmp_path / "a.png")
    inside = TF.pil_to_tensor(image.resize((16, 8), Image.Resampling.BILINEAR))
    assert torch.equal(pixels[:, 4:12], inside)
    assert not pixels[:, :4].any()
    assert not pixels[:, 12:].any()
    write(tmp_path / "a.png", (2, 900))
    pixels = Decoding(size=16, fit="pad").decode(tmp_path / "a.png")
    assert pixels[:, :, 7].any()
    assert not pixels[:, :, :7].any()
    assert not pixels[:, :, 8:].any()


def test_stretch_changes_the_ratio(tmp_path):
    image = write(tmp_path / "a.png", (40, 20))
    pixels = Decoding(size=16, fit="stretch").decode(tmp_path / "a.png")
    expected = image.resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(pixels, TF.pil_to_tensor(expected))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_deep_images_have_the_shape_that_others_have(tmp_path, fit):
    values = np.random.default_rng(0).integers(0, 256, (20, 40, 3))
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "8.png")
    write_png(tmp_path / "16.png", values * 257)
    for channels in (1, 3):
        how = {"size": 16, "fit": fit, "channels": channels}
        deep = Decoding(low=0, high=65535, **how).decode(tmp_path / "16.png")
        assert deep.shape == (channels, 16, 16)
        difference = deep.int() - Decoding(**how).decode(tmp_path / "8.png").int()
        assert int(difference.abs().max()) <= 1  # Pillow rounds the two sides one by one


# ------------------------------ upright


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation, kind):
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(np.array([[0, 60, 120], [180, 240, 30]]), np.ones((16, 16)))
    Image.fromarray(blocks.astype(np.uint8)).convert("RGB").save(path, exif=exif, quality=95)
    upright = Image.fromarray(blocks.astype(np.uint8))
    upright = upright if orientation == 1 else upright.transpose(METHODS[orientation])
    with opened(path) as image:
        assert orientation_of(image) == orientation
    pixels = grey(path, 48, fit="pad").float()
    expected = grey(upright, 48, fit="pad").float()
    assert float((pixels - expected).abs().mean()) < 6  # lossy files


METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def test_exif_data_without_a_use_leave_an_image_as_it_is(tmp_path):
    image = write(tmp_path / "a.png")
    for exif in (
        b"Exif\0\0no exif",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0" + bytes(4),
    ):
        image.save(tmp_path / "a.png", exif=exif)
        assert torch.equal(Decoding(size=8).decode(tmp_path / "a.png"), TF.pil_to_tensor(image))


# ------------------------------ colours and transparency


def test_grey_and_coloured_files_become_the_channels(tmp_path):
    image = write(tmp_path / "grey.png", mode="L")
    coloured = write(tmp_path / "colour.png", mode="RGB")
    one, three = Decoding(size=8, channels=1), Decoding(size=8)
    assert torch.equal(one.decode(tmp_path / "grey.png"), TF.pil_to_tensor(image))
    assert torch.equal(three.decode(tmp_path / "grey.png"), TF.pil_to_tensor(image).expand(3, 8, 8))
    grey_of_colour = TF.pil_to_tensor(coloured.convert("L"))
    assert torch.equal(one.decode(tmp_path / "colour.png"), grey_of_colour)
    write_png(tmp_path / "deep.png", np.asarray(coloured).astype(int) * 257)
    deep = Decoding(size=8, channels=1, low=0, high=65535).decode(tmp_path / "deep.png")
    assert int((deep.int() - grey_of_colour.int()).abs().max()) <= 1


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_mode_becomes_what_pillow_shows(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image = (
        Image.frombytes("LAB", (8, 8), image.tobytes()) if mode == "LAB" else image.convert(mode)
    )
    shown = image.convert("RGB")
    assert torch.equal(Decoding(size=8).decode(image), TF.pil_to_tensor(shown))
    one = Decoding(size=8, channels=1).decode(image)
    assert int((one.int() - TF.pil_to_tensor(shown.convert("L")).int()).abs().max()) <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "RGBa"])
def test_transparency_shows_the_background(mode):
    opacity = Image.fromarray(np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1)))
    black = Image.new("L", (8, 8))
    if mode == "PA":
        image = Image.new("PA", (8, 8))
        image.putpalette([0, 0, 0])
        image.putalpha(opacity)
    else:
        image = Image.merge("LA", [black, opacity])
        image = image if mode == "LA" else image.convert("RGBA")
        image = image.convert(mode) if mode == "RGBa" else image
    expected = 255 - TF.pil_to_tensor(opacity)[0].int()
    assert int((grey(image).int() - expected).abs().max()) <= 1
    assert not grey(image, background="black").any()


def test_a_transparent_colour_shows_the_background(tmp_path):
    path = tmp_path / "a.png"
    for mode, colour in (("L", 7), ("RGB", (7, 8, 9)), ("1", 0)):
        Image.new(mode, (8, 8), colour).save(path, transparency=colour)
        assert Decoding(size=8).decode(path).unique().tolist() == [255]
        assert Decoding(size=8, background="black").decode(path).unique().tolist() == [0]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 90, 90, 90])
    palette.save(path, transparency=bytes([255, 0]))
    assert Decoding(size=8).decode(path).unique().tolist() == [255]
    write_png(path, GRADIENT, transparent=[4095])
    assert int(grey(path, low=0, high=8190)[7, 7]) == 255
    assert int(grey(path, low=0, high=8190, background="black")[7, 7]) == 0
    half = np.stack([GRADIENT[..., 0] * 0 + 4095, GRADIENT[..., 0] * 0 + 32768], axis=2)
    write_png(path, half)
    assert grey(path, low=0, high=4095, background="black").unique().tolist() == [128]


def test_the_first_picture_of_several_is_read(tmp_path):
    first, second = Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 200)
    for name in ("a.gif", "a.tif", "a.png", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        assert grey(tmp_path / name).unique().tolist() == [40]


# ------------------------------ more than 8 bits


def test_a_range_becomes_all_levels_and_the_rest_is_cut(tmp_path):
    write_png(tmp_path / "a.png", GRADIENT)
    levels = grey(tmp_path / "a.png", low=0, high=4095)
    assert torch.equal(levels.flatten(), (torch.arange(64) * 65 * 255 / 4095).round().byte())
    cut = grey(tmp_path / "a.png", low=1000, high=2000).flatten()
    assert cut[:16].tolist() == [0] * 16  # up to 975
    assert cut[31:].tolist() == [255] * 33  # from 2015
    Image.fromarray(GRADIENT[..., 0].astype(np.float32) / 4095 - 0.5).save(tmp_path / "a.tif")
    assert torch.equal(grey(tmp_path / "a.tif", low=-0.5, high=0.5), levels)
    assert value_range(str(tmp_path / "a.png")) == (0, 4095)
    assert value_range(str(tmp_path / "a.tif")) == (-0.5, 0.5)


def test_what_is_transparent_has_no_part_in_the_range(tmp_path):
    values = np.array([[[9, 65535], [60000, 0], [500, 1]]])
    write_png(tmp_path / "a.png", values)
    assert value_range(str(tmp_path / "a.png")) == (9, 500)


def test_files_of_another_depth_are_refused(tmp_path):
    write_png(tmp_path / "16.png", GRADIENT)
    image = write(tmp_path / "8.png", mode="L")
    with pytest.raises(InputError, match=r"16\.png has integers .*training images have 8 bits"):
        grey(tmp_path / "16.png")
    with pytest.raises(InputError, match=r"8\.png has 8 bits.*values from -5 to 4095"):
        grey(tmp_path / "8.png", low=-5, high=4095, takes_8_bits=False)
    with pytest.raises(InputError, match="The image has 8 bits"):
        grey(image, low=-5, high=4095, takes_8_bits=False)
    assert torch.equal(grey(tmp_path / "8.png", low=0, high=4095), grey(image))


def test_a_random_window_is_cut_out_of_the_original(tmp_path):
    draws = torch.rand(5, *CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = write(tmp_path / "a.png", (40, 30))
    image.save(tmp_path / "a.png", exif=exif)
    values = np.asarray(image).astype(int)
    write_png(tmp_path / "deep.png", values * 257)
    upright = image.transpose(METHODS[6])
    for draw in draws:
        left, top, right, bottom = crop_box(30, 40, draw)
        expected = TF.resized_crop(upright, top, left, bottom - top, right - left, [16, 16])
        window = Decoding(size=16).decode_window(tmp_path / "a.png", draw)
        assert torch.equal(window, TF.pil_to_tensor(expected))
        deep = Decoding(size=16, low=0, high=65535).decode_window(tmp_path / "deep.png", draw)
        plain = Decoding(size=16).decode_window(image, draw)
        assert int((deep.int() - plain.int()).abs().max()) <= 1


def deep_files(folder):
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 4), dtype=np.uint16)
    for channels in (1, 2, 3, 4):
        write_png(folder / f"{channels}.png", values[..., :channels])
    write_tiff(folder / "3.tif", values[..., :3])
    head = b"P5 8 8 4095\n"
    (folder / "1.pgm").write_bytes(head + values[..., 0].astype(">u2").tobytes())
    return sorted(folder.iterdir())


@pytest.mark.parametrize("takes_8_bits", [True, False])
def test_an_image_of_pillow_is_the_same_at_each_call(tmp_path, takes_8_bits):
    how = Decoding(size=8, low=0, high=4095, takes_8_bits=takes_8_bits)
    for path in deep_files(tmp_path):
        expected = how.decode(path)
        for source in (path, io.BytesIO(path.read_bytes())):
            with Image.open(source) as image:
                assert all(torch.equal(how.decode(image), expected) for _ in range(3))
                image.load()  # it was left as it was
        with Image.open(path) as image, pytest.raises(InputError, match="the training images have"):
            Decoding(size=8).decode(image)


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_image_that_has_lost_values_is_refused(tmp_path, in_memory):
    how = Decoding(size=8, low=0, high=4095)
    for path in deep_files(tmp_path):
        with Image.open(io.BytesIO(path.read_bytes()) if in_memory else path) as image:
            image.load()
            if path.name == "1.png":  # all of it is there
                assert torch.equal(how.decode(image), how.decode(path))
                continue
            with pytest.raises(InputError, match=r"more than 8 bits, of which .*path of the file"):
                how.decode(image)
            if not in_memory:
                with pytest.raises(InputError, match="had more than 8 bits"):
                    Decoding(size=8).decode(image)


def test_an_image_of_8_bits_may_be_loaded_and_changed(tmp_path):
    path = tmp_path / "a.png"
    write(path)
    how = Decoding(size=8, low=0, high=4095)
    with Image.open(path) as image:
        image.load()
        image.putpixel((0, 0), (1, 2, 3))
        assert how.decode(image)[:, 0, 0].tolist() == [1, 2, 3]
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()
        assert torch.equal(Decoding(size=8).decode(image), how.decode(path))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(InputError, match="no pixels"):
        Decoding(size=8).decode(Image.new("RGB", (0, 5)))


# ------------------------------ files that cannot be read


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "a.png"

    def refused(match):
        with pytest.raises(DamagedImage, match=match) as caught:
            Decoding(size=8).decode(path)
        assert caught.value.name == str(path)

    refused(r"a\.png cannot be read .*No such file")
    path.write_bytes(b"")
    refused(r"a\.png cannot be read .it is empty")
    path.write_text("a text")
    refused(r"a\.png cannot be read .it is not an image")
    content = (write(path, (40, 40)), path.read_bytes())[1]
    path.write_bytes(content[: len(content) // 2])
    refused(r"a\.png cannot be read .*truncated.*Give another one\.$")
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    refused(r"a\.png cannot be read .it has more than 1,400 pixels")
    path.unlink()
    path.mkdir()
    refused(r"a\.png cannot be read .*directory")


def test_damaged_files_are_named_together():
    damaged = [DamagedImage(f"{k}.png", "it is empty") for k in range(NAMED + 3)]
    text = str(damaged_images(damaged))
    assert text.startswith(f"{NAMED + 3} images cannot be read: 0.png (it is empty), 1.png")
    assert f"{NAMED - 1}.png" in text
    assert f"{NAMED}.png" not in text
    assert "and 3 more. Put sound copies of them there" in text
    assert text.endswith("data.on_damaged=skip.")
    assert str(damaged_images(damaged[:1])).endswith("data.on_damaged=skip.")  # of a data set


# ------------------------------ as data


def test_a_decoding_is_kept_as_plain_data():
    for how in (Decoding(size=16), Decoding(size=8, fit="pad", channels=1, low=-1.5, high=7)):
        data = json.loads(json.dumps(how.to_data()))
        assert Decoding.from_data(data) == how
    assert Decoding.from_data({"size": 8}) == Decoding(size=8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 0}, "size"),
        ({"size": True}, "size"),
        ({"size": "8"}, "size"),
        ({"size": 10**6}, "size"),
        ({"fit": "cut"}, "fit"),
        ({"channels": 2}, "channels"),
        ({"channels": True}, "channels"),
        ({"low": 1.0}, "together"),
        ({"low": 1.0, "high": 1.0}, "below"),
        ({"low": 0.0, "high": float("inf")}, "high"),
        ({"low": float("nan"), "high": 1.0}, "low"),
        ({"margin": 0.5}, "margin"),
        ({"margin": 1.2, "fit": "pad"}, "margin"),
        ({"background": "red"}, "background"),
        ({"takes_8_bits": 1}, "takes_8_bits"),
        ({"other": 1}, "other"),
    ],
)
def test_data_that_are_no_decoding_are_refused(change, named):
    with pytest.raises(InputError, match=f"decoded is damaged: .*{named}"):
        Decoding.from_data({"size": 8, **change})
    with pytest.raises(InputError, match="decoded is damaged"):
        Decoding.from_data([change])
    with pytest.raises(InputError, match="decoded is damaged: size"):
        Decoding.from_data({})


@pytest.mark.parametrize("size", [(3, 500), (500, 3)])
def test_a_line_of_pixels_takes_little_memory(tmp_path, monkeypatch, size):
    """Only the centre is made, and it is that of the whole up to rounding."""
    write(tmp_path / "a.png", size)
    how = Decoding(size=16, margin=256 / 224)
    whole = how.decode(tmp_path / "a.png").int()
    monkeypatch.setattr(decoding, "MOST_RESIZED", 1000)
    made = []
    resized = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *a, **k: made.append(resized(*a, **k)) or made[-1]
    )
    centre = how.decode(tmp_path / "a.png").int()
    assert (centre - whole).abs().max() <= 16  # a place of half a pixel
    assert [image.size for image in made] == [(16, 16)]


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DamagedImage, match="it is a pipe"):
        Decoding(size=8).decode(tmp_path / "a.png")
