"""The algorithms on docs/methods-by-name.md, repeated by hand: they end at the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "methods-by-name.md"
BLOCKS = dict(
    re.findall(r"^\*([\w-]+): .*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.M | re.S)
)
"""Name of a paper's method → the code below it."""

A, T = torch.tensor([1.0, 4.0]).double(), torch.tensor([1.0, -2.0]).double()
ZEROS = torch.zeros(2).double()
BEST = (T / A) / (1 / A**2 + 0.2)


def f(x, y):
    return 0.5 * (A * y * y).sum() - (x * y).sum()


def upper(x, y):
    return 0.5 * ((y - T) ** 2).sum() + 0.1 * (x**2).sum()


def slopes(value, *of):
    """∇ of `value`, a function of tensors, at those tensors."""
    at = [tensor.detach().requires_grad_() for tensor in of]
    return torch.autograd.grad(value(*at), at)


def bda():
    """Gradient descent through ten steps on the aggregated loss, by hand."""
    x, y = torch.zeros(1).double(), ZEROS
    for _ in range(50):
        x.requires_grad_()
        after = y
        for step in range(10):
            alpha = 0.5 * 0.9**step
            down = torch.stack([after[0] - x[0], torch.zeros(()).double()])
            after = after - 0.3 * (alpha * (after - T) + (1 - alpha) * down)
        (slope,) = torch.autograd.grad(upper(x, after), x)
        x, y = (x - 0.5 * slope).detach(), after.detach()
    return {"x": x, "y": y}


def bamm():
    """∇²φ = μ I + (1 − μ) diag(1, 0), and ∇²_xy φ = −(1 − μ) (1, 0)."""
    x, y, v = torch.zeros(1).double(), ZEROS, ZEROS
    for step in range(200):
        mu = 0.5 / (step + 1) ** 0.25
        y = y - 0.3 * (mu * (y - T) + (1 - mu) * torch.stack([y[0] - x[0], 0.0 * x[0]]))
        v = v + 0.3 * ((y - T) - torch.stack([v[0], mu * v[1]]))
        x = x - 0.1 * (0.2 * x + (1 - mu) * v[0])
    return {"x": x, "y": y}


def iaptt():
    """y_k is linear in x and in its start: y_{k+1} = (1 − 0.2 A) y_k + 0.2 x."""
    x, start = ZEROS, ZEROS
    for _ in range(200):
        y, by_x, by_start, values = start, ZEROS, torch.ones(2).double(), []
        for _ in range(8):
            y, by_x, by_start = (
                (1 - 0.2 * A) * y + 0.2 * x,
                (1 - 0.2 * A) * by_x + 0.2,
                (1 - 0.2 * A) * by_start,
            )
            values.append((float(upper(x, y)), 0.2 * x + by_x * (y - T), by_start * (y - T)))
        _, of_x, of_start = max(values, key=lambda entry: entry[0])
        x, start = x - 0.1 * of_x, start - 0.1 * of_start
    return {"x": x, "start": start}


def pbgd():
    x, y, z = ZEROS, ZEROS, ZEROS
    for _ in range(500):
        for _ in range(3):
            z = z - 0.2 * (A * z - x)
        of_x = 0.2 * x + 20.0 * (z - y)
        of_y = (y - T) + 20.0 * (A * y - x)
        x, y = x - 0.02 * of_x, y - 0.02 * of_y
    return {"x": x, "y": y}


def bome():
    x, y = ZEROS, ZEROS
    for _ in range(30):
        z = y
        for _ in range(10):
            z = z - 0.2 * (A * z - x)
        down = torch.cat([z - y, A * y - x])
        up = torch.cat([0.2 * x, y - T])
        weight = max(0.5 - float(up @ down / (down @ down + 1e-12)), 0.0)
        step = 0.02 * (up + weight * down)
        x, y = x - step[:2], y - step[2:]
    return {"x": x, "y": y}


def bvfim():
    x, y, z = ZEROS, ZEROS, ZEROS

    def gap(x, y, z):
        return f(x, z) + 0.5e-3 * (z**2).sum() + 0.02 - f(x, y)

    for _ in range(150):
        for _ in range(3):  # z is below y: five steps for each of its own
            for _ in range(5):
                z = z - 0.2 * (A * z - x + 1e-3 * z)
            y = y - 0.01 * ((y - T) + 0.05 * (A * y - x) / gap(x, y, z))
        x = x - 0.2 * (0.2 * x - 0.05 * (y - z) / gap(x, y, z))
    return {"x": x, "y": y, "z": z}


def meha():
    x, y, theta = ZEROS, ZEROS, ZEROS
    for _ in range(1000):
        theta = theta - 0.2 * (A * theta - x + (theta - y) / 2.0)
        y = y - 0.2 * ((y - T) / 20.0 + A * y - x - (y - theta) / 2.0)
        x = x - 0.5 * (0.2 * x / 20.0 + theta - y)
    return {"x": x, "y": y, "theta": theta}


def gaffa():
    """With g(x, y) = −0.2 − y, whose derivative in y is −1."""
    x, y, z, theta = ZEROS, ZEROS, ZEROS, ZEROS
    for _ in range(2000):
        theta = theta - 0.3 * (A * theta - x - z + (theta - y) / 2.0)
        best = (z + 2.0 * (-0.2 - y)).clamp(min=0.0)
        of_x = 0.2 * (x + 3.0) / 20.0 + theta - y
        of_y = (y - T) / 20.0 + A * y - x - best - (y - theta) / 2.0
        of_z = (best - z) / 2.0 - (-0.2 - theta)
        x, y, z = x - 0.3 * of_x, y - 0.3 * of_y, (z - 0.3 * of_z).clamp(min=0.0)
    return {"x": x, "y": y, "z": z}


BY_HAND = {
    "BDA": bda,
    "sl-BAMM": bamm,
    "IAPTT-GM": iaptt,
    "V-PBGD": pbgd,
    "BOME": bome,
    "BVFIM": bvfim,
    "MEHA": meha,
    "BiC-GAFFA": gaffa,
}

ROUNDS = {"BOME": ("run(1000)", "run(30)")}
"""Method → fewer rounds: its steps go to and fro at the barrier, where rounding grows."""

SOLVED = {"V-PBGD": 0.2, "BOME": 0.05, "BVFIM": 0.1, "MEHA": 0.05}
"""Method of the problem with a closed form → how close to it the block ends."""


def test_every_block_is_repeated():
    assert list(BLOCKS) == list(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_block_is_the_algorithm(name, capsys):
    found = run(BLOCKS[name].replace(*ROUNDS.get(name, ("", ""))))
    for held in ("both", "pair", "point"):  # modules with several tensors
        if held in found:
            found |= dict(found[held].items())
    for key, expected in BY_HAND[name]().items():
        value = getattr(found[key], "v", found[key]).detach()
        assert float((value - expected).norm() / expected.norm()) < 1e-9, key


@pytest.mark.parametrize("name", SOLVED)
def test_a_block_ends_near_the_solution(name, capsys):
    found = run(BLOCKS[name])
    x = found["x"].v if "x" in found else found["pair"]["x"]
    assert float((x.detach() - BEST).abs().max()) < SOLVED[name]


def run(code):
    found = {}
    exec(compile(code, "block", "exec"), found)
    return found
