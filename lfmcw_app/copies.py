"""Test images that are copies of training images: an error on these is not that of a test."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lfmcw_app.errors import DataWarning, listed
from lfmcw_app.folders import Listing
from lfmcw_app.image_survey import in_threads

__all__ = ["copies_in_files", "copies_in_memory", "digest_of_contents", "tell_copies"]

MOST_FILES = 20_000
"""Files that are read to compare them; those of rare sizes come first."""


def copies_in_memory(train: Tensor, test: Tensor) -> list[int]:
    """The places of test images with the pixels of a training image; both [N, C, H, W], uint8."""
    known = {_digest(image) for image in train}
    return [place for place, image in enumerate(test) if _digest(image) in known]


def copies_in_files(train: Listing, test: Listing) -> list[int]:
    """The places of test files with the contents of a training file.

    Only files whose size is in both parts are read, and at most `MOST_FILES` of them.
    """
    sizes, files = torch.unique(torch.cat([train.sizes, test.sizes]), return_counts=True)
    shared = torch.isin(sizes, train.sizes) & torch.isin(sizes, test.sizes)
    sizes, files = sizes[shared], files[shared]
    order = files.argsort(stable=True)
    sizes = sizes[order[files[order].cumsum(0) <= MOST_FILES]]
    chosen = [torch.isin(part.sizes, sizes).nonzero()[:, 0].tolist() for part in (train, test)]
    known, found = (
        in_threads(digest_of_contents, [part.paths[place] for place in places])
        for part, places in zip((train, test), chosen, strict=True)
    )
    contents = set(known) - {None}
    return [place for place, digest in zip(chosen[1], found, strict=True) if digest in contents]


def tell_copies(
    where: str, copies: list[int], test: int, paths: tuple[str, ...] = (), *, split: bool = True
) -> None:
    """Warns of test images that are copies.

    Args:
        where: names the data set.
        copies: their places among the test images.
        test: number of all test images.
        paths: of all test images, if they are files.
        split: whether the user has chosen the test images.
    """
    if not copies:
        return
    one = len(copies) == 1
    named = f" ({listed([paths[place] for place in copies], most=3)})" if paths else ""
    warnings.warn(
        f"{len(copies):,} of the {test:,} test images of {where} {'is' if one else 'are'} also "
        f"among the training images{named}: the network knows {'it' if one else 'them'}, so the "
        "test error is too low. Remove the copies"
        f"{'' if split else ', or keep them in one part with data.groups'}.",
        DataWarning,
        stacklevel=2,
    )


def _digest(image: Tensor) -> bytes:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).digest()


def digest_of_contents(path: str | Path) -> bytes | None:
    """The digest of a file; None if it cannot be read, which whoever decodes it tells."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
