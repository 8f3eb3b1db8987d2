"""Two and four processes on gloo, each with its shard of every batch, against one process on the whole batches."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import data_parallel_cases as cases
import pytest
import torch

import mlo

TIMEOUT = 300
"""Seconds after which processes count as hanging."""


def launch(size, folder, script=cases.__file__, arguments=None, expect=0):
    """Runs `size` processes of a script to their ends; returns what each printed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(os.path.dirname(mlo.__file__)), *sys.path])
    running = [
        subprocess.Popen(
            [sys.executable, script, *(arguments or [str(folder / "store"), str(rank), str(size), str(folder)])],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        printed = [process.communicate(timeout=TIMEOUT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert (process.returncode == 0) == (expect == 0), text
    return printed


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """size → what each of that many processes found, and the folder with their states; each run once."""
    known = {}

    def of(size):
        if size not in known:
            folder = tmp_path_factory.mktemp(f"processes{size}")
            single = cases.resumable(None, None)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                list(single.run(2))
            mlo.save_checkpoint(single.state_dict(), folder / "single.pt")
            launch(size, folder)
            known[size] = [torch.load(folder / f"{rank}.pt") for rank in range(size)], folder
        return known[size]

    return of


@pytest.fixture(scope="module")
def alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cases.everything(2, None, None)


def error(found, exact):
    if "refused" in exact:
        assert found.get("refused") == exact["refused"]
        return 0.0
    assert set(found) == set(exact)
    return max(float((found[key] - exact[key]).double().norm() / (exact[key].double().norm() + 1e-12)) for key in exact)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_equal_one_on_the_whole_batch_with_every_engine(several, alone, size):
    results, _ = several(size)
    found = results[0]
    errors = {key: error(value, alone[key]) for key, value in found.items() if key in alone}
    assert max(errors.values()) < 1e-10, {key: e for key, e in errors.items() if e >= 1e-10}
    tried = {engine for graph, engine in errors if "refused" not in found[graph, engine]}
    missing = set(mlo.available_engines()) - tried
    assert missing <= (set() if cases.has_betty() else set(cases.BETTY))
    assert {graph for graph, _ in errors} == {*cases.GRAPHS, "coupled", "uneven"}


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_hold_the_same_bits(several, size):
    results, _ = several(size)
    for other in results[1:]:
        for key, values in results[0].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, other[key][name]), (key, name)


@pytest.mark.parametrize("size", [2, 4])
def test_one_process_and_several_go_on_with_each_others_states(several, size):
    results, folder = several(size)
    whole = cases.resumable(None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(whole.run(4))
        expected = cases.parameters(whole)
        assert error(results[0]["resumed", "soba"], expected) < 1e-10
        back = cases.resumable(None, None)
        back.load_state_dict(mlo.load_checkpoint(folder / "several.pt"))
        list(back.run(2))
        list(whole.run(2))
    assert error(cases.parameters(back), cases.parameters(whole)) < 1e-10
