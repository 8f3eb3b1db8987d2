"""The event files of TensorBoard."""

from __future__ import annotations

import importlib.util

import pytest

from lfmcw_app.errors import InputError
from lfmcw_app.tensorboard import EventFiles, check_tensorboard


def entry(phase, number, loss):
    return {
        "phase": phase, "round": number, "losses": {"w2": loss, "gan": {"generator": 0.5}},
        "metrics": {"w2": {"class_weights": [1.0, 2.0]}}, "gradient_norms": {"w2": 3.0},
        "solves": {"w2": {"engine": "cg", "iterations": 4, "residual": None}},
        "alpha": {"normal": [[0.5, 0.5]]},
    }  # fmt: skip


def test_event_files_hold_every_number_of_the_log(tmp_path):
    """Event files hold every number of the log, and repeated rounds once."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for rounds, loss in (((1, 2, 3), 1.0), ((3, 4), 2.0)):  # resumed after round 2
        files = EventFiles(tmp_path)
        for number in rounds:
            files(entry("search", number, loss))
        files(entry("training", 1, 5.0))
        files.close()
    read = event_accumulator.EventAccumulator(str(tmp_path / "search"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("losses/w2")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]
    assert set(read.Tags()["scalars"]) == {
        "losses/w2", "losses/gan/generator", "metrics/w2/class_weights/0",
        "metrics/w2/class_weights/1", "gradient_norms/w2", "solves/w2/iterations",
    }  # fmt: skip
    assert (tmp_path / "training").is_dir()


def test_without_the_package_the_option_is_refused(monkeypatch):
    monkeypatch.setattr("lfmcw_app.tensorboard.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        check_tensorboard()
    monkeypatch.undo()
    if importlib.util.find_spec("tensorboard"):
        check_tensorboard()
