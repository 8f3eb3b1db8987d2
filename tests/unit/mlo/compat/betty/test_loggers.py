"""Lines on the terminal, and numbers for TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

import mlo
from mlo.compat.betty import loggers
from mlo.compat.betty.loggers import log_from_loss_dict, logger


@pytest.fixture(autouse=True)
def shown():
    """The library's own logger at its usual level, whatever other tests have set."""
    found = logging.getLogger("mlo.compat.betty")
    before = found.level
    found.setLevel(logging.INFO)
    yield
    found.setLevel(before)


STATS = {"loss": torch.tensor(0.5), "acc": 81.0, "parts": [1.0, torch.tensor(2.0)]}


def test_a_line_is_bettys():
    assert log_from_loss_dict(STATS) == "loss: 0.5 || acc: 81.0 || parts_0: 1.0 || parts_1: 2.0"
    assert log_from_loss_dict({"by": {"a": 1, "b": 2}}) == "by_0: 1 || by_1: 2"


def test_lines_go_to_standard_output(capsys):
    plain = logger()
    plain.info("begun")
    plain.warning("odd")
    plain.error("bad")
    plain.debug("hidden")
    plain.log(STATS, tag="net", step=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("] ", 1)[1] for line in lines] == [
        "[INFO] begun",
        "[WARNING] odd",
        "[ERROR] bad",
    ]


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    logger("tensorboard").log(STATS, tag="net", step=7)
    (folder,) = (tmp_path / "betty_tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["net/acc", "net/loss", "net/parts_0", "net/parts_1"]
    (event,) = events.Scalars("net/loss")
    assert (event.step, event.value) == (7, 0.5)


def test_wandb_gets_the_numbers(monkeypatch):
    made, sent = [], []
    fake = types.ModuleType("wandb")
    fake.run, fake.init, fake.log = None, lambda **options: made.append(options), sent.append
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger("wandb").log({"acc": torch.tensor(2.0)}, tag="validation", step=3)
    assert made == [{"project": "betty"}]
    assert sent == [{"validation/acc": 2.0, "global_step": 3}]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(kind, monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {kind}")

    monkeypatch.setattr(loggers.importlib, "import_module", missing)
    with pytest.raises(mlo.ConfigurationError, match=rf"pip install 'torch-mlo\[{kind}\]'"):
        logger(kind)


def test_an_unknown_logger_is_refused():
    with pytest.raises(mlo.ConfigurationError, match="logger_type is 'csv'"):
        logger("csv")
