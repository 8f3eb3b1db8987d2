"""`python -m mlo.info`: versions, devices and engines."""

from __future__ import annotations

import sys

import pytest
import torch
from started_processes import finished

import mlo
from mlo import __main__ as package
from mlo import info


def test_info_lists_versions_devices_and_every_engine():
    text = info.describe()
    for words in (mlo.__version__, torch.__version__, "threads", "cuda"):
        assert words in text
    for engine in mlo.available_engines():
        assert f"\n  {engine} " in text
    assert "[finite_difference]" in next(
        line for line in text.splitlines() if line.startswith("  darts ")
    )
    printed = finished([sys.executable, "-m", "mlo.info"])
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.splitlines()[0] == text.splitlines()[0]


def test_a_package_that_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(info, "OPTIONAL", ("no-such-package",))
    assert "no-such-package not installed" in info.describe()


def test_an_engine_that_cannot_be_made_says_why(monkeypatch):
    def refuse():
        raise mlo.EngineError("It needs a licence. Ask for one.")

    monkeypatch.setattr(mlo, "available_engines", lambda: ["theirs"])
    monkeypatch.setattr(mlo, "engine_from", lambda name: refuse())
    assert info.describe().splitlines()[-1].split(maxsplit=1) == ["theirs", "It needs a licence"]


@pytest.mark.parametrize(
    ("module", "said"), [(info, "versions, devices"), (package, "python -m mlo.info")]
)
def test_help_says_what_a_module_prints(module, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlo", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("module", [info, package])
def test_an_argument_that_does_nothing_is_refused(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlo", "engines"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert "engines" in capsys.readouterr().err


def test_the_package_says_what_of_it_can_be_run():
    printed = finished([sys.executable, "-m", "mlo"])
    assert printed.returncode == 0, printed.stderr
    assert mlo.__version__ in printed.stdout
    assert "python -m mlo.info" in printed.stdout
