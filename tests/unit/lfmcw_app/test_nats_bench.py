"""NATS-Bench's file and folder, made up in their format; files that are none, or are hostile.

The package nats_bench 1.8 reads the same made-up files and tells the same accuracies, parameters
and multiply-adds, of each seed and of their mean.
"""

from __future__ import annotations

import bz2
import os
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from made_cell_tables import (
    DATASETS,
    NATS_CELLS,
    accuracy,
    compressed,
    nats_entry,
    nats_meta,
    write_nats_file,
    write_nats_folder,
)

from lfmcw_app.errors import InputError
from lfmcw_app.known_pickle import Limits
from lfmcw_app.nats_bench import is_nats_bench, read_nats_bench

SEEDS = [(777,), (777, 888), (777, 888, 999)]


@pytest.fixture(params=[write_nats_file, write_nats_folder], ids=["file", "folder"])
def published(request, tmp_path):
    return request.param(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "images"),
    [("cifar10", "ori-test"), ("cifar100", "x-test"), ("ImageNet16-120", "x-test")],
)
def test_the_test_errors_after_200_epochs_are_read(published, dataset, images):
    table = read_nats_bench(published, dataset)
    assert (table.space, table.nodes, table.dataset) == ("nasbench201", 4, dataset)
    assert (table.expected, table.complete) == (15_625, False)  # three are made up
    assert list(table.cells) == NATS_CELLS
    for index, cell in enumerate(table.cells.values()):
        expected = {s: 100.0 - accuracy(index, dataset, images, s, 200) for s in SEEDS[index]}
        assert cell.errors == expected


def test_costs_are_those_that_its_package_tells(published):
    """Where the seeds disagree, those of seed 888; numpy's numbers become Python's."""
    table = read_nats_bench(published, "cifar10")
    costs = [(cell.parameters, cell.multiply_adds) for cell in table.cells.values()]
    assert costs == [(400_000, 30.0), (1_300_000, 31.0), (2_300_000, 32.0)]


def test_a_cell_without_a_file_is_missing(tmp_path):
    folder = write_nats_folder(tmp_path)
    (folder / "000001.pickle.pbz2").unlink()
    table = read_nats_bench(folder, "cifar10")
    assert list(table.cells) == [NATS_CELLS[0], NATS_CELLS[2]]


def test_it_is_known_by_its_name_or_its_list_of_cells(published, tmp_path):
    assert is_nats_bench(published)
    assert not is_nats_bench(tmp_path / "cells.csv")
    assert not is_nats_bench(tmp_path)


@pytest.mark.parametrize("dataset", ["digits", "cifar10-valid", "folder:cifar10"])
def test_another_data_set_is_refused(published, dataset):
    with pytest.raises(InputError, match="cifar10, cifar100, ImageNet16-120, but none on"):
        read_nats_bench(published, dataset)


# ------------------------------ damage


def without(*path):
    """The entries of a file, where that of cell 1 lacks something."""
    entry = nats_entry(1)
    place = entry
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return {"arch2infos": {1: entry}}


def with_value(key, value):
    entry = nats_entry(1)
    entry["200"]["all_results"]["cifar10", 888][key] = value
    return {"arch2infos": {1: entry}}


