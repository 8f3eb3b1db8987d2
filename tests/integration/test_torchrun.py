"""The main job under `torchrun`: two processes give the numbers of one, and say what went wrong."""

from __future__ import annotations

import json
import os
import sys

import data_parallel_search
import pytest
import torch
from several_processes import launch
from started_processes import finished
from tiny_runs import arguments, settings

SHORT = {
    "search.steps": 2,
    "search.batch_size": 16,
    "search.generator.channels": 4,
    "data.train_images": 32,
    "evaluation.epochs": 1,
    "distributed.sync_batchnorm": "true",
}


def torchrun(*given, module="lfmcw_app.run", processes=2, **changes):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    program = [*launcher, "-m", module, *given, "--device=cpu", "--threads=1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return finished([*program, *settings(**changes)], env=environment)


def numbers(value, name=""):
    """Dotted name → number, of nested data."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in numbers(inner, f"{name}.{key}").items()
        }
    if isinstance(value, list):
        return {
            k: v
            for index, inner in enumerate(value)
            for k, v in numbers(inner, f"{name}.{index}").items()
        }
    return {name: value} if isinstance(value, (int, float)) else {}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Batches, augmentation, the generator's noise, class means and BatchNorm are those of the
    whole batch.
    """
    program = [sys.executable, "-m", "lfmcw_app.run"]
    alone = finished([*program, *arguments("--out", tmp_path / "one", **SHORT)])
    assert alone.returncode == 0, alone.stderr
    shared = torchrun("digits", "--out", tmp_path / "two", **SHORT)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("Run folder") == 1 and shared.stdout.count("test error") == 1
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        p.name for p in (tmp_path / "one").iterdir()
    }
    one, two = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")
    )
    assert len(one) == len(two) == 4
    for first, second in zip(map(json.loads, one), map(json.loads, two), strict=True):
        expected, found = numbers(first), numbers(second)
        # In single precision: the architecture's gradient, a small difference of large terms,
        # agrees to a few digits.
        norms = {key for key in expected if key.startswith(".gradient_norms")}
        assert {k: found[k] for k in norms} == pytest.approx(
            {k: expected[k] for k in norms}, rel=1e-2
        )
        rest = expected.keys() - norms
        assert {k: found[k] for k in rest} == pytest.approx(
            {k: expected[k] for k in rest}, rel=1e-4, abs=1e-4
        )
    assert (tmp_path / "two" / "genotype.json").read_text() == (
        tmp_path / "one" / "genotype.json"
    ).read_text()


@pytest.fixture(scope="module")
def searches_of_two(tmp_path_factory):
    """The searches, as each of two processes found them."""
    folder = tmp_path_factory.mktemp("searches")
    launch(2, folder, script=data_parallel_search.__file__)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# Finite differences of a supernet measure its kinks, which a warning says.
@pytest.mark.filterwarnings("ignore:.*kinks of ReLU:mlo.SolveWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", data_parallel_search.SEARCHES)
def test_a_search_of_two_processes_is_that_of_one(name, searches_of_two):
    """In double precision a search of two processes has the numbers of one."""
    expected = data_parallel_search.search(name)
    tolerance = data_parallel_search.SEARCHES[name][1]
    for found in (process[name] for process in searches_of_two):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=tolerance, atol=tolerance / 10), key


def logged(folder):
    """The numbers of every line of a run's metrics."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [numbers(json.loads(line)) for line in lines]


@pytest.mark.slow
def test_two_processes_train_a_derived_network_as_one_does(tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        given = ("random:0", "digits", "--out", tmp_path / name)
        done = torchrun(*given, module="lfmcw_app.evaluate", processes=processes, **SHORT)
        assert done.returncode == 0, done.stderr
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    # Statistics of norms, errors by class and the confusion are those of one process.
    one, two = results
    for key in ("test_error_percent", "training_error_percent", "classes", "confusion"):
        assert one[key] == two[key], key


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_an_error_of_all(tmp_path):
    refused = torchrun("digits", "--out", tmp_path / "two", **{**SHORT, "search.batch_size": 15})
    assert refused.returncode != 0
    assert "search.batch_size is 15" in refused.stderr and "multiple of 2" in refused.stderr
    assert not (tmp_path / "two").exists()
