"""Which image files a folder holds: their classes, their parts, and what is left out."""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from PIL import Image, features
from torch import Tensor

from lfmcw_app.bounded_files import text_of
from lfmcw_app.errors import InputError, listed
from lfmcw_app.near_paths import near_paths
from lfmcw_app.printing import printable

__all__ = [
    "FolderListing", "Listing", "identity_of", "image_suffixes", "images_below", "in_one_spelling",
    "list_folder", "list_parts", "name_as_text",
]  # fmt: skip

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = {
    "train": TRAIN, "training": TRAIN,
    "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "dev": VALIDATION,
    "test": TEST, "testing": TEST,
}  # fmt: skip
"""Name of a part's folder, as `_plain` has it → the part."""

LIKE_PARTS = {
    **PARTS,
    "trainval": TRAIN,
    "eval": TEST, "evaluation": TEST, "holdout": TEST, "heldout": TEST,
}  # fmt: skip
"""Word in the name of a folder that may be a part → what it may be."""

CLASSES_FILE = "classes.txt"
"""Lists the class folders where they could be taken for parts, one on each line."""
LONGEST_CLASSES = 2**24
"""Bytes of that file."""

ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
"""Endings of a file, given in place of a folder, that is to be unpacked."""
OTHER_FORMS = {
    ".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".parquet", ".arrow", ".npz", ".npy", ".h5",
    ".hdf5", ".mat", ".tar",
}  # fmt: skip
"""Endings of files in a folder without classes that may tell the classes of its images, or hold
images and labels (`.tar`: the shards of WebDataset, which nobody unpacks)."""
ANOTHER_FORM = 'lfmcw_app.register_dataset; "Other forms of data" in docs/own-pictures.md'

SYSTEM_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found",
    "system volume information",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}

BREAKS = dict.fromkeys(map(ord, "\t\n\u2028\u2029"), "\N{REPLACEMENT CHARACTER}")

NEEDS_OTHERS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows by name, but decodes only with other programs, if at all."""

OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
"""Format → what Pillow must have been built with."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The image files of a folder with one subfolder per class.

    Attributes:
        paths: N files, class by class, in each class by name.
        labels: [N], int64: positions in `class_names`.
        class_names: names of the subfolders, sorted.
        names: N paths relative to the class's folder, with "/": these identify them wherever the
            folder is.
        sizes: [N], int64: bytes.
    """

    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: Tensor) -> Listing:
        """The files at `indices`, [M]."""
        chosen = indices.tolist()
        return Listing(
            paths=tuple(self.paths[index] for index in chosen),
            labels=self.labels[indices],
            class_names=self.class_names,
            names=tuple(self.names[index] for index in chosen),
            sizes=self.sizes[indices],
        )


@dataclass(frozen=True, kw_only=True)
class FolderListing:
    """What a folder holds.

    Attributes:
        parts: "train", "validation" or "test" → its images. A folder that is not split has
            "train" only.
        folders: part → the name of its folder; empty for a folder that is not split.
        skipped: kind (".txt", "hidden", …) → number of files that are left out.
        skipped_folders: names of folders that are left out, sorted.
        notes: what else a user should know about how the folder was read.
    """

    parts: Mapping[str, Listing]
    folders: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    skipped_folders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe_left_out(self) -> str:
        """What was left out, as text; empty if nothing was."""
        said = []
        if self.skipped:
            total = sum(self.skipped.values())
            kinds = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
            said.append(
                f"{total:,} file{'s' * (total > 1)} skipped: "
                f"{listed([f'{count:,} {kind}' for kind, count in kinds], most=6)}"
            )
        if self.skipped_folders:
            count = len(self.skipped_folders)
            names = listed(sorted(set(self.skipped_folders)), most=3)
            said.append(f"{count:,} folder{'s' * (count > 1)} skipped: {names}")
        return "; ".join([*said, *self.notes])


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of files that this build of Pillow reads, in lower case."""
    known = Image.registered_extensions()  # loads all of Pillow's readers
    return frozenset(
        suffix
        for suffix, kind in known.items()
        if kind in Image.OPEN
        and kind not in NEEDS_OTHERS
        and (kind not in OPTIONAL or features.check(OPTIONAL[kind]))
    )


# ------------------------------ a folder as a user has it


