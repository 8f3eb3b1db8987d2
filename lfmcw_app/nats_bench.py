"""Reads the table of NATS-Bench's topology space, which is that of NAS-Bench-201.

It is published as one file, `NATS-tss-v1_0-3ffb9.pickle.pbz2`, and as a folder with a file per
cell, `NATS-tss-v1_0-3ffb9-simple`; both are pickles, compressed by bzip2. A cell's entry is
{"12": …, "200": …}, by the epochs of the training, each with the results of all data sets and
seeds. The reader takes what the package `nats_bench` calls the test accuracy after 200 epochs.

References: Dong and Yang, NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture
Search (2020); Dong et al., NATS-Bench: Benchmarking NAS Algorithms for Architecture Topology and
Size (2021); https://github.com/D-X-Y/NATS-Bench.
"""

from __future__ import annotations

import bz2
import io
import math
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmcw_app.cell_table import CellTable, TrainedCell
from lfmcw_app.errors import InputError, listed, shown
from lfmcw_app.known_pickle import Limits, PickleError, unpickled
from lfmcw_app.search_space.nasbench201 import cell_count

__all__ = ["ENDING", "TESTED_ON", "is_nats_bench", "read_nats_bench"]

ENDING = ".pickle.pbz2"
META = f"meta{ENDING}"
"""The file of the folder that names its cells."""

SPACE, NODES = "nasbench201", 4
TESTED_ON = {"cifar10": "ori-test", "cifar100": "x-test", "ImageNet16-120": "x-test"}
"""Data set → the set of its images that no training and no choice has seen, as the file names it.

`nats_bench` calls these "test" too. Networks of cifar10 learn from all of its training images.
"""

EPOCHS = "200"
SEED_OF_COSTS = 888
"""If the seeds have different costs, those of this one are right, according to `nats_bench`."""

LARGEST_FILE = Limits(content=2**34, operations=2**31)
LARGEST_META = Limits(content=2**23, operations=2**18)
LARGEST_ENTRY = Limits(content=2**24, operations=2**19)
"""Limits of the unpacked whole table, names of all cells, and one cell.

An entry of full length has 0.2 million bytes and 33,000 operations, and there are 15,625.
"""

LEAST, MOST_UNPACKED, MOST_OPERATIONS = 2**16, 256, 64
"""Bytes and operations that any file may have, and how many more for each of its packed bytes.

An entry of full length has 35 and 6 of them, made up of numbers that repeat; those of true ones
pack less. So a small file cannot unpack to a large one.
"""


def is_nats_bench(path: Path) -> bool:
    """Whether a path has the name of a NATS-Bench file, or is such a folder."""
    return path.name.endswith(ENDING) or (path / META).is_file()


def read_nats_bench(path: Path, dataset: str) -> CellTable:
    """Reads the published file or folder.

    Args:
        path: of either.
        dataset: cifar10, cifar100 or ImageNet16-120.

    Raises:
        InputError: if it is damaged, holds what it may not, or lacks the data set.
    """
    if dataset not in TESTED_ON:
        raise InputError(
            f"{path} has errors on {', '.join(TESTED_ON)}, but none on {shown(dataset)}. Use one "
            "of these data sets. If yours holds the images of one of them, say so with --set "
            "lookup.dataset=NAME."
        )
    of_folder = path.is_dir()
    meta = _held(path / META, LARGEST_META) if of_folder else _held(path, LARGEST_FILE)
    names = meta.get("meta_archs")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is not a table of NATS-Bench: it names no cells (meta_archs).")
    entries = _of_folder(path, len(names)) if of_folder else _of_file(path, meta)
    cells = {}
    for index, entry in entries:
        if not 0 <= index < len(names):
            raise InputError(f"{path} is damaged: it has results of a cell {index} without a name.")
        cells[names[index]] = _trained(entry, dataset, f"{path}, cell {index}")
    return CellTable(
        name=path.name,
        space=SPACE,
        nodes=NODES,
        dataset=dataset,
        expected=cell_count(NODES),
        seeds=1,
        cells=cells,
        about={"source": "NATS-Bench, topology space", "epochs": EPOCHS},
    )


def _of_file(path: Path, held: Mapping[Any, Any]) -> Iterator[tuple[int, Any]]:
    """Index and entry of each cell of the one file."""
    entries = held.get("arch2infos")
    if not isinstance(entries, dict) or not all(type(index) is int for index in entries):
        raise InputError(f"{path} is not a table of NATS-Bench: it has no results (arch2infos).")
    yield from entries.items()


