"""Betty's methods as engines; what they compute is tried in tests/oracle/test_betty.py."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

import mlo
from mlo.betty import engines
from mlo.testing import bilinear_game

NAMES = ("betty-cg", "betty-darts", "betty-neumann", "betty-sama")


@pytest.fixture
def installed(monkeypatch):
    """As if Betty was installed: an engine that is only made does not call it."""
    monkeypatch.setattr(engines, "version", lambda package: "0.2.1")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_betty_is_named_with_what_installs_it(name, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(engines, "version", missing)
    with pytest.raises(mlo.EngineError, match=r"pip install .*betty-ml==0\.2\.1"):
        mlo.engine_from(name)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("choice", "config"),
    [
        ("betty-darts", {"type": "darts", "darts_alpha": 0.01}),
        (
            {"name": "betty-neumann", "iterations": 4, "alpha": 0.3},
            {"type": "neumann", "neumann_alpha": 0.3, "neumann_iterations": 4},
        ),
        ("betty-cg", {"type": "cg", "cg_alpha": 1.0, "cg_iterations": 1}),
    ],
    ids=["darts", "neumann", "cg"],
)
def test_options_are_those_of_bettys_config(choice, config):
    assert mlo.engine_from(choice).config() == config


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "betty-darts", "alpha": 0.0}, "alpha must be positive"),
        ({"name": "betty-neumann", "iterations": 0}, "iterations must be an integer of at least 1"),
    ],
)
def test_options_out_of_range_are_refused(choice, message):
    with pytest.raises(mlo.EngineError, match=message):
        mlo.engine_from(choice)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", NAMES)
def test_games_and_second_derivatives_are_beyond_them(name):
    engine = mlo.engine_from(name)
    assert not engine.differentiable
    with pytest.raises(mlo.EngineError, match="game"):
        bilinear_game().optimizer(engine)


@pytest.mark.usefixtures("installed")
def test_sama_has_the_name_that_bettys_config_gives_its_alpha():
    assert engines.BettySama(alpha=0.5).config() == {"type": "sama", "sama_adam_alpha": 0.5}
    assert not engines.BettySama().differentiable
