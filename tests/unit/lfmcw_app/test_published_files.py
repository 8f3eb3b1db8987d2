"""Where published files are looked for; downloads are in tests/unit/test_security.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfmcw_app import published_files
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError


def test_a_place_is_looked_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published_files, "PLACES", (".", "data", "~/data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published_files.places(Path("data"), (".", "cifar10")) == [
        Path("data"),
        Path("data/cifar10"),
        Path("."),
        Path("cifar10"),
    ]


def test_a_failed_download_says_where_was_looked(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    monkeypatch.setattr(published_files, "PLACES", (str(tmp_path / "usual"),))
    monkeypatch.setattr("lfmcw_app.readers.FASHION_MNIST_PACKAGE", Path("/nowhere"))
    for name in ("cifar10", "fashion-mnist"):
        with pytest.raises(InputError, match="no network") as caught:
            load_dataset(name, tmp_path / "given")
        assert str(tmp_path / "given") in str(caught.value)
        assert str(tmp_path / "usual") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_has_the_other_places(monkeypatch):
    monkeypatch.setattr(published_files, "PLACES", ("~/data",))
    monkeypatch.setattr("os.path.expanduser", lambda path: str(path))  # as it is returned then
    monkeypatch.setattr(Path, "expanduser", lambda path: 1 / 0)
    assert Path("~/data") in published_files.places(Path("given"), (".",))