def list_folder(folder: Path) -> FolderListing:
    """Lists the images of a folder.

    They are in folder/CLASS/…, or in folder/PART/CLASS/… where the folder holds parts and nothing
    else. A part is called train or training; val, valid, validation or dev; test or testing, in any
    case, also with "set" after it (train_set). Folders within a class belong to it. Links are
    followed. What could be parts under other names is refused, unless a file classes.txt in the
    folder lists all of its folders as classes.

    Without a test part the validation part is the test part, as ImageNet has it.

    Raises:
        InputError: if there are no images, a class is empty, parts have different classes, or the
            folder cannot be understood.
    """
    if folder.is_file():
        raise InputError(f"{folder} is a file, and not a folder of images. {_instead_of(folder)}")
    if not folder.is_dir():
        place = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise InputError(
            f"There is no folder {folder}{place}.{_unexpanded(folder)}"
            f"{near_paths(folder, os.path.isdir)}"
        )
    found = _Skipped()
    children = _folders(folder, found)
    parts = _find_parts(folder, children)
    if parts:
        return list_parts(folder, parts, found)

    found.beside(folder)
    listing = _list_classes({TRAIN: folder}, {TRAIN: children}, found)[TRAIN]
    notes: tuple[str, ...] = ()
    if others := _other_forms([folder]):  # a table of classes, perhaps, beside images and masks
        names = listed([name_as_text(path.name) for path in children])
        notes = (f"the classes are the folders {names}, not from {listed(others)}",)
    return found.added_to({TRAIN: listing}, {}, notes)


def _instead_of(file: Path) -> str:
    """Advice on a file where a folder is wanted."""
    if _suffix(file.name) in ARCHIVES:
        return "Unpack it, and name the folder that holds the folders of the classes."
    return (
        "Name the folder that holds the folders of the classes; for images and labels in another "
        f"form write a function ({ANOTHER_FORM})."
    )


def _unexpanded(folder: Path) -> str:
    """Advice on a path that is written as in a browser or a shell; "" for others."""
    if str(folder).startswith("file:"):
        return " Write the path alone, without file://."
    if "$" in str(folder):
        return " Variables are not replaced here: write the path itself."
    return ""


def list_parts(
    folder: Path, parts: Mapping[str, Path], found: _Skipped | None = None
) -> FolderListing:
    """Lists the images of parts. Each part is a folder with one subfolder per class.

    Args:
        folder: what holds the parts; for messages.
        parts: "train" and at least one of "validation" and "test" → folder.
        found: what was left out already.

    Raises:
        InputError: if a class is empty, or the parts have different classes.
    """
    found = found or _Skipped()
    found.beside(folder, besides=parts.values())
    notes: tuple[str, ...] = ()
    if TEST not in parts:
        name = parts[VALIDATION].name
        notes = (f"{name} is the test part, since there is no folder test",)
        parts = {TRAIN: parts[TRAIN], TEST: parts[VALIDATION]}
    classes = {}
    for part, path in parts.items():
        classes[part] = _folders(path, found)
        found.beside(path)
    listings = _list_classes(parts, classes, found)
    _check_classes(folder, parts, listings)
    return found.added_to(listings, {part: path.name for part, path in parts.items()}, notes)


def _find_parts(folder: Path, children: Sequence[Path]) -> dict[str, Path]:
    """Part → its folder; empty where the children are classes.

    Raises:
        InputError: if there are parts, but not those that can be used.
    """
    if _listed_as_classes(folder, children):
        return {}
    named = [path for path in children if _plain(path.name) in PARTS]
    split = [path for path in named if _folders(path)]
    others = [path for path in children if path not in named and (not split or _has_image(path))]
    if not named or (others and len(split) < 2) or len(children) == len(named) == 1 > len(split):
        _check_no_parts(folder, children)
        return {}  # a class may be called train

    if others:
        raise InputError(
            f"{folder} holds parts ({listed([path.name for path in split])}) beside other folders "
            f"with images ({listed([path.name for path in others])}). Move the others away, or "
            "move all class folders into one of the parts."
        )
    flat = [path.name for path in named if path not in split]
    if flat:
        raise InputError(
            f"{folder} holds parts ({listed([path.name for path in named])}), but {listed(flat)} "
            "has no class folders, so that no image of it has a class. Put its images into one "
            "folder per class, or move it elsewhere."
            f"{_by_a_function([folder, *(folder / name for name in flat)])}"
        )
    parts: dict[str, Path] = {}
    for path in named:
        part = PARTS[_plain(path.name)]
        if part in parts:
            raise InputError(
                f"{folder} holds two folders for one part: {parts[part].name} and {path.name}. "
                "Merge them, or move one away."
            )
        parts[part] = path
    if TRAIN not in parts:
        raise InputError(
            f"{folder} has classes in {listed([path.name for path in named])}, but no folder train "
            "beside it. Put the training images there, one folder per class; or name the folder "
            f"of the classes itself (folder:{named[0]}), to have a fifth of it held out."
        )
    if len(parts) == 1:
        raise InputError(
            f"{folder} has classes in its folder {parts[TRAIN].name}, but there is no folder test "
            "or val beside it. Put the test images into one of these, one folder per class; or "
            f"name the training folder itself (folder:{parts[TRAIN]}), to have a fifth held out."
        )
    return {part: parts[part] for part in (TRAIN, VALIDATION, TEST) if part in parts}


