"""When a run is stopped early."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.compat.betty.early_stopping import EarlyStopping


def answers(stopping, scores):
    return [stopping({stopping.metric: score}) for score in scores]


def test_it_stops_after_so_many_validations_without_improvement():
    stopping = EarlyStopping(tolerance=2)
    assert answers(stopping, [3.0, 2.0, 2.5, 1.0, 1.0, 1.5]) == [False] * 5 + [True]
    assert stopping.best_score == 1.0


def test_a_metric_may_be_one_that_is_to_grow():
    stopping = EarlyStopping(metric="acc", tolerance=1, mode="max")
    assert answers(stopping, [0.5, torch.tensor(0.6), 0.55]) == [False, False, True]


def test_a_nan_is_no_improvement():
    assert answers(EarlyStopping(tolerance=1), [1.0, float("nan")]) == [False, True]


def test_a_missing_metric_is_told_of():
    with pytest.raises(mlo.ConfigurationError, match=r"'loss'.*returned \['acc'\].*Return it"):
        EarlyStopping()({"acc": 1.0})
    with pytest.raises(mlo.ConfigurationError, match="early_stopping_mode"):
        EarlyStopping(mode="least")
