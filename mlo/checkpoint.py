"""Checkpoints on disk: written atomically, checksummed, versioned, read without unpickling code."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import re
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mlo.errors import CheckpointError, CheckpointWarning

__all__ = ["CheckpointStore", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 1

# A checkpoint is the ZIP archive that torch.save writes, with an archive comment: a mark, the
# version of the format, and the SHA-256 of every byte before the digits. So torch.load and any
# unzip can still read it. (torch itself does not notice a flipped bit.) See docs/checkpoints.md.
MARK = b"mlo-checkpoint v%d sha256:"
COMMENT = re.compile(rb"mlo-checkpoint v(\d+) sha256:([0-9a-f]{64})\Z")
DIGITS = 64
ARCHIVE_END = b"PK\x05\x06"
"""How the last 22 bytes of an archive without a comment begin.

The last two of them are the length of the comment, 0.
"""


MAKES_ROOM = b"\nbytearray\n"
"""How a pickle names Python's `bytearray`, of which no state has one."""


def save_checkpoint(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `state` so that `path` holds either all of it or its old content.

    The state goes to a temporary file in the same folder, is flushed to the disk, and takes the
    name `path` in one rename.

    Args:
        state: tensors and plain Python values, as from `MultilevelOptimizer.state_dict()`.
        path: the file; its folder must exist.

    Raises:
        CheckpointError: if the state holds something that `load_checkpoint` could not read back.
        OSError: if it cannot be written: a full disk, a folder that is read-only or gone. `path`
            then stays as it was.
    """
    content = _serialized(state)
    target = Path(path)
    temporary = _written(content, target)
    try:
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # A rename reaches the disk when the folder does.
    _flush_folder(target.parent)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, on the CPU, with `weights_only=True`.

    A file of `torch.save` without a checksum is read too, with a `CheckpointWarning`.

    Raises:
        CheckpointError: if the file is missing, truncated, changed, of a later version or not a
            checkpoint.
    """
    try:
        with _opened(path) as file:
            version = _checked_version(file, os.fspath(path))
            _check_archive(file, os.fspath(path))
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {os.fspath(path)}.") from None
    except PermissionError as error:
        raise _NotAllowed(
            f"The checkpoint {os.fspath(path)} cannot be read ({error.strerror or error}). It may "
            "be whole: give the permission to read it."
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged archive; all mean the same
        raise _unreadable(path, f"({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"The file {os.fspath(path)} holds a {type(state).__name__}, not a checkpoint."
        )
    if version == 0:
        warnings.warn(
            f"The checkpoint {os.fspath(path)} has no checksum, so damage to it would not be "
            "noticed.",
            CheckpointWarning,
            stacklevel=2,
        )
    return state


class _NotAllowed(CheckpointError):
    """This process may not read a checkpoint."""


class CheckpointStore:
    """The checkpoints of one run: the last one, the one before it, the best, and copies to keep.

    - NAME.pt: the last one.
    - NAME.previous.pt: the one before it, which is read if the last one is damaged.
    - NAME.best.pt: the one that was saved as the best.
    - NAME.round-N.pt: those that were saved to be kept.

    One process at a time may write to a store.

    Args:
        folder: where they are; it must exist.
        name: what their names begin with.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = "checkpoint") -> None:
        self.folder = Path(folder)
        self.name = name
        self._last_is_sound = False

    @property
    def last(self) -> Path:
        """The file of the last checkpoint."""
        return self.folder / f"{self.name}.pt"

    @property
    def previous(self) -> Path:
        """The file of the checkpoint before the last."""
        return self.folder / f"{self.name}.previous.pt"

    @property
    def best(self) -> Path:
        """The file of the best checkpoint."""
        return self.folder / f"{self.name}.best.pt"

    @property
    def kept(self) -> list[Path]:
        """The files of the checkpoints that were kept, the newest round first."""
        pattern = re.compile(rf"{re.escape(self.name)}\.round-(\d+)\.pt")
        found = [
            (int(match[1]), path)
            for path in self.folder.glob(f"{glob.escape(self.name)}.*")  # none in no folder
            if (match := pattern.fullmatch(path.name))
        ]
        return [path for _, path in sorted(found, reverse=True)]

    def exists(self) -> bool:
        """Whether there is a file that `load` would try."""
        return any(path.exists() for path in self._candidates())

    def save(
        self, state: dict[str, Any], *, best: bool = False, keep_as: int | None = None
    ) -> None:
        """Makes `state` the last checkpoint, and the last one the previous one.

        A failure leaves what `load` returns as it was.

        Args:
            state: see `save_checkpoint`.
            best: whether it is also the best one so far.
            keep_as: number under which a copy is kept; None: no copy.

        Raises:
            CheckpointError: if the state holds something that could not be read back.
            OSError: if it cannot be written.
        """
        content = _serialized(state)
        self.remove_leftovers()
        temporary = _written(content, self.last)
        # Two renames. Between them there is no last checkpoint, and `load` finds the previous one.
        try:
            # A damaged last checkpoint must not replace a sound previous one. A checkpoint that
            # this store has written or read is known to be sound.
            if self.last.exists() and (self._last_is_sound or _is_sound(self.last)):
                os.replace(self.last, self.previous)
            os.replace(temporary, self.last)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._last_is_sound = True
        _flush_folder(self.folder)
        # Copies come after the checkpoint itself is safe: a failure here loses a copy only.
        if best:
            _copy(self.last, self.best)
        if keep_as is not None:
            _copy(self.last, self.folder / f"{self.name}.round-{keep_as}.pt")

    def load(self, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any] | None:
        """Returns the last checkpoint, or the newest sound one before it.

        A `CheckpointWarning` says so if the last one is damaged or missing.

        Args:
            check: is shown a state that was read, and raises a CheckpointError if a run cannot
                resume from it.

        Returns:
            The state, or None if nothing was ever saved.

        Raises:
            CheckpointError: if there are checkpoints and none can be read; it says what is wrong
                with the last one. Or if this process may not read one, which may be whole.
        """
        # Report the first error: what is wrong with the last checkpoint.
        first: CheckpointError | None = None
        for path in self._candidates():
            if not path.exists() and path != self.last:
                continue
            try:
                state = load_checkpoint(path)
                if check is not None:
                    check(state)
            except _NotAllowed:  # a missing permission is no reason to compute rounds again
                raise
            except CheckpointError as error:
                first = first or error
                continue
            self._last_is_sound = path == self.last
            if first is not None:
                warnings.warn(
                    f"{first} The one before, {path.name}, takes its place; what came after it is "
                    "computed again.",
                    CheckpointWarning,
                    stacklevel=2,
                )
            return state
        if self.exists():
            assert first is not None
            raise first
        return None

    def _candidates(self) -> list[Path]:
        return [self.last, self.previous, *self.kept]

    def remove_leftovers(self) -> None:
        """Removes the temporary files of writers that were killed, as `save` does."""
        for path in self.folder.glob(f".{self.name}.*.part"):
            path.unlink(missing_ok=True)


def _serialized(state: dict[str, Any]) -> list[bytes | memoryview]:
    """The content of a checkpoint file, in pieces.

    It is made in memory, since torch.save would turn the OSError of a full disk into a RuntimeError
    about positions.
    """
    buffer = io.BytesIO()
    torch.save(_plain(state, ""), buffer)
    archive: memoryview[int] = buffer.getbuffer()
    mark = MARK % FORMAT_VERSION
    if bytes(archive[-2:]) != b"\0\0":
        raise CheckpointError(
            "torch.save wrote an archive with a comment, where the checksum would be."
        )
    # The archive ends in the length of its comment, 0: our comment's length takes its place.
    pieces: list[bytes | memoryview] = [
        archive[:-2],
        (len(mark) + DIGITS).to_bytes(2, "little"),
        mark,
    ]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return [*pieces, digest.hexdigest().encode()]


def _written(content: list[bytes | memoryview], target: Path) -> Path:
    """Writes a temporary file beside `target`, flushed to the disk, and returns its path.

    If it fails, no file is left.
    """
    # With the usual permissions of a file: `tempfile` would prevent all others from reading it.
    name = target.parent / f".{target.name}.{os.urandom(8).hex()}.part"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error
            os.unlink(name)
        raise
    return name


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, if the system can."""
    with contextlib.suppress(OSError):  # not on every file system; the rename itself is done
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    """Gives a file a second name, by a hard link if possible and otherwise by a copy."""
    # By a temporary name, so that the target is whole at any time.
    temporary = target.parent / f".{target.name}.copy.part"
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file, but no pipe, whose other end may never be opened, and no device.

    Raises:
        CheckpointError: if it is one.
        OSError: if it cannot be opened.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # (what opens a folder says so)
        raise _unreadable(path, "(it is a pipe, a socket or a device)")
    return open(path, "rb")


def _checked_version(file: BinaryIO, name: str) -> int:
    """Returns the version of a checkpoint's format, 0 for one without a checksum.

    Raises:
        CheckpointError: if its content does not match its checksum, or the version is a later one.
    """
    # The comment is at the very end, and shorter than 128 bytes.
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 128))
    end = file.read()
    found = COMMENT.search(end)
    if found is None:
        if end[-22:-18] == ARCHIVE_END and end[-2:] == b"\0\0":
            return 0
        raise _unreadable(name, "(it does not end in a checksum)")

    # The hash of everything before the checksum's own digits, in pieces of 1 MiB.
    digest = hashlib.sha256()
    file.seek(0)
    left = size - DIGITS
    while left > 0 and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    if digest.hexdigest().encode() != found[2]:
        raise _unreadable(name, "(its checksum does not match)")
    version = int(found[1])
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint {name} has format {version}; this version of mlo reads up to "
            f"{FORMAT_VERSION}. Use a later mlo."
        )
    return version


