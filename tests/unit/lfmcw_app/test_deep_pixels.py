"""Pixels of more than 8 bits: as a file holds them, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from deep_pictures import write_png, write_tiff
from PIL import Image

from lfmcw_app.decoding import DamagedImage, opened
from lfmcw_app.deep_pixels import deep_values, depth_of, is_grey

RNG = np.random.default_rng(0)
RANDOM = RNG.integers(0, 65536, (9, 7, 4), dtype=np.uint16)


def read(path):
    """Depth, and all channels with opacity last, of 0 to 65535."""
    with opened(path) as image:
        depth = depth_of(image)
        assert depth != "8 bits"
        colours, opacity = deep_values(image)
    if opacity is None:
        return depth, colours
    return depth, np.concatenate([colours, opacity * 65535.0], axis=2)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_of_16_bits_is_read_whole(tmp_path, channels):
    path = tmp_path / "a.png"
    write_png(path, RANDOM[..., :channels])
    depth, values = read(path)
    assert depth == "integers"
    np.testing.assert_allclose(values, RANDOM[..., :channels], rtol=1e-12)
    with opened(path) as image:
        assert is_grey(image) == (channels < 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_tiff_of_16_bits_is_read_whole(tmp_path, channels, order, packed):
    path, values = tmp_path / "a.tif", RANDOM[..., :channels]
    opacity = {"t_338": [2]} if channels == 4 else {}
    write_tiff(path, values, order, packed, **opacity)
    depth, found = read(path)
    assert depth == "integers"
    np.testing.assert_allclose(found, values, rtol=1e-12)
    write_tiff(path, values, order, packed, t_274=[6], **opacity)  # it lies on its side
    np.testing.assert_allclose(read(path)[1], np.rot90(values, -1), rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "sample_format", "depth"),
    [
        ("<i2", 2, "integers"),
        (">i2", 2, "integers"),
        ("<i4", 2, "integers"),
        ("<u4", 1, "integers"),
        ("<f4", 3, "floating-point numbers"),
        (">f4", 3, "floating-point numbers"),
    ],
)
def test_grey_tiffs_of_any_numbers_are_read(tmp_path, kind, sample_format, depth):
    values = RANDOM[..., :1].astype(np.float64) - (0 if "u" in kind else 30000)
    values = values * 50000 if kind.endswith("u4") else values % 30000
    values = values.astype(np.dtype(kind[1:]))
    write_tiff(tmp_path / "a.tif", values, kind[0], t_339=[sample_format])
    found, pixels = read(tmp_path / "a.tif")
    assert found == depth
    assert np.array_equal(pixels, values)


def test_a_pgm_keeps_the_values_that_its_head_scales(tmp_path):
    for largest in (4095, 65535):
        values = RANDOM[..., :1].astype(int) % (largest + 1)
        head = b"P5 7 9 %d\n" % largest
        (tmp_path / "a.pgm").write_bytes(head + values.astype(">u2").tobytes())
        assert np.array_equal(read(tmp_path / "a.pgm")[1], values)


def test_one_colour_of_a_png_may_be_transparent(tmp_path):
    values = np.array([[[700], [12]]])
    write_png(tmp_path / "a.png", values, transparent=[700])
    with opened(tmp_path / "a.png") as image:
        colours, opacity = deep_values(image)
    assert np.array_equal(colours, values)
    assert opacity[..., 0].tolist() == [[0.0, 1.0]]
    colour = np.array([[[700, 1, 2], [700, 1, 3]]])
    write_png(tmp_path / "a.png", colour, transparent=[700, 1, 2])
    with opened(tmp_path / "a.png") as image:
        assert deep_values(image).opacity[..., 0].tolist() == [[0.0, 1.0]]


def test_what_would_be_read_wrong_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    for packed in (False, True):
        write_tiff(path, RANDOM[..., :3], packed=packed, in_planes=True)
        with pytest.raises(DamagedImage, match=r"a\.tif .*separate planes"):
            read(path)
    write_tiff(path, RANDOM, t_338=[1])  # colours that are multiplied by the opacity
    with pytest.raises(DamagedImage, match=r"more than 8 bits .RGBa"):
        read(path)
    write_tiff(path, RANDOM[..., :1], t_262=[0])
    with pytest.raises(DamagedImage, match="count from white"):
        read(path)
    ppm = tmp_path / "a.ppm"
    ppm.write_bytes(b"P6 7 9 4095\n" + (RANDOM[..., :3] % 4096).astype(">u2").tobytes())
    with pytest.raises(DamagedImage, match=r"a\.ppm .*more than 8 bits"):
        read(ppm)
    for mode in ("L", "RGB"):
        Image.new(mode, (8, 8)).save(tmp_path / "a.sgi", bpc=2)
        with pytest.raises(DamagedImage, match=r"a\.sgi .*more than 8 bits"):
            read(tmp_path / "a.sgi")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, wrong):
    values = np.ones((4, 4), dtype=np.float32)
    values[1, 2] = wrong
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DamagedImage, match=r"a\.tif .*not finite"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_other_files_have_8_bits(tmp_path, mode):
    name = "a.jpg" if mode == "YCbCr" else "a.tif"
    Image.new(mode, (8, 8)).save(tmp_path / name)
    with opened(tmp_path / name) as image:
        assert depth_of(image) == "8 bits"
        assert is_grey(image) == (mode in ("1", "L", "LA"))


def write_fits(path, values, **cards):
    """A FITS file of values [H, W], with their type; FITS begins at the bottom."""
    bits = 8 * values.dtype.itemsize * (-1 if values.dtype.kind == "f" else 1)
    head = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": values.shape[1]}
    head |= {"NAXIS2": values.shape[0], **cards}
    text = "".join(f"{name:8}= {value:>20} / comment".ljust(80) for name, value in head.items())
    text += "END".ljust(80)
    data = values[::-1].astype(values.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(text.ljust(2880).encode() + data.ljust(-(-len(data) // 2880) * 2880, b"\0"))


@pytest.mark.parametrize("kind", [np.int32, np.float32, np.float64])
def test_fits_files_without_a_scale_are_read(tmp_path, kind):
    values = RANDOM[..., 0].astype(kind) - 30000
    write_fits(tmp_path / "a.fits", values, BSCALE=1.0, BZERO=0)
    assert np.array_equal(read(tmp_path / "a.fits")[1][..., 0], values)


@pytest.mark.parametrize(
    ("kind", "cards"),
    [
        (np.int16, {}),
        (np.int16, {"BZERO": 32768}),
        (np.int32, {"BSCALE": "1.0D-2"}),
        (np.float32, {"BZERO": 5}),
        (np.uint8, {"BZERO": -128}),
        (np.int32, {"NAXIS": 3, "NAXIS3": 3}),
    ],
)
def test_fits_files_that_pillow_misreads_are_refused(tmp_path, kind, cards):
    write_fits(tmp_path / "a.fits", RANDOM[..., 0].astype(kind), **cards)
    with pytest.raises(DamagedImage, match=r"FITS files with .* not supported; save it as TIFF"):
        read(tmp_path / "a.fits")


def test_values_of_8_bits_with_a_sign_are_refused(tmp_path):
    write_tiff(tmp_path / "a.tif", RANDOM[..., :1].astype(np.int8), t_339=[2])
    with pytest.raises(DamagedImage, match="values of 8 bits have a sign"):
        read(tmp_path / "a.tif")
