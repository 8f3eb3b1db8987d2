"""What the updates of each problem take."""

from __future__ import annotations

import json

import pytest
import torch

from lfmcw_app.run_files import TIMINGS
from lfmcw_app.timings import Timings, held_bytes
from mlo.testing import bilevel_quadratic


@pytest.fixture
def optimizer():
    closed = bilevel_quadratic(dim=5)
    closed.problems[0].steps = 2
    return closed.optimizer("one_step")


def written(folder):
    return [json.loads(line) for line in (folder / TIMINGS).read_text().splitlines()]


def test_an_interval_is_a_line(tmp_path, optimizer):
    timings = Timings(tmp_path, "search", optimizer, torch.device("cpu"))
    for rounds in (2, 1):
        list(optimizer.run(rounds))
        timings.write()
    first, second = written(tmp_path)
    assert (first["phase"], first["rounds"], second["rounds"]) == ("search", [1, 2], [3, 3])
    assert {name: p["updates"] for name, p in first["problems"].items()} == {"w": 4, "x": 2}
    assert {name: p["updates"] for name, p in second["problems"].items()} == {"w": 2, "x": 1}


def test_the_problems_take_no_more_than_the_interval(tmp_path, optimizer):
    timings = Timings(tmp_path, "search", optimizer, torch.device("cpu"))
    list(optimizer.run(3))
    timings.write()
    (line,) = written(tmp_path)
    taken = sum(problem["seconds"] for problem in line["problems"].values())
    assert 0 <= taken <= line["seconds"] + 1e-3


def test_a_resumed_run_counts_from_its_round(tmp_path, optimizer):
    list(optimizer.run(5))
    timings = Timings(tmp_path, "search", optimizer, torch.device("cpu"))
    optimizer.step()
    timings.write()
    assert written(tmp_path)[0]["rounds"] == [6, 6]


def test_a_problem_holds_parameters_and_the_optimizers_state():
    problem = bilevel_quadratic(dim=5).problems[0]
    assert held_bytes(problem) == 5 * 8
    (parameter,) = problem.parameters.values()
    adam = torch.optim.Adam([parameter])
    problem.optimizers = {"w": adam}
    parameter.grad = torch.ones_like(parameter)
    adam.step()
    assert held_bytes(problem) == 3 * 5 * 8 + 4  # two moments, and the number of steps


def test_other_work_is_timed_by_its_name(tmp_path, optimizer):
    timings = Timings(tmp_path, "search", optimizer, torch.device("cpu"))
    for _ in range(2):
        with timings.beside("measuring"):
            optimizer.step()
    timings.write()
    optimizer.step()
    timings.write()
    first, second = written(tmp_path)
    updates = sum(problem["seconds"] for problem in first["problems"].values())
    assert updates <= first["beside"]["measuring"] + 1e-3 <= first["seconds"] + 2e-3
    assert second["beside"] == {}
