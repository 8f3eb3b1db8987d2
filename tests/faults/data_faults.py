"""Faults of data: images that are none or too much, links out of a folder, hostile archives."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from forked_runs import Runs
from PIL import Image
from rich.console import Console
from small_cifars import binary_files, random_parts, write_archive
from trials import REFUSED, Kind, Trial, said

from lfmcw_app.commands.execution import reported_errors
from lfmcw_app.data import load_dataset

Harm = Callable[[Path, random.Random], tuple[int, str]]
"""Harms a folder with the classes a and b, and 0.png to 11.png in each; returns the exit code that
is right, and words that must be said.
"""


def _some_image(folder: Path, rng: random.Random) -> Path:
    return folder / rng.choice("ab") / f"{rng.randrange(12)}.png"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    """A grey PNG of 8 bits with a head of any size."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *chunks, _chunk(b"IEND", b"")])


def bomb(folder: Path, rng: random.Random) -> tuple[int, str]:
    """A small file with the head of an enormous picture."""
    side = rng.choice([20_000, 60_000, 2**31 - 1])
    file = _some_image(folder, rng)
    file.write_bytes(_png(side, side, _chunk(b"IDAT", zlib.compress(bytes(10)))))
    return REFUSED, f"{file.parent.name}/{file.name} cannot be read (it has more than"


def text_bomb(folder: Path, rng: random.Random) -> tuple[int, str]:
    """A text chunk that unpacks to a gigabyte."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1 << 10)) + packer.flush()
    file = _some_image(folder, rng)
    pixels = _chunk(b"IDAT", zlib.compress(bytes(8 * 9)))
    file.write_bytes(_png(8, 8, _chunk(b"zTXt", b"Comment\0\0" + packed), pixels))
    return REFUSED, f"{file.parent.name}/{file.name} cannot be read"


def nan(folder: Path, rng: random.Random) -> tuple[int, str]:
    """One pixel of one image is no number."""
    for file in sorted(folder.rglob("*.png")):
        with Image.open(file) as image:
            pixels = np.asarray(image, dtype=np.float32)
        file.unlink()
        Image.fromarray(pixels).save(file.with_suffix(".tiff"))
    file = _some_image(folder, rng).with_suffix(".tiff")
    with Image.open(file) as image:
        pixels = np.array(image)
    pixels[rng.randrange(8), rng.randrange(8)] = rng.choice([np.nan, np.inf, -np.inf])
    Image.fromarray(pixels).save(file)
    return REFUSED, f"{file.parent.name}/{file.name} cannot be read (it has pixels that are not"


def cut(folder: Path, rng: random.Random) -> tuple[int, str]:
    """A file is cut, or has a changed byte in its pixels."""
    file = _some_image(folder, rng)
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT") + 6
    if rng.random() < 0.5:
        del content[rng.randrange(0, start + 10) :]
    else:
        content[rng.randrange(start, start + 20)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return REFUSED, f"{file.parent.name}/{file.name} cannot be read"


def link_out(folder: Path, rng: random.Random) -> tuple[int, str]:
    """Images, or a class, lie elsewhere: links are followed."""
    away = folder.parent / f"{folder.name}-away"
    moved = folder / "b" if rng.random() < 0.5 else _some_image(folder, rng)
    moved.rename(away)
    moved.symlink_to(away)
    return 0, "24 images"


def link_to_no_file(folder: Path, rng: random.Random) -> tuple[int, str]:
    """Links to nothing, to themselves and to devices, and a pipe: none of them is an image."""
    file = _some_image(folder, rng).with_name("x.png")
    kind = rng.choice(["nothing", "itself", "/dev/zero", "pipe"])
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file if kind == "itself" else Path("/dev/zero" if "/" in kind else "gone"))
    return 0, "24 images"


def link_to_other_class(folder: Path, rng: random.Random) -> tuple[int, str]:
    """One folder with the names of two classes."""
    shutil.rmtree(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return REFUSED, "are one folder under two names"


def loop(folder: Path, rng: random.Random) -> tuple[int, str]:
    """A link from a class to what holds it."""
    (folder / "a" / "above").symlink_to(rng.choice([folder, folder.parent, folder / "a"]))
    return 0, "24 images"


def all_alike(folder: Path, rng: random.Random) -> tuple[int, str]:
    """All pixels of all images are equal."""
    for file in folder.rglob("*.png"):
        Image.new("L", (8, 8), 7).save(file)
    return REFUSED, "are equal"


HARMS: tuple[Harm, ...] = (
    bomb, text_bomb, nan, cut, link_out, link_to_no_file, link_to_other_class, loop, all_alike,
)  # fmt: skip


def hostile_images(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A folder of images with a fault: refused by the file's name, or served as is documented."""
    for number in range(min(most, 4 * len(HARMS))):
        path, data = runs.folder / f"images-{number}", runs.folder / f"data-{number}"
        _write_images(data, rng)
        harm = HARMS[number % len(HARMS)]
        right, words = harm(data, rng)
        nothing = {f"data__{name}_images": None for name in ("search", "train", "test")}
        batches = {f"{name}__batch_size": 2 for name in ("search", "evaluation")}
        body = partial(runs.begin, path, f"folder:{data}", data__image_size=8, **nothing, **batches)
        code, told = runs.told(body)
        unclear = said(code, right) or ("" if words in told else f"not said: {words}: {told[:400]}")
        lost = "a run was begun" if right == REFUSED and path.exists() else ""
        yield Trial(what=harm.__name__, path=path, lost=lost, unclear=unclear)


