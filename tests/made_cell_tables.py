"""Made-up tables of all cells: our own CSV, and NATS-Bench's file and folder, in their formats."""

from __future__ import annotations

import bz2
import pickle
from collections import OrderedDict

import numpy as np

from lfmcw_app.cell_table_file import CellTableFile, Row
from lfmcw_app.search_space.nasbench201 import all_cells

COSTS = {"none": 0, "skip_connect": 0, "nor_conv_1x1": 2, "nor_conv_3x3": 9, "avg_pool_3x3": 1}
"""What an operation adds to the made-up parameters, and takes from the made-up error."""


def made_error(cell, seed):
    """A test error in %, a function of cell and seed; cells without a convolution are worst."""
    useful = sum(COSTS[name] * (1 + at) for at, name in enumerate(cell.operations))
    return round(60.0 - useful / 4 + seed / 8, 6)


def rows_of(cells, seeds):
    for cell in cells:
        for seed in range(seeds):
            size = 100 + sum(COSTS[name] for name in cell.operations)
            yield Row(
                cell=cell.notation(),
                seed=seed,
                test_error_percent=made_error(cell, seed),
                parameters=1000 * size,
                multiply_adds_millions=size / 8,
            )


def write_csv(path, *, nodes=3, seeds=2, dataset="digits", leave_out=0):
    """Writes a table of all cells but some at the end; returns its path."""
    cells = list(all_cells(nodes))
    file = CellTableFile.open(
        path, space="nasbench201", nodes=nodes, cells=len(cells), seeds=seeds, dataset=dataset,
        about={"command": "made up"},
    )  # fmt: skip
    rows = list(rows_of(cells, seeds))
    file.append(*rows[: len(rows) - leave_out])
    return path


# ------------------------------ NATS-Bench

NATS_CELLS = [
    "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|",
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|none~2|",
    "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|",
]
DATASETS = ("cifar10-valid", "cifar10", "cifar100", "ImageNet16-120")
SETS = {
    "cifar10-valid": ("x-valid", "ori-test"), "cifar10": ("ori-test",),
    "cifar100": ("ori-test", "x-valid", "x-test"),
    "ImageNet16-120": ("ori-test", "x-valid", "x-test"),
}  # fmt: skip
"""Data set → the sets of images that its networks are tested on."""


def accuracy(index, dataset, images, seed, epochs):
    """A made-up accuracy in %, which tells all of its causes apart."""
    causes = (10 * DATASETS.index(dataset), 3 * len(images), seed % 10 / 10, epochs / 100)
    return 20.0 + index + sum(causes)


def _trial(index, dataset, seed, epochs, *, numpy_costs):
    """What NATS-Bench keeps of one training, with the keys of its `ResultsCount`."""
    every = range(epochs)
    last = epochs - 1
    measured = {f"{images}@{last}": images for images in SETS[dataset]}
    params = 0.3 + index if seed != 777 else 0.4 + index  # its seeds disagree in places
    return {
        "name": dataset,
        "net_state_dict": None,
        "train_acc1es": dict.fromkeys(every, 50.0),
        "train_acc5es": None,
        "train_losses": dict.fromkeys(every, 1.0),
        "train_times": OrderedDict.fromkeys(every, 7.5),
        "arch_config": {
            "channel": 16, "num_cells": 5, "arch_str": NATS_CELLS[index % 3], "class_num": 10,
        },
        "params": np.float64(params) if numpy_costs else params,
        "flop": np.float64(30.0 + index) if numpy_costs else 30.0 + index,
        "seed": str(seed),
        "epochs": epochs,
        "latency": [0.01],
        "eval_names": list(SETS[dataset]),
        "eval_acc1es": {
            key: accuracy(index, dataset, images, seed, epochs) for key, images in measured.items()
        },
        "eval_times": {f"{images}@{epoch}": 1.5 for images in SETS[dataset] for epoch in every},
        "eval_losses": dict.fromkeys(measured, 0.5),
    }  # fmt: skip


def nats_entry(index, *, numpy_costs=True):
    """The results of a cell: of 12 and of 200 epochs, of all data sets and of some seeds."""
    entry = OrderedDict()
    for epochs, seeds in ((12, (777,)), (200, (777, 888, 999)[: 1 + index % 3])):
        entry[str(epochs)] = {
            "arch_index": index,
            "arch_str": NATS_CELLS[index % 3],
            "all_results": {
                (dataset, seed): _trial(index, dataset, seed, epochs, numpy_costs=numpy_costs)
                for dataset in DATASETS
                for seed in seeds
            },
            "dataset_seed": {dataset: list(seeds) for dataset in DATASETS},
            "clear_net_done": True,
        }
    return entry


def compressed(path, held):
    """Writes a pickle as NATS-Bench does: protocol 4, and bzip2."""
    with bz2.BZ2File(path, "wb") as file:
        pickle.dump(held, file, protocol=4)
    return path


def nats_meta():
    return {
        "meta_archs": list(NATS_CELLS), "total_archs": len(NATS_CELLS), "arch2infos": None,
        "evaluated_indexes": set(),
    }  # fmt: skip


def write_nats_file(folder, **change):
    """Writes the one file, a part of the cells; `change` replaces entries of what it holds."""
    entries = {index: nats_entry(index) for index in range(len(NATS_CELLS))}
    held = {**nats_meta(), "arch2infos": entries, "evaluated_indexes": {0, 1, 2}, **change}
    return compressed(folder / "NATS-tss-v1_0-3ffb9.pickle.pbz2", held)


def write_small_nats_file(folder, leave_out=0):
    """Writes the one file as it would be for cells of 2 nodes, all 5 of them but some at the end.

    It is read with `nats_bench.NODES` set to 2.
    """
    names = [cell.notation() for cell in all_cells(2)]
    names = names[: len(names) - leave_out]
    entries = {index: nats_entry(index) for index in range(len(names))}
    return write_nats_file(folder, meta_archs=names, arch2infos=entries)


def write_nats_folder(folder):
    """Writes the folder with a file per cell, for a part of the cells."""
    place = folder / "NATS-tss-v1_0-3ffb9-simple"
    place.mkdir()
    compressed(place / "meta.pickle.pbz2", nats_meta())
    for index in range(len(NATS_CELLS)):
        compressed(place / f"{index:06d}.pickle.pbz2", nats_entry(index))
    return place