DAMAGED = {
    "no names": ({"meta_archs": None}, "names no cells"),
    "no results": ({"arch2infos": None}, "has no results"),
    "no such cell": ({"arch2infos": {3: nats_entry(0)}}, "a cell 3 without a name"),
    "no entry": ({"arch2infos": {1: None}}, "cell 1: the entry is not one"),
    "no 200 epochs": (without("200"), "cell 1: the entry is not one .*KeyError"),
    "no data set": (without("200", "dataset_seed", "cifar10"), "no results on cifar10, only on"),
    "no training": (without("200", "all_results", ("cifar10", 888)), "cell 1: the entry"),
    "no accuracy": (with_value("eval_acc1es", {}), "cell 1: the entry"),
    "accuracy": (with_value("eval_acc1es", {"ori-test@199": 101.0}), "not between 0 and 100"),
    "a huge number": (with_value("params", 10**400), "cell 1: the entry is not one .*Overflow"),
    "not a number": (with_value("eval_acc1es", {"ori-test@199": float("nan")}), "not between"),
    "parameters": (with_value("params", float("inf")), "numbers of parameters"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_with_its_cell(kind, tmp_path):
    change, words = DAMAGED[kind]
    with pytest.raises(InputError, match=words):
        read_nats_bench(write_nats_file(tmp_path, **change), "cifar10")


def test_a_file_that_is_no_pickle_is_refused(tmp_path):
    path = tmp_path / "x.pickle.pbz2"
    for content in (b"", b"not compressed", compressed(path, nats_meta()).read_bytes()[:50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            read_nats_bench(path, "cifar10")
    with pytest.raises(InputError, match="it holds no dictionary"):
        read_nats_bench(compressed(path, [1]), "cifar10")


# ------------------------------ hostile files


class Reduced:
    """Pickled as a call of a function, with a state where one is given."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


SCALAR = np.float64(1.0).__reduce__()[0]
DTYPE = np.dtype
HOSTILE = {
    "a call": (lambda mark: Reduced(os.mkdir, (mark,)), "it names posix.mkdir|it names nt.mkdir"),
    "weights": (lambda mark: np.zeros(3), "it names numpy.*_reconstruct"),
    "a type": (lambda mark: Reduced(DTYPE, ("O8",)), "type 'O8'"),
    "an object": (lambda mark: Reduced(SCALAR, (DTYPE("O"), [1])), "type 'O8'"),
    "a byte order": (
        lambda mark: Reduced(DTYPE, ("f8",), (3, "@", None, None, None, -1, -1, 0)),
        "unknown byte order",
    ),
    "a copy": (lambda mark: Reduced(OrderedDict, ({"x": 1},)), "_ordered.* takes 0 positional"),
    "a short number": (lambda mark: Reduced(SCALAR, (DTYPE("f8"), b"123")), "wrong size"),
    "no type": (lambda mark: Reduced(SCALAR, ("f8", b"12345678")), "a damaged number"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused(kind, tmp_path):
    make, words = HOSTILE[kind]
    mark = tmp_path / "mark"
    path = compressed(tmp_path / "x.pickle.pbz2", {"meta_archs": [make(str(mark))]})
    with pytest.raises(InputError, match=words):
        read_nats_bench(path, "cifar10")
    assert not mark.exists()


def test_a_file_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    path = compressed(tmp_path / "x.pickle.pbz2", {"meta_archs": "0" * 10**6})
    assert path.stat().st_size < 1000
    monkeypatch.setattr("lfmcw_app.nats_bench.LARGEST_FILE", Limits(content=10**5, operations=99))
    with pytest.raises(InputError, match="larger than any published file"):
        read_nats_bench(path, "cifar10")


def test_a_cell_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    folder = write_nats_folder(tmp_path)
    monkeypatch.setattr("lfmcw_app.nats_bench.LARGEST_ENTRY", Limits(content=1000, operations=999))
    with pytest.raises(InputError, match=r"000000\.pickle\.pbz2 cannot be read .*larger than any"):
        read_nats_bench(folder, "cifar10")


def bomb(path, code, count):
    """A file whose pickle repeats an operation."""
    path.write_bytes(bz2.compress(b"\x80\x04" + code * count + b"."))
    return path


@pytest.mark.parametrize("name", ["file", "names", "cell"])
def test_a_small_file_makes_few_objects(name, tmp_path):
    """3 million dictionaries, which take 200 million bytes, fit into 75."""
    if name == "file":
        path = bomb(tmp_path / "x.pickle.pbz2", b"}", 3 * 10**6)
    else:
        path = write_nats_folder(tmp_path)
        file = {"names": "meta", "cell": "000001"}[name]
        bomb(path / f"{file}.pickle.pbz2", b"}", 3 * 10**6)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more operations than any published file"):
            read_nats_bench(path, "cifar10")
        assert tracemalloc.get_traced_memory()[1] < 3 * 10**7
    finally:
        tracemalloc.stop()


def test_a_small_file_unpacks_to_little(tmp_path):
    path = compressed(tmp_path / "x.pickle.pbz2", {"meta_archs": "0" * 10**7})
    with pytest.raises(InputError, match="larger than any published file"):
        read_nats_bench(path, "cifar10")


@pytest.mark.parametrize("kind", ["f4", "f8", "i4", "i8", ">f8"])
def test_numbers_of_numpy_are_read_exactly(kind, tmp_path):
    value = np.dtype(kind).type(3) / np.dtype(kind).type(1)
    entry = nats_entry(0)
    entry["200"]["all_results"]["cifar10", 777]["flop"] = np.array(value, kind)[()]
    path = write_nats_file(tmp_path, arch2infos={0: entry})
    assert read_nats_bench(path, "cifar10").cells[NATS_CELLS[0]].multiply_adds == 3.0


def test_all_made_up_results_are_of_known_data_sets():
    assert set(nats_entry(2)["200"]["dataset_seed"]) == set(DATASETS)
