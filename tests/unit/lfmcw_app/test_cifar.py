"""CIFAR's two published versions, with made-up pixels; pickles that are not the published ones."""

from __future__ import annotations

import gzip
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from modes_obeyed import with_mode
from small_cifars import (
    FOLDERS,
    binary_files,
    pickled,
    publish,
    python_files,
    random_parts,
    write_archive,
    write_files,
)

from lfmcw_app import cifar, published_files
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError

ARCHIVES = {
    "cifar10": ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"),
}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_versions_give_the_same_images(name, tmp_path, monkeypatch):
    """The binary and the Python version agree bit for bit, from folders and from archives."""
    parts = random_parts(name)
    binary, python = binary_files(name, parts), python_files(name, parts)
    publish(monkeypatch, name, python)
    for index, files in enumerate((binary, python)):
        write_files(tmp_path / f"folder{index}", files)
        (tmp_path / f"archive{index}").mkdir()
        write_archive(tmp_path / f"archive{index}" / ARCHIVES[name][index], files)

    pixels = np.concatenate([images for images, _, _ in list(parts.values())[:-1]])
    labels = [label for _, fine, _ in list(parts.values())[:-1] for label in fine]
    for index in (0, 1):
        for where, held in (("folder", FOLDERS), ("archive", ARCHIVES)):
            data = load_dataset(name, tmp_path / f"{where}{index}")
            assert np.array_equal(data.train.pixels.flatten(1).numpy(), pixels)
            assert data.train.labels.tolist() == labels
            assert data.test.labels.tolist() == list(parts.values())[-1][1]
            assert data.class_names == (
                cifar.CIFAR10_CLASSES
                if name == "cifar10"
                else tuple(f"name{label}" for label in range(100))
            )
            assert data.source == str(tmp_path / f"{where}{index}" / held[name][index])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_reads_the_same_from_its_folder(name, tmp_path, monkeypatch):
    files = python_files(name, random_parts(name))
    publish(monkeypatch, name, files)
    write_files(tmp_path, files)
    data = load_dataset(name, tmp_path)
    for part, images in (("train", data.train), ("test", data.test)):
        theirs = getattr(torchvision.datasets, name.upper())(tmp_path, train=part == "train")
        assert np.array_equal(images.pixels.movedim(1, -1).numpy(), theirs.data)
        assert images.labels.tolist() == theirs.targets
    assert list(data.class_names) == theirs.classes


def test_the_published_checksums_are_torchvisions():
    published = cifar._published("CIFAR10")
    assert sorted(published) == sorted(
        [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]
    )
    assert published["test_batch"] == "40351d587109b95175f43aff81a1287e"
    assert cifar._published("CIFAR100")["meta"] == "7973b15100ade9c7d40fb424638fde48"


@pytest.mark.parametrize("archived", [False, True])
def test_a_pickle_with_another_checksum_is_not_read(archived, tmp_path, monkeypatch):
    """A pickle that is not the published one is refused before anything unpickles it."""
    files = python_files("cifar10", random_parts("cifar10"))
    publish(monkeypatch, "cifar10", files)
    files["cifar-10-batches-py/data_batch_3"] += b"."  # which an unpickler would not notice
    if archived:
        write_archive(tmp_path / "cifar-10-python.tar.gz", files)
    else:
        write_files(tmp_path, files)
    monkeypatch.setattr(cifar, "_unpickled", lambda *arguments: pytest.fail("unpickled"))
    with pytest.raises(InputError, match=r"data_batch_3 is not the published file.*folder:PATH"):
        load_dataset("cifar10", tmp_path)


# ------------------------------ what the unpickler refuses


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path):
    path.touch()