def _check_archive(file: BinaryIO, name: str) -> None:
    """Refuses an archive that takes more memory than it has bytes.

    `torch.save` packs nothing. A packed member, or several of the same bytes, can unpack to any
    size. `weights_only=True` allows a call that makes room for any number of bytes.

    Raises:
        CheckpointError: if it is one.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size:
            raise _unreadable(name, "(it unpacks to more bytes than it has)")
        for member in members:
            if member.filename.endswith("/data.pkl") and MAKES_ROOM in archive.read(member):
                raise _unreadable(name, "(it calls bytearray)")


def _is_sound(path: Path) -> bool:
    """Whether a file is as it was written."""
    try:
        with _opened(path) as file:
            _checked_version(file, path.name)
    except (OSError, CheckpointError):
        return False
    return True


def _unreadable(path: str | os.PathLike[str], why: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {os.fspath(path)} cannot be read: it is truncated, damaged or not a "
        f"checkpoint {why}. Use an earlier checkpoint, or start again in a new folder."
    )


def _plain(value: Any, where: str) -> Any:
    """Returns plain data: NumPy numbers and arrays as Python numbers and tensors.

    Raises:
        CheckpointError: for anything else, naming the place.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    if value is None or isinstance(
        value, (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    ):
        return value
    raise CheckpointError(
        f"The state{where} is a {type(value).__name__}, which cannot be read back without "
        "unpickling code. Keep tensors, numbers, strings, lists and dicts in states of modules, "
        "optimizers, schedulers and data."
    )