def _write_images(folder: Path, rng: random.Random) -> None:
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for index in range(12):
            values = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (8, 8))
            Image.fromarray(values.astype(np.uint8)).save(folder / label / f"{index}.png")


# ------------------------------ archives


def hostile_archives(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """An archive of CIFAR whose members lead outside, that is cut, or has a changed bit: the images
    of the whole one, or an error; and nothing outside the archive is written.
    """
    files = binary_files("cifar10", random_parts("cifar10"))
    right = runs.folder / "right" / "cifar-10-binary.tar.gz"
    right.parent.mkdir(exist_ok=True)
    write_archive(right, files)
    expected = load_dataset("cifar10", right.parent).train
    for number in range(min(most, 40)):
        path = runs.folder / f"archive-{number}"
        path.mkdir()
        archive = path / right.name
        what = _write_hostile(archive, right.read_bytes(), files, rng)

        def body(path: Path = path) -> None:
            with reported_errors(Console(stderr=True)):
                train = load_dataset("cifar10", path).train
            same = torch.equal(train.pixels, expected.pixels)
            print("same" if same and torch.equal(train.labels, expected.labels) else "other")

        before = sorted(runs.folder.rglob("*"))
        code, told = runs.told(body)
        lost = "other images" if code == 0 and "same" not in told else ""
        if sorted(runs.folder.rglob("*")) != before or Path("/tmp/left-the-archive").exists():
            lost = "files were written"
        yield Trial(what=what, path=path, lost=lost, unclear=said(code, 0, REFUSED))


def _write_hostile(archive: Path, right: bytes, files: dict[str, bytes], rng: random.Random) -> str:
    """Writes an archive with one fault; returns which."""
    content = bytearray(right)
    kind = rng.choice(["cut", "flipped", "flipped", "outside", "links", "head", "stored"])
    at = rng.randrange(len(content))
    if kind == "cut":
        del content[at:]
    elif kind == "flipped":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "stored":  # not compressed, so that only the checksum at the end sees the change
        content = bytearray(gzip.compress(gzip.decompress(right), compresslevel=0))
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        content = bytearray(_with_member(kind, files, rng))
    archive.write_bytes(content)
    return f"{kind} at {at}"


def _with_member(kind: str, files: dict[str, bytes], rng: random.Random) -> bytes:
    """An archive with one more member, or with links in place of its files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, held in files.items():
            info = tarfile.TarInfo(name)
            if kind == "links" and rng.random() < 0.5:
                info.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
                info.linkname = rng.choice(["/etc/passwd", "../../x", name])
                tar.addfile(info)
                continue
            info.size = len(held)
            tar.addfile(info, io.BytesIO(held))
        info = tarfile.TarInfo(rng.choice(["../out", "/tmp/left-the-archive", "a/../../out"]))
        if kind == "head":
            info.type = rng.choice([tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
            info.size = rng.choice([1, 10**6, 8 * 10**9])
            tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
        else:
            tar.addfile(info)
    return buffer.getvalue()


DATA_KINDS: dict[str, Kind] = {
    "image that is hostile": hostile_images,
    "archive that is hostile": hostile_archives,
}