def named(module, name, argument=b"U\x01x"):
    """A pickle that calls a function by its name with one argument."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


def reconstructed(shape):
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + (b"\x8a\x08" + struct.pack("<q", shape) + b"\x85")
        + b"U\x01b\x87R."
    )


HOSTILE = {
    "os.system": named("os", "system"),
    "posix.system": named("posix", "system"),
    "builtins.eval": named("builtins", "eval"),
    "Python 2's eval": named("__builtin__", "eval"),
    "runs a string": named("numpy.testing._private.utils", "runstring"),
    "numpy.load": named("numpy", "load"),
    "another function of the module": named("numpy.core.multiarray", "fromfile"),
    "the module's new name": named("numpy._core.multiarray", "_reconstruct"),
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "getattr": named("builtins", "getattr"),
    "_codecs.encode": named("_codecs", "encode"),
    "copyreg": named("copyreg", "_reconstructor"),
    "an instance": b"(ios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02U\x01xQ.",
    "sets a class's attributes": b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
    "sets a function's attributes": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x01aK\x01sb."
    ),
    "a huge array": reconstructed(2**62),
    "a negative array": reconstructed(-5),
    "a huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"K\x01.",
    "a huge string": b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",
    "a huge number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "a negative length": b"\x80\x02T" + struct.pack("<i", -5) + b"x.",
    "an unhashable key": b"\x80\x02}]K\x01s.",
    "a missing memo": b"\x80\x02h\x07.",
    "an empty stack": b"\x80\x02.",
    "no end": b"\x80\x02K\x01",
    "a protocol of the future": b"\x80\x63K\x01.",
    "nothing": b"",
    "text": b"hello, world",
    "no dictionary": pickled([1, 2]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_ends_in_a_message(kind, tmp_path):
    """The second wall alone: the checksums are not asked."""
    with pytest.raises(InputError, match=r"data_batch_1 (cannot be read|is damaged)"):
        cifar._unpickled(HOSTILE[kind], tmp_path, "data_batch_1")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_of_a_pickle_runs(protocol, tmp_path):
    """Calls at the top, in a dictionary, in an array of objects and as a key run nothing."""
    mark = tmp_path / "mark"
    call = Calls(touch, mark)
    inside = np.empty(1, dtype=object)
    inside[0] = call
    for index, held in enumerate((call, {b"data": call}, {b"data": [[call]]}, {b"data": inside})):
        content = pickle.dumps(held, protocol)
        pickle.loads(content)
        assert mark.exists(), index  # an unguarded unpickler would have run it
        mark.unlink()
        with pytest.raises(InputError, match="cannot be read"):
            cifar._unpickled(content, tmp_path, "data_batch_1")
        assert not mark.exists(), index


def test_depth_alone_does_not_end_the_program(tmp_path):
    """A pickle of 200,000 lists in one another is read, and is not what is expected."""
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    with pytest.raises(InputError, match="holds no dictionary"):
        cifar._unpickled(deep, tmp_path, "data_batch_1")


IMAGE = np.zeros((1, 3072), dtype=np.uint8)
UNFIT = {
    "no data": {b"labels": [1]},
    "no labels": {b"data": IMAGE},
    "no array": {b"data": b"x" * 3072, b"labels": [1]},
    "other images": {b"data": IMAGE[:, :3000], b"labels": [1]},
    "signed bytes": {b"data": IMAGE.view(np.int8), b"labels": [1]},
    "fewer labels": {b"data": IMAGE, b"labels": []},
    "labels of another kind": {b"data": IMAGE, b"labels": [b"1"]},
    "labels that do not fit": {b"data": IMAGE, b"labels": [300]},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_dictionary_that_holds_no_images_is_refused(kind, tmp_path, monkeypatch):
    files = python_files("cifar10", random_parts("cifar10"))
    files["cifar-10-batches-py/test_batch"] = pickled(UNFIT[kind])
    publish(monkeypatch, "cifar10", files)
    write_files(tmp_path, files)
    with pytest.raises(InputError, match="test_batch is damaged: it does not hold images"):
        load_dataset("cifar10", tmp_path)


def test_an_archive_with_a_swollen_member_is_refused(tmp_path, monkeypatch):
    """A member that unpacks to more than any published file is not read to its end."""
    monkeypatch.setattr(cifar, "LARGEST_FILE", 5000)
    files = binary_files("cifar10", random_parts("cifar10"))
    write_archive(tmp_path / "cifar-10-binary.tar.gz", files)
    with pytest.raises(InputError, match=r"data_batch_1\.bin has more than 5000 bytes"):
        load_dataset("cifar10", tmp_path)


# ------------------------------ where it is looked for


def test_the_usual_places_come_after_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(published_files, "PLACES", ("~/data",))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    elsewhere = tmp_path / "home" / "data" / "CIFAR10"
    write_files(elsewhere, binary_files("cifar10", random_parts("cifar10", seed=1)))
    data = load_dataset("cifar10", tmp_path / "given")
    assert data.source == str(elsewhere / "cifar-10-batches-bin")
    assert f", from {data.source}" in data.summary
    write_files(tmp_path / "given", binary_files("cifar10", random_parts("cifar10", seed=2)))
    given = load_dataset("cifar10", tmp_path / "given")
    assert given.source == str(tmp_path / "given" / "cifar-10-batches-bin")
    assert not torch.equal(given.train.pixels, data.train.pixels)


def test_an_incomplete_folder_is_not_the_data_set(tmp_path, monkeypatch):
    """Where a file of the Python version is missing, the archive beside it is taken."""
    files = python_files("cifar10", random_parts("cifar10"))
    publish(monkeypatch, "cifar10", files)
    write_files(tmp_path, files)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").unlink()
    write_archive(tmp_path / "cifar-10-python.tar.gz", files)
    assert load_dataset("cifar10", tmp_path).source.endswith("cifar-10-python.tar.gz")


def test_cifar100_takes_the_fine_label(tmp_path):
    files = binary_files("cifar100", random_parts("cifar100"))
    train = "cifar-100-binary/train.bin"
    record = bytes([19, 99]) + bytes(range(256)) * 12
    write_files(tmp_path, files | {train: record + bytes([0, 7]) + bytes(3072)})
    assert load_dataset("cifar100", tmp_path).train.labels.tolist() == [99, 7]
    write_files(tmp_path, {train: bytes([19, 200]) + bytes(range(256)) * 12})
    with pytest.raises(InputError, match="must lie in 0 to 99"):
        load_dataset("cifar100", tmp_path)
    write_files(tmp_path, {train: b"short"})
    with pytest.raises(InputError, match="whole records"):
        load_dataset("cifar100", tmp_path)
    write_files(tmp_path, files | {"cifar-100-binary/fine_label_names.txt": b"one\ntwo\n"})
    with pytest.raises(InputError, match="2 class names instead of 100"):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("held", [FOLDERS, ARCHIVES], ids=["folder", "archive"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(held, tmp_path):
    files = binary_files("cifar10", random_parts("cifar10"))
    write_files(tmp_path, files) if held is FOLDERS else write_archive(
        tmp_path / ARCHIVES["cifar10"][0], files
    )
    path = tmp_path / held["cifar10"][0]
    path = path / "test_batch.bin" if held is FOLDERS else path
    with (
        with_mode(path, 0),
        pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"),
    ):
        load_dataset("cifar10", tmp_path)


def test_an_archive_with_a_head_of_any_length_is_refused(tmp_path, monkeypatch):
    """A head of the kind PAX names its own length, and is read into memory."""
    head = tarfile.TarInfo("x")
    head.type, head.size = tarfile.XHDTYPE, 9000
    archive = tmp_path / ARCHIVES["cifar10"][0]
    archive.write_bytes(gzip.compress(head.tobuf(tarfile.USTAR_FORMAT) + bytes(10_000)))
    monkeypatch.setattr(cifar, "LARGEST_FILE", 4000)
    with pytest.raises(InputError, match=r"is damaged \(.*9216 bytes at once"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("level", [0, 9], ids=["stored", "compressed"])
def test_no_changed_bit_of_an_archive_becomes_other_pixels(level, tmp_path):
    """gzip's checksum is at the very end, behind what `tarfile` reads."""
    files = binary_files("cifar10", random_parts("cifar10"))
    archive = tmp_path / ARCHIVES["cifar10"][0]
    write_archive(archive, files)
    content = gzip.compress(gzip.decompress(archive.read_bytes()), compresslevel=level)
    archive.write_bytes(content)
    expected = load_dataset("cifar10", tmp_path).train.pixels
    for place in range(20, len(content), len(content) // 20):
        archive.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            pixels = load_dataset("cifar10", tmp_path).train.pixels
        except InputError as error:
            assert "is damaged" in str(error)  # noqa: PT017 - what is not refused is unharmed
        else:
            assert torch.equal(pixels, expected)
