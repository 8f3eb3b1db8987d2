"""Graphs on Betty's engine; that both move alike is tried in tests/oracle/test_betty.py."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

import mlo
import mlo.betty
from mlo.betty import engines
from mlo.testing import bilevel_quadratic


def test_without_betty_a_run_is_refused(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(engines, "version", missing)
    closed = bilevel_quadratic()
    before = closed.value("w").clone()
    with pytest.raises(mlo.EngineError, match="betty-ml, which is not installed"):
        mlo.betty.run(closed.problems, steps=1)
    assert (closed.value("w") == before).all()


@pytest.mark.parametrize(("version", "more"), [("0.2.1", False), ("0.1.1", True)])
def test_what_a_release_cannot_do_is_described(version, more, monkeypatch):
    monkeypatch.setattr(engines, "version", lambda package: version)
    text = mlo.betty.describe()
    assert text.startswith(f"Betty {version}: ")
    assert "games" in text
    assert ("the same number of steps" in text) is more


def test_a_round_has_a_record():
    pytest.importorskip("betty", reason="betty-ml is not installed (make betty)")
    closed = bilevel_quadratic()
    records = mlo.betty.run(closed.problems, steps=2)
    assert [record.round for record in records] == [1, 2]
    assert set(records[-1].losses) == {"w", "x"}
