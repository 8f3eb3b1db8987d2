"""The total gradient: the direct one, and what flows through each solution."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.testing import diamond, relative_error


def test_fixing_solutions_takes_the_gradient_apart():
    """Fixing solutions takes the gradient apart by what flows through them."""
    closed = diamond()
    optimizer = closed.optimizer("direct")
    q2 = torch.linalg.solve(closed.jacobians["w2"].T, closed.direct["w2"])

    def through(name):
        q = torch.linalg.solve(closed.jacobians[name].T, -closed.mixed["w2"][name].T @ q2)
        return -closed.mixed[name]["arch"].T @ q

    expected = {
        ("w1", "gan", "w2"): closed.direct["arch"],
        ("w1", "gan"): closed.direct["arch"] - closed.mixed["w2"]["arch"].T @ q2,
        ("gan",): closed.exact - through("gan"),
        ("w1",): closed.exact - through("w1"),
        (): closed.exact,
    }
    for fixed, gradient in expected.items():
        assert (
            relative_error(optimizer.gradient("arch", held_constant=fixed)["v"], gradient) < 1e-12
        )
    with pytest.raises(mlo.GraphError, match="no problem 'w3'"):
        optimizer.gradient("arch", held_constant=("w3",))
