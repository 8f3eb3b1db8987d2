"""Identifies a data set, so that a run or a table never continues on other data."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmcw_app.bounded_files import read_object
from lfmcw_app.errors import DataWarning, InputError, listed
from lfmcw_app.folders import Listing
from lfmcw_app.run_files import DATASET

__all__ = ["Fingerprint", "check_unchanged", "differences"]

MOST_LETTERS = 400_000
"""Maximum number of letters of all names of files that are kept, to say which changed."""


@dataclass(frozen=True, kw_only=True)
class ClassPrint:
    """The images of a class in a part.

    Attributes:
        count: number of images.
        digest: of names and sizes of their files, or of their pixels.
        files: name → size in bytes; None where they are not kept.
    """

    count: int
    digest: str
    files: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A data set's classes, parts, and images.

    Images in files are identified by their names within the class's folder and their sizes, not by
    where the folder is. Images in memory are identified by their pixels.

    Attributes:
        digest: equal for equal data only; empty for data that cannot be read again.
        parts: part → class → its images, classes in the order of their labels.
    """

    digest: str = ""
    parts: Mapping[str, Mapping[str, ClassPrint]] = field(default_factory=dict)

    @classmethod
    def of_files(
        cls, parts: Mapping[str, Listing], groups: Mapping[str, Sequence[str]] | None = None
    ) -> Fingerprint:
        """The fingerprint of listed files.

        Args:
            parts: part → its files.
            groups: part → name of the group of each file.
        """
        letters = sum(len(name) for listing in parts.values() for name in listing.names)
        found = {}
        for part, listing in parts.items():
            of_part = groups[part] if groups is not None else None
            found[part] = dict(_of_listing(listing, of_part, keep=letters <= MOST_LETTERS))
        return cls._of(found)

    @classmethod
    def of_pixels(
        cls, parts: Mapping[str, tuple[Tensor, Tensor]], class_names: Sequence[str]
    ) -> Fingerprint:
        """The fingerprint of images in memory.

        Args:
            parts: part → pixels [N, C, H, W], uint8, and labels [N].
            class_names: of the labels.
        """
        found = {}
        for part, (pixels, labels) in parts.items():
            of_part = {}
            for label, name in enumerate(class_names):
                # With their places, because the order decides which images are in D_tr.
                places = (labels == label).nonzero()[:, 0]
                digest = hashlib.sha256(repr(tuple(pixels.shape[1:])).encode())
                digest.update(places.numpy().tobytes())
                digest.update(pixels[places].contiguous().numpy().tobytes())
                of_part[name] = ClassPrint(count=len(places), digest=digest.hexdigest()[:16])
            found[part] = of_part
        return cls._of(found)

    @classmethod
    def of_name(cls, name: str) -> Fingerprint:
        """The fingerprint of data that are a function of their name, such as noise."""
        return cls(digest=hashlib.sha256(name.encode()).hexdigest()[:16])

    @classmethod
    def _of(cls, parts: Mapping[str, Mapping[str, ClassPrint]]) -> Fingerprint:
        content = [
            [part, name, images.count, images.digest]
            for part, classes in parts.items()
            for name, images in classes.items()
        ]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        return cls(digest=digest, parts=parts)

    def to_data(self) -> dict[str, Any]:
        """As plain data."""

        def data_of(images: ClassPrint) -> dict[str, Any]:
            files = {} if images.files is None else {"files": dict(images.files)}
            return {"count": images.count, "digest": images.digest, **files}

        return {
            "digest": self.digest,
            "parts": {
                part: dict(zip(classes, map(data_of, classes.values()), strict=True))
                for part, classes in self.parts.items()
            },
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Reads what `to_data` returned.

        Raises:
            KeyError, TypeError, AttributeError: if it is something else.
        """
        parts = {}
        for part, classes in data["parts"].items():
            parts[part] = {name: ClassPrint(**images) for name, images in classes.items()}
        return cls(digest=str(data["digest"]), parts=parts)


def _of_listing(
    listing: Listing, groups: Sequence[str] | None, *, keep: bool
) -> Iterator[tuple[str, ClassPrint]]:
    counts = torch.bincount(listing.labels, minlength=len(listing.class_names)).tolist()
    sizes = listing.sizes.tolist()
    start = 0
    for name, count in zip(listing.class_names, counts, strict=True):
        # A listing is class by class, in each class by name.
        where = slice(start, start + count)
        start += count
        files = dict(zip(listing.names[where], sizes[where], strict=True))
        content = [list(files.items()), *([] if groups is None else [list(groups[where])])]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        yield name, ClassPrint(count=count, digest=digest, files=files if keep else None)


# ------------------------------ comparison


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Says what differs, class by class; empty for equal fingerprints."""
    if old.digest == new.digest:
        return []
    before, after = _by_class(old), _by_class(new)
    said = [f"class {name!r} is new" for name in after if name not in before]
    said += [f"class {name!r} is gone" for name in before if name not in after]
    for name in before:
        if name in after:
            said += _class_differences(name, before[name], after[name])
    return said or ["the order of the classes or the parts has changed"]


def _by_class(fingerprint: Fingerprint) -> dict[str, dict[str, ClassPrint]]:
    """Class → part → its images."""
    found: dict[str, dict[str, ClassPrint]] = {}
    for part, classes in fingerprint.parts.items():
        for name, images in classes.items():
            found.setdefault(name, {})[part] = images
    return found


def _class_differences(
    name: str, before: Mapping[str, ClassPrint], after: Mapping[str, ClassPrint]
) -> list[str]:
    """What differs in a class that both have."""
    if before == after:
        return []
    old, new = _files(before), _files(after)
    if old is None or new is None:
        counts = [sum(images.count for images in parts.values()) for parts in (before, after)]
        if counts[0] != counts[1]:
            return [f"class {name!r} has {counts[1]:,} images instead of {counts[0]:,}"]
        return [f"class {name!r} has other images"]

    gone, came = old.keys() - new.keys(), new.keys() - old.keys()
    moved = {file for _, file in gone} & {file for _, file in came}
    kinds = {
        "added to": {file for _, file in came} - moved,
        "removed from": {file for _, file in gone} - moved,
        "in another part of": moved,
        "of another size in": {
            file[1] for file in old.keys() & new.keys() if old[file] != new[file]
        },
    }
    said = []
    for what, files in kinds.items():
        if files:
            images = f"{len(files):,} image{'s' * (len(files) > 1)}"
            said.append(f"{images} {what} class {name!r} ({listed(sorted(files))})")
    return said or [f"the images of class {name!r} have other groups (data.groups)"]


def _files(parts: Mapping[str, ClassPrint]) -> dict[tuple[str, str], int] | None:
    """Part and name → size of each file; None where names are not kept."""
    found = {}
    for part, images in parts.items():
        if images.files is None:
            return None
        found.update({(part, name): size for name, size in images.files.items()})
    return found


def check_unchanged(folder: Path, fingerprint: Fingerprint) -> None:
    """Checks that the data of a run are those that it began with.

    A folder of an earlier version, which kept no fingerprint, gets a warning.

    Args:
        folder: of the run, with dataset.json if it has begun.
        fingerprint: of the data that it would resume with.

    Raises:
        InputError: saying what is different, or that dataset.json is damaged.
    """
    path = folder / DATASET
    try:
        data = read_object(path) if path.exists() else {}
        kept = data.get("fingerprint")
        before = None if kept is None else Fingerprint.from_data(kept)
    except PermissionError:  # it may be whole, and is not to be deleted
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}). It says which data the run began with. Put it "
            "back, or delete it if the data are certainly the same."
        ) from None
    if before is None:
        if path.exists() or any(folder.glob("*.pt")):
            warnings.warn(
                f"{folder} does not say which data its run began with, because it is of an "
                "earlier version. Whether they are still the same cannot be checked.",
                DataWarning,
                stacklevel=2,
            )
        return
    changes = differences(before, fingerprint)
    if changes:
        raise InputError(
            f"The data have changed since the run in {folder} began: {listed(changes, most=6)}. A "
            "resumed run could be tested on images that it was trained on, or confuse classes. "
            "Put the files back as they were and resume, or start a new run."
        )
