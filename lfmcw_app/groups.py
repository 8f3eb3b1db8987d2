"""A file that says which images (of one patient, say) must stay together."""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from lfmcw_app.bounded_files import text_of
from lfmcw_app.errors import DataWarning, InputError, listed, shown
from lfmcw_app.folders import FolderListing, in_one_spelling
from lfmcw_app.near_paths import near_paths

__all__ = ["read_groups"]

COLUMNS = ("file", "group")
SEPARATORS = ",;\t"
"""A spreadsheet takes the semicolon where the comma is the decimal point."""
BEYOND = "\n"
"""Key of the fields of a row that are in no column; no column has this name."""
LONGEST = 2**28
"""Bytes of the file: some millions of images."""


def read_groups(file: Path, folder: Path, listing: FolderListing) -> dict[str, list[str]]:
    """Reads the group of every image of a folder.

    Args:
        file: CSV, UTF-8, with the columns file and group, separated by commas, semicolons or tabs.
            The files are relative to the folder:
            CLASS/NAME or PART/CLASS/NAME. It is looked for in the working directory, then in the
            folder.
        folder: holds the images.
        listing: of the folder.

    Returns:
        Part → the name of the group of each of its images, in their order.

    Raises:
        InputError: if the file cannot be used, lacks an image, or a group is in two parts.
    """
    path = next((place for place in (file, folder / file) if place.is_file()), None)
    if path is None:
        raise InputError(
            f"data.groups: there is no file {file}, here or in {folder}."
            f"{near_paths(file, os.path.isfile) or near_paths(folder / file, os.path.isfile)} It "
            "is a CSV file with the columns file and group. If it is elsewhere, name the place: "
            "--set data.groups=PATH"
        )
    known = _read(path)
    names = _names(listing)
    missing = [name for part in names.values() for name in part if name not in known]
    if missing:
        raise InputError(
            f"data.groups: {path} gives no group of {len(missing):,} "
            f"image{'s' * (len(missing) > 1)}: {listed(missing)}. Add a line for each, with its "
            f"path relative to {folder}."
        )
    unknown = known.keys() - {name for part in names.values() for name in part}
    if unknown:
        warnings.warn(
            f"data.groups: {path} has lines of {len(unknown):,} file{'s' * (len(unknown) > 1)} "
            f"not among the images of {folder}: {listed(sorted(unknown))}.",
            DataWarning,
            stacklevel=2,
        )
    groups = {part: [known[name] for name in of_part] for part, of_part in names.items()}
    _check_apart(groups, listing.folders)
    return groups


def _names(listing: FolderListing) -> dict[str, list[str]]:
    """Part → the paths of its images, relative to the folder."""
    found = {}
    for part, images in listing.parts.items():
        folders = [listing.folders[part]] if part in listing.folders else []
        found[part] = [
            "/".join([*folders, images.class_names[label], name])
            for label, name in zip(images.labels.tolist(), images.names, strict=True)
        ]
    return found


def _read(path: Path) -> dict[str, str]:
    """File → group."""
    try:
        text = text_of(path, LONGEST, encoding="utf-8-sig", pipes=True)
        head = text.partition("\n")[0]
        separator = max(SEPARATORS, key=head.count)
        lines = io.StringIO(text, newline="")
        rows = list(_rows(path, csv.DictReader(lines, restkey=BEYOND, delimiter=separator)))
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"data.groups: {path} cannot be read ({error}). It is a CSV file in UTF-8 with the "
            "columns file and group."
        ) from None
    groups: dict[str, str] = {}
    for line, name, group in rows:
        if groups.setdefault(name, group) != group:
            raise InputError(
                f"data.groups: line {line} of {path} gives {shown(name)} the group {shown(group)}; "
                f"an earlier line gives it {shown(groups[name])}."
            )
    return groups


def _rows(path: Path, reader: csv.DictReader[str]) -> Iterator[tuple[int, str, str]]:
    """Yields line, file and group of each row."""
    columns = [name.strip() for name in reader.fieldnames or ()]
    if not set(COLUMNS) <= set(columns):
        raise InputError(
            f"data.groups: {path} needs the columns file and group in its first line, separated by "
            f"commas, and has {listed([name[:80] for name in columns]) or 'none'}."
        )
    if twice := [column for column in COLUMNS if columns.count(column) > 1]:
        raise InputError(f"data.groups: line 1 of {path} names the column {twice[0]} twice.")
    reader.fieldnames = columns
    for row in reader:
        beyond = row.get(BEYOND, [])
        if any(map(str.strip, beyond)):
            raise InputError(
                f"data.groups: line {reader.line_num} of {path} has {len(columns) + len(beyond)} "
                f"fields, and the first line {len(columns)}. Put a name with "
                f"{shown(reader.reader.dialect.delimiter)} in it between double quotes."
            )
        name, group = ((row[column] or "").strip() for column in COLUMNS)
        if not name or not group:
            raise InputError(
                f"data.groups: line {reader.line_num} of {path} lacks a file or a group."
            )
        name = in_one_spelling(name.replace("\\", "/")).removeprefix("./")
        yield reader.line_num, name, group


def _check_apart(groups: Mapping[str, list[str]], folders: Mapping[str, str]) -> None:
    """Refuses a group that is in two parts."""
    parts = [(folders.get(part, part), set(names)) for part, names in groups.items()]
    for index, (one, names) in enumerate(parts):
        for other, others in parts[index + 1 :]:
            both = sorted(names & others)
            if both:
                raise InputError(
                    f"data.groups: {len(both):,} group{'s are' if len(both) > 1 else ' is'} in "
                    f"{one} and in {other}: {listed(both)}. Move the images of a group into one "
                    "part, or drop data.groups."
                )
