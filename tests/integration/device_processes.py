"""A group of processes on one kind of device: what a few graphs compute there, beside one process.

`check_group` is called by the GPU tests with NCCL and by the ordinary ones with gloo, so that what
runs on GPUs runs elsewhere too. As a script it is one of the processes:
`python device_processes.py FOLDER DEVICE`, with RANK and WORLD_SIZE in the environment.
"""

from __future__ import annotations

import datetime
import os
import sys
import warnings
from pathlib import Path

import data_parallel_cases as cases
import torch
import torch.distributed as dist
from several_processes import launch

import mlo
from lfmcw_app.processes import BACKENDS

CASES = (("bilevel", "one_step"), ("bilevel", "cg"), ("diamond", "one_step"))
TOLERANCE = 1e-9
"""Relative, in float64; a GPU sums in another order than the CPU's single process."""


def results(device, parallel, distributed):
    """Everything that the cases compute on a device, on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {}
        for graph, engine in CASES:
            run = cases.run_graph(graph, engine, parallel, distributed, device=device)
            assert "refused" not in run, run
            found |= {f"{graph}, {engine}: {key}": value.cpu() for key, value in run.items()}
        return found


def check_group(size, device, folder):
    """Runs a group of `size` processes, and compares each of them with one on the whole batches."""
    launch(size, folder, __file__, [str(folder), device])
    found = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    expected = results(torch.device("cpu"), None, None)
    assert len(expected) > 20
    for of_process in found:
        assert of_process.pop("where") == [size, device]
        assert set(of_process) == set(expected)
        for key, value in expected.items():
            error = (of_process[key] - value).norm() / (value.norm() + 1e-12)
            assert error < TOLERANCE, (key, float(error))
            # All processes hold the same bits.
            assert torch.equal(of_process[key], found[0][key]), key


def main(folder, kind):
    """One of the processes."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKENDS[kind],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    # A group of one process is a group too: its collectives go through the backend.
    total = torch.full((3,), float(rank + 1), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [size * (size + 1) / 2] * 3
    gathered = [None] * size
    dist.all_gather_object(gathered, rank)  # of the CPU, as a run's processes tell one another
    assert gathered == list(range(size))

    found = results(device, mlo.DataParallel() if size > 1 else None, "exact" if size > 1 else None)
    found["where"] = [dist.get_world_size(), device.type]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
