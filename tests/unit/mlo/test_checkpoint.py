"""Checkpoint files: whole or not there, changed bits noticed, the one before at hand, readable by
plain torch.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import zipfile

import pytest
import torch
from modes_obeyed import with_mode
from noisy_regression import regression

import mlo
from mlo import checkpoint


def state(number):
    return {
        "number": number,
        "tensor": torch.arange(1000.0) + number,
        "nested": {"list": [1, 2.5, "x", None]},
    }


@pytest.fixture
def store(tmp_path):
    return mlo.CheckpointStore(tmp_path, "run")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back(tmp_path):
    """A checkpoint comes back, and is an archive that torch and zip read."""
    mlo.save_checkpoint(state(1), tmp_path / "a.pt")
    for loaded in (
        mlo.load_checkpoint(tmp_path / "a.pt"),
        torch.load(tmp_path / "a.pt", weights_only=True),
        torch.load(tmp_path / "a.pt", weights_only=True, mmap=True),
    ):
        assert loaded["nested"] == state(1)["nested"]
        assert torch.equal(loaded["tensor"], state(1)["tensor"])
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        mark, digits = archive.comment[:-64], archive.comment[-64:].decode()
    assert mark == b"mlo-checkpoint v1 sha256:"
    assert hashlib.sha256((tmp_path / "a.pt").read_bytes()[:-64]).hexdigest() == digits
    assert files(tmp_path) == ["a.pt"]


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    mlo.save_checkpoint({"tensor": torch.arange(20.0)}, path)
    content = path.read_bytes()
    places = [*range(0, len(content) - 200, 7), *range(len(content) - 200, len(content))]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(mlo.CheckpointError, match=r"a\.pt"):
            mlo.load_checkpoint(path)
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(mlo.CheckpointError, match="truncated, damaged or not a checkpoint"):
            mlo.load_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(mlo.CheckpointError):
        mlo.load_checkpoint(path)
    path.write_bytes(content)
    mlo.load_checkpoint(path)


def test_a_file_of_plain_torch_save_is_read_with_a_warning(tmp_path):
    torch.save(state(2), tmp_path / "a.pt")
    with pytest.warns(mlo.CheckpointWarning, match="no checksum"):
        assert mlo.load_checkpoint(tmp_path / "a.pt")["number"] == 2


def test_a_later_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    mlo.save_checkpoint(state(1), tmp_path / "a.pt")
    monkeypatch.undo()
    with pytest.raises(mlo.CheckpointError, match=r"has format 2.*reads up to 1"):
        mlo.load_checkpoint(tmp_path / "a.pt")


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("exploited",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mlo.CheckpointError, match="is a Exploit"):
        mlo.save_checkpoint({"x": Exploit()}, "a.pt")
    # A checksum is no signature.
    monkeypatch.setattr(checkpoint, "_plain", lambda value, where: value)
    mlo.save_checkpoint({"x": Exploit()}, "a.pt")
    with pytest.raises(mlo.CheckpointError):
        mlo.load_checkpoint("a.pt")
    assert files(tmp_path) == ["a.pt"]


def test_a_store_keeps_the_last_two_and_the_best(store, tmp_path):
    """A store keeps the last two, the best, and those to be kept."""
    assert store.load() is None
    assert not store.exists()
    for number in range(1, 6):
        store.save(state(number), best=number == 3, keep_as=number if number % 2 == 0 else None)
    assert files(tmp_path) == [
        "run.best.pt",
        "run.previous.pt",
        "run.pt",
        "run.round-2.pt",
        "run.round-4.pt",
    ]
    numbers = {path: mlo.load_checkpoint(path)["number"] for path in tmp_path.iterdir()}
    assert (numbers[store.last], numbers[store.previous]) == (5, 4)
    assert numbers[store.best] == 3
    assert [numbers[path] for path in store.kept] == [4, 2]


def test_kept_ones_are_ordered_by_number(store):
    for number in (9, 10, 100):
        store.save(state(number), keep_as=number)
    assert [path.name for path in store.kept] == [
        "run.round-100.pt",
        "run.round-10.pt",
        "run.round-9.pt",
    ]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_copies_outlive_the_last_one_being_replaced(store, links, monkeypatch):
    if not links:
        monkeypatch.setattr(
            os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here"))
        )
    store.save(state(1), best=True)
    store.save(state(2))
    store.last.write_bytes(b"")
    assert mlo.load_checkpoint(store.best)["number"] == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_last_one_falls_back_to_the_one_before(store, damage):
    """A damaged last one falls back to the one before with a warning."""
    for number in (1, 2, 3):
        store.save(state(number))
    harm(store.last, damage)
    with pytest.warns(mlo.CheckpointWarning, match=r"run\.pt.*run\.previous\.pt, takes its place"):
        assert mlo.CheckpointStore(store.folder, "run").load()["number"] == 2


def test_the_newest_sound_checkpoint_is_read(store):
    """Of several damaged ones the newest sound one is read; if there is none, it is an error."""
    for number in (1, 2, 3, 4):
        store.save(state(number), keep_as=number if number < 3 else None)
    harm(store.last, "flipped")
    harm(store.previous, "truncated")
    with pytest.warns(mlo.CheckpointWarning, match="round-2"):
        assert store.load()["number"] == 2
    for path in store.kept:
        harm(path, "flipped")
    with pytest.raises(mlo.CheckpointError, match=r"run\.pt"):
        store.load()


@pytest.mark.parametrize("loads_first", [True, False])
def test_a_damaged_last_one_never_replaces_a_sound_one(store, loads_first):
    """A damaged last one never takes the place of the sound one before."""
    store.save(state(1))
    store.save(state(2))
    harm(store.last, "flipped")
    later = mlo.CheckpointStore(store.folder, "run")
    if loads_first:
        with pytest.warns(mlo.CheckpointWarning):
            later.load()
    later.save(state(3))
    assert mlo.load_checkpoint(store.last)["number"] == 3
    assert mlo.load_checkpoint(store.previous)["number"] == 1


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_last_good_state(store, step, monkeypatch):
    """A save that fails at any step leaves the last good state and nothing else."""
    store.save(state(1))
    store.save(state(2))
    before = files(store.folder)
    full = OSError(28, "No space left on device")

    def fail(*arguments, **options):
        raise full

    if step == "write":
        monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: Full(descriptor))
    else:
        monkeypatch.setattr(os, step, fail)
    for save in (lambda: store.save(state(3)), lambda: mlo.save_checkpoint(state(3), store.last)):
        with pytest.raises(OSError, match="No space"):
            save()
    monkeypatch.undo()
    assert files(store.folder) == before
    assert mlo.CheckpointStore(store.folder, "run").load()["number"] == 2
    store.save(state(4))
    assert store.load()["number"] == 4
    assert mlo.load_checkpoint(store.previous)["number"] == 2


class Full(io.RawIOBase):
    """A file on a disk that takes ten bytes."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def write(self, data):
        os.write(self.descriptor, bytes(data[:10]))
        raise OSError(28, "No space left on device")

    def close(self):
        if not self.closed:
            os.close(self.descriptor)
        super().close()


