"""Finds and downloads the files of published data sets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from lfmcw_app.errors import InputError

__all__ = ["PLACES", "describe_places", "download", "places", "unusable_file"]

PLACES = (".", "data", "../data", "~/data", "~/datasets")
"""Where people keep data sets for torchvision, which has no fixed place."""


def places(root: Path, folders: Sequence[str]) -> list[Path]:
    """Returns the folders in which the files of a data set are looked for, in this order.

    Args:
        root: folder of data files, the first place; those of `PLACES` follow.
        folders: where the files lie in such a place, "." for the place itself.
    """
    found: dict[Path, Path] = {}  # real path → the first one that leads there
    for place in (root, *map(Path, PLACES)):
        for folder in folders:
            path = Path(os.path.expanduser(place)) / folder  # as it is for a user without a home
            found.setdefault(path.resolve(), path)
    return list(found.values())


def describe_places(root: Path, folders: Sequence[str]) -> str:
    """The same places in words, which are shorter than their paths."""
    within = " or ".join("the folder itself" if folder == "." else folder for folder in folders)
    return f"{', '.join(dict.fromkeys((str(root), *PLACES)))} ({within})"


def unusable_file(path: Path, error: Exception) -> InputError:
    """The error for a file of data that is damaged, or that the system does not let this read."""
    if isinstance(error, OSError) and error.strerror:
        return InputError(
            f"The file {path} cannot be read ({error.strerror}). It may be intact: fix the "
            "permissions, or repair the disk."
        )
    return InputError(f"The file {path} is damaged ({error}). Delete it and fetch it again.")


def download(
    dataset: str, url: str, folder: Path, md5: str, *, looked: str, otherwise: str
) -> None:
    """Downloads a file into a folder. It gets its name once its checksum is right.

    Args:
        dataset: whose file it is.
        url: where it is published.
        folder: where it goes; it is made.
        md5: of the file, as published.
        looked: where it was looked for, in words; see `describe_places`.
        otherwise: what the user can do without a download.

    Raises:
        InputError: if it cannot be downloaded, or is the wrong file. Nothing of it is kept.
    """
    # This import takes seconds, so it is done only if it is needed.
    from torchvision.datasets.utils import download_url

    missing = [made for made in (folder, *folder.parents) if not made.exists()]
    name = url.rpartition("/")[2]
    partial = folder / f"{name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name until its checksum is right: later runs read the file unchecked.
        download_url(url, str(folder), filename=partial.name, md5=md5)
        partial.replace(folder / name)
    except (OSError, RuntimeError) as error:
        # urllib's errors are OSErrors; a wrong checksum is a RuntimeError.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()  # only where it is empty
        raise InputError(
            f"The data set {dataset} is not in {looked}, and could not be downloaded from {url} "
            f"({error}). Connect to the internet, or {otherwise}; or try the bundled data set: "
            "digits."
        ) from None
