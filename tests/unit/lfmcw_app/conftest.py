"""What several tests of the application are given."""

from __future__ import annotations

import pytest
from small_pictures import write_classes
from started_processes import PATIENCE
from trained_runs import trained_run


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet"
    write_classes(root / "train", {"n01": 20, "n0002": 40}, "JPEG", size=(40, 30))
    write_classes(root / "val", {"n01": 3, "n0002": 4}, "JPEG", size=(30, 40))
    return tmp_path


@pytest.fixture(autouse=True)
def no_usual_places(monkeypatch):
    """Data sets that this machine happens to have are not found."""
    monkeypatch.setattr("lfmcw_app.published_files.PLACES", ())


@pytest.fixture(autouse=True)
def no_round_is_too_long(monkeypatch):
    """A run that is stopped is not given up, which would end the process of the tests."""
    monkeypatch.setattr("lfmcw_app.stopping.GRACE", PATIENCE)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished evaluation, for tests that leave it as it is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return trained_run(tmp_path_factory.mktemp("trained"), monkeypatch)
