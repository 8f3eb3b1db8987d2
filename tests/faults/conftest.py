"""The runs that the tests interrupt, and what an uninterrupted one leaves."""

from __future__ import annotations

import pytest
from interrupted_runs import Runs, outcome


@pytest.fixture
def runs(monkeypatch):
    return Runs(monkeypatch)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        Runs(patch).start(folder)
    return outcome(folder)