def test_leftovers_of_killed_writers_are_removed_by_the_next(store, tmp_path):
    (tmp_path / ".run.pt.abcd.part").write_bytes(b"half")
    (tmp_path / ".run-2.pt.abcd.part").write_bytes(b"another store's")
    store.save(state(1))
    assert files(tmp_path) == [".run-2.pt.abcd.part", "run.pt"]


def harm(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])


def test_damaged_and_missing_checkpoints_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(mlo.CheckpointError, match="no checkpoint"):
        mlo.load_checkpoint(path)
    mlo.save_checkpoint(regression().state_dict(), path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(mlo.CheckpointError, match="truncated, damaged"):
            mlo.load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_unpickled(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    for name, write in (
        ("torch.pt", torch.save),
        ("plain.pt", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        write({"x": Evil()}, tmp_path / name)
        with pytest.raises(mlo.CheckpointError):
            mlo.load_checkpoint(tmp_path / name)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    mlo.save_checkpoint({"x": 1}, path)

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        mlo.save_checkpoint({"x": 2}, path)
    monkeypatch.undo()
    assert mlo.load_checkpoint(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_checkpoint_has_the_permissions_of_any_file(tmp_path):
    """Colleagues who may read the folder may read what is in it."""
    (tmp_path / "other").write_text("")
    mlo.save_checkpoint({"a": 1}, tmp_path / "run.pt")
    modes = {(tmp_path / name).stat().st_mode for name in ("other", "run.pt")}
    assert len(modes) == 1


def test_a_store_whose_folder_is_gone_has_nothing(tmp_path):
    store = mlo.CheckpointStore(tmp_path / "gone")
    assert not store.exists()
    assert store.kept == []
    assert store.load() is None


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(store):
    for number in (1, 2):
        store.save(state(number))
    with (
        with_mode(store.last, 0),
        pytest.raises(mlo.CheckpointError, match=r"run\.pt cannot be read \(Permission denied\)"),
    ):
        store.load()
    assert store.load()["number"] == 2


class Room:
    """Asks for bytes in a pickle."""

    def __reduce__(self):
        return bytearray, (10**12,)


def test_a_checkpoint_that_asks_for_room_is_refused(tmp_path):
    """`weights_only=True` allows this call, whose memory is not bounded by the file."""
    torch.save({"a": Room()}, tmp_path / "room.pt")
    with pytest.raises(mlo.CheckpointError, match="calls bytearray"):
        mlo.load_checkpoint(tmp_path / "room.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["packed", "one member twice"])
def test_a_checkpoint_that_unpacks_to_more_is_refused(tmp_path, kind):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    bomb = tmp_path / "bomb.pt"
    method = zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(bomb, "w", method) as zip_,
    ):
        for member in plain.infolist():
            zip_.writestr(member.filename, plain.read(member))
        if kind != "packed":
            # A second name for the bytes of the largest member.
            largest = max(zip_.filelist, key=lambda member: member.file_size)
            zip_.filelist.append(copy.copy(largest))
    with pytest.raises(mlo.CheckpointError, match="unpacks to more bytes than it has"):
        mlo.load_checkpoint(bomb)


def test_a_pipe_is_no_checkpoint(store):
    os.mkfifo(store.last)
    with pytest.raises(mlo.CheckpointError, match="it is a pipe"):
        store.load()
    store.save(state(1))
    assert store.load()["number"] == 1