def _plain(name: str) -> str:
    """The name of a folder without what does not matter for a part: "Train_set " → "train"."""
    return re.sub(r"[ _-]?set$", "", name.strip().lower())


def _listed_as_classes(folder: Path, children: Sequence[Path]) -> bool:
    """Whether the file of classes says that all of the folders are classes."""
    try:
        text = text_of(folder / CLASSES_FILE, LONGEST_CLASSES, encoding="utf-8-sig")
    except (OSError, ValueError):  # most folders have none; another file of this name is no list
        return False
    names = {name_as_text(path.name).strip() for path in children}
    return names <= {in_one_spelling(line).strip() for line in text.splitlines()}


def _check_no_parts(folder: Path, children: Sequence[Path]) -> None:
    """Refuses folders that are taken for classes although they may be parts of other names.

    A network would learn to tell the parts from each other.

    Raises:
        InputError: if all names are like those of parts, if all folders hold the same folders and
            nothing else, or if one that has the name of a part holds folders and nothing else.
    """
    if len(children) < 2:
        return
    kinds = [_likeness(path.name) for path in children]
    whole = [path for path in children if _plain(path.name) in PARTS and len(_inner(path)) > 1]
    if shared := _shared(children):
        why = f"each holds folders of the same names ({listed(shared)})"
    elif None not in kinds and len(set(kinds)) > 1:
        why = "their names are like those of parts"
    elif whole:
        why = f"{whole[0].name} holds only folders ({listed(_inner(whole[0]))})"
    else:
        return
    raise InputError(
        f"{folder} holds {listed([path.name for path in children])}, which may be parts instead of "
        f"classes: {why}. If they are parts, each with one folder per class, rename them to train, "
        f"val and test, or name only one of them (folder:{children[0]}) to have a fifth of it held "
        "out. If they are the classes, list their names in a file "
        f"{folder / CLASSES_FILE}, one on each line."
    )


def _shared(folders: Sequence[Path]) -> list[str]:
    """The names of the folders in folders, sorted, if most are the same in all; see `_inner`."""
    shared = every = set(_inner(folders[0]))
    for folder in folders[1:]:
        inner = set(_inner(folder)) if len(shared) > 1 else set()
        shared, every = shared & inner, every | inner
    return sorted(shared) if len(shared) > 1 and 2 * len(shared) > len(every) else []


def _inner(folder: Path) -> list[str]:
    """The names of the folders in a folder that has no image beside them; otherwise none."""
    if any(not _leads(entry.is_dir) and _is_image(entry) for entry in _entries(folder)):
        return []
    return [name_as_text(path.name) for path in _folders(folder)]


def _likeness(name: str) -> str | None:
    """The part that a word of a folder's name stands for; None if there is none."""
    words = (_plain(word) for word in re.split(r"[^a-z]+", name.lower()))
    return next((LIKE_PARTS[word] for word in words if word in LIKE_PARTS), None)


def _check_classes(
    folder: Path, parts: Mapping[str, Path], listings: Mapping[str, Listing]
) -> None:
    """Checks that all parts have the classes of the training part.

    Raises:
        InputError: naming those that only one part has.
    """
    train = listings[TRAIN]
    for part, listing in listings.items():
        both = ((train, parts[TRAIN].name), (listing, parts[part].name))
        for (one, has), (other, lacks) in (both, both[::-1]):
            only = sorted(set(one.class_names) - set(other.class_names))
            if only:
                counts = f"{len(one.class_names)} and {len(other.class_names)}"
                raise InputError(
                    f"{folder} has different classes in {has} and {lacks} ({counts}): "
                    f"{listed(list(map(repr, only)))} {'is' if len(only) == 1 else 'are'} in "
                    f"{has} and not in {lacks}. Every part needs every class."
                )


# ------------------------------ what is left out


