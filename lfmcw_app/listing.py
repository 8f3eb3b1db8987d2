"""Which image files a folder holds: one subfolder per class, split into parts or not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lfmcw_app.errors import InputError

__all__ = ["Listing", "list_split"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "validation")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The image files of a folder with one subfolder per class.

    Attributes:
        paths: N files, class by class.
        labels: [N], int64: positions in `class_names`.
        class_names: names of the subfolders, sorted.
    """

    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]


def list_split(folder: Path) -> tuple[Listing, Listing | None]:
    """Lists training and test images.

    They are in folder/train/CLASS/* and folder/test/CLASS/* (or val, validation), or all in
    folder/CLASS/*.

    Returns:
        The training images and the test images; all images and None for a folder that is not split.

    Raises:
        InputError: if there are no images, a class is empty, or the two parts have different
            classes.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}.")
    if not _class_folders(folder / "train"):
        return _list_classes(folder), None
    held_out = next((folder / name for name in TEST_FOLDERS if _class_folders(folder / name)), None)
    if held_out is None:
        raise InputError(
            f"{folder} has classes in its folder train, but none in {', '.join(TEST_FOLDERS)}. Put "
            "the test images into one of these, one folder a class; or put all class folders into "
            f"{folder} itself, to have a fifth held out."
        )
    train, test = _list_classes(folder / "train"), _list_classes(held_out)
    if train.class_names != test.class_names:
        name = min(set(train.class_names) ^ set(test.class_names))
        has, lacks = "train", held_out.name
        if name not in train.class_names:
            has, lacks = lacks, has
        raise InputError(
            f"{folder} has different classes in train ({len(train.class_names)}) and "
            f"{held_out.name} ({len(test.class_names)}): {name!r} is in {has} and not in {lacks}."
        )
    return train, test


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _list_classes(folder: Path) -> Listing:
    classes = _class_folders(folder)
    if len(classes) < 2:
        raise InputError(
            f"{folder} needs at least two folders of images, one a class, and has {len(classes)}. "
            f"For example: {folder / 'cat' / '1.png'}, {folder / 'dog' / '1.png'}."
        )
    paths: list[str] = []
    counts = []
    for path in classes:
        # `scandir` knows what is a file without asking the system for each of a million.
        with os.scandir(path) as entries:
            files = sorted(
                entry.path
                for entry in entries
                if entry.name.lower().endswith(SUFFIXES) and entry.is_file()
            )
        files = [file for file in files if not os.path.basename(file).startswith(".")]
        if not files:
            raise InputError(
                f"The class folder {path} has no images (files ending in {', '.join(SUFFIXES)}). "
                "Add some, or remove it."
            )
        paths += files
        counts.append(len(files))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return Listing(
        paths=tuple(paths), labels=labels, class_names=tuple(path.name for path in classes)
    )
