"""Small CIFARs in the published formats; the Python version as Python 2 pickled it."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile

import numpy as np
import torchvision

from lfmcw_app.cifar import CIFAR10_CLASSES

PARTS = {
    "cifar10": (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"),
    "cifar100": ("train", "test"),
}
FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}
NAMES_100 = [b"name%d" % label for label in range(100)]


def random_parts(name, count=3, seed=0):
    """File → (images [count, 3072], labels, coarse labels)."""
    rng = np.random.default_rng(seed)
    classes = 10 if name == "cifar10" else 100
    return {
        file: (
            rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            rng.integers(0, classes, count).tolist(),
            rng.integers(0, 20, count).tolist(),
        )
        for file in PARTS[name]
    }


def binary_files(name, parts):
    """File → content of the binary version."""
    folder = FOLDERS[name][0]
    files = {}
    for file, (images, fine, coarse) in parts.items():
        records = b""
        for image, label, group in zip(images, fine, coarse, strict=True):
            labels = [label] if name == "cifar10" else [group, label]
            records += bytes(labels) + image.tobytes()
        files[f"{folder}/{file}.bin"] = records
    if name == "cifar100":
        files[f"{folder}/fine_label_names.txt"] = b"\n".join(NAMES_100) + b"\n\n"
    return files


def python_files(name, parts):
    """File → content of the Python version."""
    folder = FOLDERS[name][1]
    files = {}
    for file, (images, fine, coarse) in parts.items():
        held = {b"data": images, b"batch_label": b"training batch 1 of 5"}
        held |= (
            {b"labels": fine}
            if name == "cifar10"
            else {b"fine_labels": fine, b"coarse_labels": coarse}
        )
        held[b"filenames"] = [b"image_%d.png" % index for index in range(len(fine))]
        files[f"{folder}/{file}"] = pickled(held)
    if name == "cifar10":
        names = [label.encode() for label in CIFAR10_CLASSES]
        files[f"{folder}/batches.meta"] = pickled({b"label_names": names, b"num_vis": 3072})
    else:
        files[f"{folder}/meta"] = pickled({b"fine_label_names": NAMES_100})
    return files


def write_files(root, files):
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def publish(monkeypatch, name, files):
    """Has torchvision list the MD5s of these files of the Python version as the published ones."""
    md5s = {
        file.rpartition("/")[2]: hashlib.md5(content, usedforsecurity=False).hexdigest()
        for file, content in files.items()
    }
    listed = getattr(torchvision.datasets, name.upper())
    test = PARTS[name][-1]
    monkeypatch.setattr(listed, "train_list", [[f, md5s[f]] for f in PARTS[name] if f != test])
    monkeypatch.setattr(listed, "test_list", [[test, md5s[test]]])
    meta = listed.meta["filename"]
    monkeypatch.setattr(listed, "meta", listed.meta | {"md5": md5s[meta]})


# ------------------------------ Python 2's pickles


def pickled(value):
    """Pickles a value as Python 2's cPickle did with protocol 2: byte strings are its strings."""
    return b"\x80\x02" + _saved(value) + b"."


def _saved(value):
    if isinstance(value, bytes):
        short = len(value) < 256
        return (
            b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))
        ) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_saved, value)) + b"e"
    if isinstance(value, dict):
        entries = [_saved(key) + _saved(entry) for key, entry in value.items()]
        return b"}(" + b"".join(entries) + b"u"
    return _array(value)


def _array(array):
    """numpy's array of bytes: _reconstruct(ndarray, (0,), 'b'), and then its state."""
    new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"".join(map(_saved, array.shape)) + b"\x86"
    code = array.dtype.str[1:].encode()  # of one byte
    kind = (
        b"cnumpy\ndtype\nU\x02"
        + code
        + b"K\x00K\x01\x87R(K\x03U\x01|NNN"
        + _saved(-1) * 2
        + b"K\x00tb"
    )
    return new + b"(K\x01" + shape + kind + b"\x89" + _saved(array.tobytes()) + b"tb"