class _Skipped:
    """What the listing of a folder leaves out."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.folders: list[str] = []

    def beside(self, folder: Path, besides: Iterable[Path] = ()) -> None:
        """Counts the files of a folder that are in none of its class folders.

        Args:
            folder: holds class folders, or parts.
            besides: its parts. Files in its other folders are counted too.
        """
        parts = [path.name for path in besides]
        for entry in _entries(folder):
            if not _leads(entry.is_dir):
                kind = _kind(entry)
                self.kinds[f"{kind} outside of class folders" if _is_image(entry) else kind] += 1
            elif parts and entry.name not in parts and not _is_ignored(entry.name):
                self.folders.append(name_as_text(entry.name))

    def add(self, other: _Skipped) -> None:
        """Adds what another one holds."""
        self.kinds += other.kinds
        self.folders += other.folders

    def added_to(
        self, parts: Mapping[str, Listing], folders: Mapping[str, str], notes: tuple[str, ...]
    ) -> FolderListing:
        """The listing of these parts, with what was left out of it."""
        nested = sum("/" in name for listing in parts.values() for name in listing.names)
        if nested:
            notes = (*notes, f"{nested:,} of the images are in folders within class folders")
        return FolderListing(
            parts=parts,
            folders=folders,
            skipped=dict(self.kinds),
            skipped_folders=tuple(sorted(self.folders)),
            notes=notes,
        )


def _leads(test: Callable[[], bool]) -> bool:
    """A test of what an entry is; a link that leads to itself is nothing."""
    try:
        return test()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _is_ignored(name: str) -> bool:
    """Whether a folder of this name is hidden, or made by an operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _is_image(entry: os.DirEntry[str]) -> bool:
    hidden = entry.name.startswith(".")
    return not hidden and _suffix(entry.name) in image_suffixes() and _leads(entry.is_file)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _kind(entry: os.DirEntry[str]) -> str:
    """The kind under which a skipped file is counted."""
    if entry.name.lower() in SYSTEM_FILES:
        return "of the system"
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "linked to nothing"
    return name_as_text(_suffix(entry.name)) or "without an ending"


def name_as_text(name: str) -> str:
    """A file's name as text: one spelling on all systems, on one line, and always printable.

    Some systems write é as e with an accent. What is not UTF-8, or would steer a terminal, becomes
    a replacement character.
    """
    return in_one_spelling(os.fsencode(name).decode("utf-8", "replace"))


def in_one_spelling(text: str) -> str:
    """A name that is text already, such as a class of a network, as `name_as_text` has it.

    (The system's encoding of file names, with which Python reads them, may lack its letters.)
    """
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return unicodedata.normalize("NFC", printable(whole).translate(BREAKS))


# ------------------------------ reading folders


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    # `scandir` knows what is a file without asking the system for each of a million.
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: name_as_text(entry.name))
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be read ({error.strerror or error})."
        ) from None


def _folders(folder: Path, found: _Skipped | None = None) -> list[Path]:
    """The folders in a folder that may be classes or parts, sorted; counts the others."""
    chosen = []
    for entry in _entries(folder):
        if _leads(entry.is_dir):
            if not _is_ignored(entry.name):
                chosen.append(folder / entry.name)
            elif found is not None:
                found.folders.append(name_as_text(entry.name))
    return chosen


