"""Losses that lack a derivative, and what is advised."""

from __future__ import annotations

import pytest
from small_graphs import three_vectors

import mlo


def test_a_problem_listed_too_late_is_named_through_others():
    with pytest.raises(
        mlo.ProblemError,
        match=r"reads net, which depends on 'reg' through aug, listed after it\..* list aug before "
        "'reg'",
    ):
        three_vectors(["net", "reg", "aug"]).step()


def test_every_problem_that_is_listed_too_late_is_named():
    with pytest.raises(
        mlo.ProblemError, match=r"It reads net, listed after it.* list aug, net before 'reg'"
    ):
        three_vectors(["reg", "aug", "net"]).step()


def test_no_order_is_advised_where_none_helps():
    with pytest.raises(mlo.ProblemError, match=r"or reads none\.$"):
        three_vectors(
            ["net", "aug", "reg"], reg_loss=lambda reg, _, *, net: net.v.detach().square().sum()
        ).step()