def _of_folder(path: Path, cells: int) -> Iterator[tuple[int, Any]]:
    """Index and entry of each cell whose file is there, one at a time."""
    for index in range(cells):
        file = path / f"{index:06d}{ENDING}"
        if file.is_file():
            yield index, _held(file, LARGEST_ENTRY)


# ------------------------------ an entry


def _trained(entry: Any, dataset: str, where: str) -> TrainedCell:
    """The test errors of a cell after the whole training, of each seed."""
    try:
        of_epochs = entry[EPOCHS]
        seeds = of_epochs["dataset_seed"].get(dataset, [])
        results = {seed: of_epochs["all_results"][dataset, seed] for seed in seeds}
        key = f"{TESTED_ON[dataset]}@{int(EPOCHS) - 1}"
        errors = {seed: 100.0 - float(of["eval_acc1es"][key]) for seed, of in results.items()}
        costs = {seed: (float(of["params"]), float(of["flop"])) for seed, of in results.items()}
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{where}: the entry is not one of NATS-Bench ({type(error).__name__}: {error})."
        ) from None
    if not errors:
        has = [str(name) for name in of_epochs["dataset_seed"]]
        raise InputError(
            f"{where} has no results on {dataset}, only on {listed(has) or 'nothing'}."
        )
    if not all(0.0 <= error <= 100.0 for error in errors.values()):
        raise InputError(f"{where} is damaged: an accuracy is not between 0 and 100%.")
    parameters, multiply_adds = _costs(costs)
    if not (0 < parameters < 1e6 and 0 <= multiply_adds < 1e9):
        raise InputError(f"{where} is damaged: its numbers of parameters or multiply-adds are.")
    return TrainedCell(
        errors=errors, parameters=round(1e6 * parameters), multiply_adds=multiply_adds
    )


def _costs(costs: Mapping[int, tuple[float, float]]) -> tuple[float, float]:
    """Millions of parameters and multiply-adds, as `nats_bench` reports them."""

    def told(which: int) -> float:
        values = {seed: cost[which] for seed, cost in costs.items()}
        agree = len({f"{value:.5f}" for value in values.values()}) == 1
        if not agree and SEED_OF_COSTS in values:
            return values[SEED_OF_COSTS]
        return math.fsum(values.values()) / len(values)

    return told(0), told(1)


# ------------------------------ pickles

_FORMATS = {"f4": "f", "f8": "d", "i4": "i", "i8": "q"}
"""Types of numpy's numbers → their letters in `struct`."""


@dataclass
class _NumberType:
    """Stands for a numpy.dtype, so that no pickle can set the state of a real one."""

    letter: str
    order: str = "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1]  # of (version, byte order, …)
        if order not in ("<", ">"):
            raise PickleError("it holds a number of unknown byte order")
        self.order = order


def _number_type(name: Any, *_: Any) -> _NumberType:
    if not isinstance(name, str) or name not in _FORMATS:
        raise PickleError(f"it holds an array or a number of the type {shown(name)}")
    return _NumberType(_FORMATS[name])


def _number(of: Any, content: Any) -> float:
    """A number of numpy as one of Python."""
    if not isinstance(of, _NumberType) or not isinstance(content, bytes):
        raise PickleError("it holds a damaged number")
    try:
        value: float = struct.unpack(f"{of.order}{of.letter}", content)[0]
    except struct.error as error:
        raise PickleError(f"it holds a number of the wrong size: {error}") from None
    return value


def _ordered() -> OrderedDict[Any, Any]:
    """Makes an empty one, filled later: with an argument, a short call could copy a lot."""
    return OrderedDict()


_KNOWN = {
    ("collections", "OrderedDict"): _ordered,
    ("numpy", "dtype"): _number_type,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}
"""All names that the published files need: no weights, and only single numbers of numpy."""


def _held(path: Path, limits: Limits) -> Mapping[Any, Any]:
    """The dictionary in a file."""
    try:
        size = path.stat().st_size
        content = min(limits.content, LEAST + MOST_UNPACKED * size)
        operations = min(limits.operations, LEAST + MOST_OPERATIONS * size)
        with io.BufferedReader(bz2.BZ2File(path)) as file:
            held = unpickled(
                file,
                _KNOWN,
                limits=Limits(content=content, operations=operations),
                states=(_NumberType,),
            )
    except (OSError, PickleError) as error:
        raise InputError(
            f"The NATS-Bench file {path} cannot be read ({error}). Of the published files, use "
            f"NATS-tss-v1_0-3ffb9{ENDING} or the folder NATS-tss-v1_0-3ffb9-simple, which hold no "
            "weights. If it is one of these, download it again."
        ) from None
    if not isinstance(held, dict):
        raise InputError(f"{path} is not a table of NATS-Bench: it holds no dictionary.")
    return held