def images_below(folder: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """All images in a folder and the folders below it, whatever these mean.

    Returns:
        images: pairs of the name relative to the folder, with "/", and the path.
        skipped: kind of file → how many are no images.

    Raises:
        InputError: if a folder cannot be read.
    """
    found = _Skipped()
    images = [(name, path) for name, path, _ in _files(folder, {identity_of(folder)}, found)]
    return images, dict(found.kinds)


def _has_image(folder: Path) -> bool:
    """Whether there is an image below a folder."""
    return next(_files(folder, {identity_of(folder)}, _Skipped()), None) is not None


def identity_of(path: str | Path) -> tuple[int, int]:
    """What is equal for all names of one file or folder."""
    state = os.stat(path)
    return state.st_dev, state.st_ino


def _files(
    folder: str | Path, seen: set[tuple[int, int]], found: _Skipped
) -> Iterator[tuple[str, str, int]]:
    """Yields the images below a folder: name relative to it, path, size in bytes.

    Args:
        folder: where.
        seen: folders that are not entered: those that were read already, or hold this one. A link
            may lead back.
        found: gets what is left out.
    """
    # Folders that are being read, outermost first: each with its prefix and what is left of it.
    # (A folder may be deeper than functions may call themselves.)
    reading = [("", iter(_entries(folder)))]
    while reading:
        prefix, left = reading[-1]
        entry = next(left, None)
        if entry is None:
            reading.pop()
        elif _leads(entry.is_dir):
            if _is_ignored(entry.name) or identity_of(entry.path) in seen:
                found.folders.append(name_as_text(entry.name))
                continue
            seen.add(identity_of(entry.path))
            reading.append((f"{prefix}{name_as_text(entry.name)}/", iter(_entries(entry.path))))
        elif _is_image(entry):
            yield f"{prefix}{name_as_text(entry.name)}", entry.path, entry.stat().st_size
        else:
            found.kinds[_kind(entry)] += 1


def _list_classes(
    roots: Mapping[str, Path], classes: Mapping[str, Sequence[Path]], found: _Skipped
) -> dict[str, Listing]:
    """Lists the images of the class folders of each part.

    Raises:
        InputError: if a part has fewer than two classes, a class has no images, or two class
            folders are one.
    """
    for part, folder in roots.items():
        _check_number(folder, classes[part])
    folders = [path for paths in classes.values() for path in paths]
    places: dict[tuple[int, int], Path] = {}
    for path in folders:
        same = places.setdefault(identity_of(path), path)
        if same is not path:
            raise InputError(
                f"The class folders {same} and {path} are one folder under two names. Remove one "
                "of them."
            )
    _check_names(classes)
    # A link may lead to another class, or to what holds this folder: neither is in the class.
    above = {place for root in roots.values() for place in (root, *root.resolve().parents)}
    outside = {*places, *map(identity_of, above)}

    def read(path: Path) -> tuple[list[tuple[str, str, int]], _Skipped]:
        left_out = _Skipped()
        return list(_files(path, set(outside), left_out)), left_out

    # In threads: a network file system answers slowly, for each file.
    with ThreadPoolExecutor(16) as pool:
        results = dict(zip(folders, pool.map(read, folders), strict=True))
    _check_not_empty({path: left_out for path, (files, left_out) in results.items() if not files})
    for _, left_out in results.values():
        found.add(left_out)
    return {
        part: _joined([path.name for path in paths], [results[path][0] for path in paths])
        for part, paths in classes.items()
    }


def _joined(names: Sequence[str], files: Sequence[list[tuple[str, str, int]]]) -> Listing:
    """The listing of classes with their files."""
    counts = torch.tensor([len(of_class) for of_class in files])
    flat = [file for of_class in files for file in of_class]
    return Listing(
        paths=tuple(path for _, path, _ in flat),
        labels=torch.arange(len(names)).repeat_interleave(counts),
        class_names=tuple(map(name_as_text, names)),
        names=tuple(name for name, _, _ in flat),
        sizes=torch.tensor([size for _, _, size in flat], dtype=torch.int64),
    )


def _check_number(folder: Path, classes: Sequence[Path]) -> None:
    if len(classes) >= 2:
        return
    instead = ""
    if classes and len(_folders(classes[0])) >= 2:
        instead = f" Did you mean folder:{classes[0]}?"
    else:
        instead = _by_a_function([folder, *classes])
    raise InputError(
        f"{folder} needs at least two folders of images, one per class, and has {len(classes)}. "
        f"For example: {folder / 'cat' / '1.png'}, {folder / 'dog' / '1.png'}.{instead}"
    )


def _by_a_function(folders: Sequence[Path]) -> str:
    """Advice on files in these folders that may tell the classes; "" without any."""
    others = list(dict.fromkeys(_other_forms(folders)))
    if not others:
        return ""
    return (
        f" If the classes or the images are in {listed(others)}, write a function instead "
        f"({ANOTHER_FORM})."
    )


def _other_forms(folders: Sequence[Path]) -> list[str]:
    """The names of files that may tell the classes of images."""
    entries = [entry for folder in folders for entry in _entries(folder)]
    return [
        name_as_text(entry.name)
        for entry in entries
        if _suffix(entry.name) in OTHER_FORMS and not entry.name.startswith(".")
    ]


def _check_names(classes: Mapping[str, Sequence[Path]]) -> None:
    """Checks that the classes of each part still differ in what is shown of their names."""
    for paths in classes.values():
        named: dict[str, Path] = {}
        for path in paths:
            other = named.setdefault(name_as_text(path.name), path)
            if other is not path:
                raise InputError(
                    f"The class folders {str(other)!r} and {str(path)!r} have one name in text, "
                    f"{name_as_text(path.name)!r}. Rename one of them."
                )


def _check_not_empty(empty: Mapping[Path, _Skipped]) -> None:
    if not empty:
        return
    kinds: Counter[str] = sum((left_out.kinds for left_out in empty.values()), Counter())
    holds = listed([f"{count} {kind}" for kind, count in kinds.most_common()], most=6)
    one = len(empty) == 1
    raise InputError(
        f"The class folder{'' if one else 's'} {listed(list(map(str, empty)))} "
        f"{'has' if one else 'have'} no images{f' (but {holds})' if holds else ''}. Add some "
        "(PNG, JPEG, TIFF, WebP or another format that Pillow reads), or remove the folder."
    )
