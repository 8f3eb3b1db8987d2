"""Which images a run was trained on: an error on these is not that of a test.

A run folder keeps the part, the class, the name and the size of each picture (fingerprint.py). A
file of another size has other contents. Of equal size, the contents are compared where the run's
pictures are still in their place; elsewhere the class and the name decide.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lfmcw_app.bounded_files import read_object
from lfmcw_app.copies import digest_of_contents
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.folders import Listing, name_as_text
from lfmcw_app.names import FOLDER
from lfmcw_app.prediction import ImageFile
from lfmcw_app.readers import split_folder
from lfmcw_app.run_files import DATASET, EVALUATED
from lfmcw_app.run_folder import RunFolder

__all__ = ["TrainedImages"]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A picture that a run was trained on.

    Attributes:
        name: its class and its name, with "/".
        path: of the file, if it is still there with the size that it had.
    """

    name: str
    path: Path | None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedImages:
    """The pictures that a run was trained on, or that chose its cell.

    Attributes:
        run: its folder.
        folder: where the run's pictures are; None if they are no longer there.
        by_size: bytes → the pictures of that size.
    """

    run: Path
    folder: Path | None
    by_size: Mapping[int, Sequence[_Known]]
    _digests: dict[Path, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Path) -> TrainedImages:
        """Those of a run folder.

        Raises:
            InputError: saying why it cannot be told which they are.
        """
        try:
            described = read_object(run / DATASET)
            name, path = str(described["name"]), described.get("path")
            began = Fingerprint.from_data(described["fingerprint"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise InputError(
                f"{run} has no dataset.json with the names of its pictures; network.pt alone does "
                "not have them."
            ) from None
        if not name.startswith(FOLDER) or path is None:
            raise InputError(f"The run was trained on {name}, which is not a folder of pictures.")
        folder = Path(path) if os.path.isdir(path) else None
        parts = ["train"] if (run / EVALUATED).exists() else ["train", "validation"]
        return cls(run=run, folder=folder, by_size=_by_size(run, began, folder, parts))

    def marked(self, images: Sequence[ImageFile]) -> tuple[ImageFile, ...]:
        """The images, each with whether the run was trained on it."""
        return tuple(replace(image, trained_on=self.holds(image.path)) for image in images)

    def holds(self, path: Path) -> bool:
        """Whether the run was trained on an image, under whatever name."""
        try:
            known = self.by_size.get(path.stat().st_size, ()) if path.is_file() else ()
        except OSError:
            return False  # it cannot be read, which whoever predicts it says
        there = [picture.path for picture in known if picture.path is not None]
        if there and any(self._digest(path) == self._digest(other) for other in there):
            return True
        whole = f"/{name_as_text(path.absolute().as_posix())}"
        gone = (picture for picture in known if picture.path is None)
        return any(whole.endswith(f"/{picture.name}") for picture in gone)

    def skips(self, path: Path) -> bool:
        """Whether the run was told to skip this file of its folder, if it cannot be read."""
        if self.folder is None or not path.absolute().is_relative_to(self.folder):
            return False
        try:
            return RunFolder.open(self.run).recipe.data.on_damaged == "skip"
        except InputError:  # the recipe is gone or damaged
            return False

    def _digest(self, path: Path) -> bytes:
        """Digest of a file's contents; of one that cannot be read, a digest that no file has."""
        if path not in self._digests:
            self._digests[path] = digest_of_contents(path) or os.fsencode(path)
        return self._digests[path]


def _by_size(
    run: Path, began: Fingerprint, folder: Path | None, parts: Sequence[str]
) -> dict[int, list[_Known]]:
    """Bytes → pictures of these parts; see `TrainedImages`."""
    listed = _Listed(run=run, folder=folder)
    found: dict[int, list[_Known]] = {}
    for part in parts:
        for name, images in began.parts.get(part, {}).items():
            files = images.files
            if files is None:
                files = listed.unchanged(began)[part, name]
            for file, size in files.items():
                path = listed.paths.get((part, name, file, size))
                found.setdefault(size, []).append(_Known(name=f"{name}/{file}", path=path))
    return found


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """The pictures that are in the run's folder of pictures, in the parts that the run uses."""

    run: Path
    folder: Path | None

    @cached_property
    def _split(self) -> tuple[Mapping[str, Listing], Mapping[str, Sequence[str]] | None]:
        """Part → its pictures, and the groups of these; nothing if the folder has changed much."""
        if self.folder is None:
            return {}, None
        how = RunFolder.open(self.run).recipe.data
        try:
            listing, groups = split_folder(
                self.folder, how.groups, skips_damaged=how.on_damaged == "skip"
            )
        except InputError:  # what is there is no data set any more; names and sizes remain
            return {}, None
        return listing.parts, groups

    @cached_property
    def paths(self) -> dict[tuple[str, str, str, int], Path]:
        """Part, class, name and size → path."""
        found = {}
        for part, listing in self._split[0].items():
            files = zip(
                listing.labels.tolist(),
                listing.names,
                listing.sizes.tolist(),
                listing.paths,
                strict=True,
            )
            for label, name, size, path in files:
                found[part, listing.class_names[label], name, size] = Path(path)
        return found

    def unchanged(self, began: Fingerprint) -> dict[tuple[str, str], dict[str, int]]:
        """Part and class → name and size of each picture, of a folder as the run has read it.

        Raises:
            InputError: if it has changed since.
        """
        if Fingerprint.of_files(*self._split).digest != began.digest:
            raise InputError(
                "The run has too many pictures to keep their names, and its folder of pictures is "
                "no longer as it was."
            )
        found: dict[tuple[str, str], dict[str, int]] = {}
        for part, name, file, size in self.paths:
            found.setdefault((part, name), {})[file] = size
        return found
