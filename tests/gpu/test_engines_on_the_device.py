"""Hypergradient engines on a GPU: what they are on a CPU, and what the closed forms say."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import on_device

from mlo.testing import GRAPHS, relative_error, trilevel_quadratic

ENGINES = {
    "one_step": 1e-10,
    "neumann": 1e-10,
    "cg": 1e-8,
    "minres": 1e-8,
    "gmres": 1e-8,
    "normal_cg": 1e-8,
    "direct": 1e-10,
    "unroll": 1e-10,
    "darts": 1e-6,  # finite differences magnify roundings
    "zeroth_order": 1e-5,
}
PROBLEMS = {**GRAPHS, "trilevel": trilevel_quadratic}

REFUSED = {("cg", "game"), ("minres", "game"), ("darts", "trilevel"), ("zeroth_order", "trilevel")}
"""Not symmetric; no second derivative."""


def gradients(name, engine, device):
    """The upper gradient before any round and after three, and the parameters after those."""
    closed = on_device(PROBLEMS[name](), device)
    optimizer = closed.optimizer(engine)
    first = optimizer.gradient(closed.upper)["v"]
    for _ in range(3):
        optimizer.step()
    last = optimizer.gradient(closed.upper)["v"]
    parameters = [
        parameter for problem in closed.problems for parameter in problem.parameters.values()
    ]
    assert all(tensor.device.type == device.type for tensor in (first, last, *parameters))
    return [tensor.detach().cpu() for tensor in (first, last, *parameters)], closed.exact


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
@pytest.mark.parametrize(
    ("engine", "name"),
    [(e, name) for e in ENGINES for name in PROBLEMS if (e, name) not in REFUSED],
)
def test_an_engine_computes_the_same_on_both_devices(device, engine, name):
    """An engine computes on the GPU what it computes on the CPU."""
    expected, exact = gradients(name, engine, torch.device("cpu"))
    found, _ = gradients(name, engine, device)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < ENGINES[engine]
    if engine == "direct":
        assert relative_error(found[0], exact) < 1e-9
