"""The readers of files that may have been edited: name → what reads any bytes as such a file.

Each returns a value or raises an error for a user (`ERRORS`). tests/property/test_readers.py gives
them what Hypothesis makes, tests/faults/fuzz_readers.py what atheris does.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path

import torch
from made_run_folders import make_folder

import mlo
from lfmcw_app.cell_table_file import read_cell_table
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint, check_unchanged
from lfmcw_app.groups import _read as read_groups_file
from lfmcw_app.network_file import NetworkFile
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.report.reading import read_run
from lfmcw_app.result_rows import row_of
from lfmcw_app.results_file import read_results
from lfmcw_app.resuming import known_recipes, numbers_changed
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.runs import Run
from lfmcw_app.search_end import read_search_end
from lfmcw_app.search_space.genotype import Genotype
from lfmcw_app.search_space.nasbench201 import SumCell
from mlo.testing import Vector

ERRORS = (InputError, mlo.CheckpointError)

ENVIRONMENT = {
    "started": "2026-01-01T10:00:00+00:00", "mlo": "1.0", "torch": "2.9", "gpu": None,
    "commit": None, "completed": None,
}  # fmt: skip


class Folder:
    """A complete run, of which one file at a time is replaced."""

    def __init__(self, above: Path) -> None:
        self.path = make_folder(above / "run", {"search": (8, 2)})
        (self.path / "environment.json").write_text(json.dumps(ENVIRONMENT))
        # A short one: it is parsed again by each reader, and parsing takes most of the time.
        (self.path / "config.yaml").write_text("preset: smoke\nsearch: {epochs: 1, nodes: 2}\n")
        self.above = above

    def reading(self, name, data, read):
        """What `read` makes of the folder with these bytes in a file; it is put back."""
        file = self.path / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(data)
        try:
            return read(self.path)
        finally:
            file.unlink()
            if before is not None:
                file.write_bytes(before)


def _file(read):
    """A target that reads a file of its own."""

    def target(folder, data):
        path = folder.above / "file"
        path.write_bytes(data)
        return read(path)

    return target


def _in_folder(name, *reads):
    """A target that reads a file of a run folder in several ways, each of which has its turn."""

    def target(folder, data):
        refused = None
        for read in reads:
            try:
                found = folder.reading(name, data, read)
            except ERRORS as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return found

    return target


def _optimizer():
    problems = []
    for name in ("w", "x"):
        module = Vector(torch.ones(3))
        sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        problems.append(mlo.Problem(name, module=module, optimizer=sgd, loss=_loss))
    return mlo.MultilevelOptimizer(problems[:1])


def _loss(w, batch):
    return (w.v**2).sum()


@cache
def _state():
    made = _optimizer()
    made.step()
    return made.state_dict()


def plain_state(folder, data):
    """Loads a state of which plain data say what is replaced: {dotted path: value}."""
    try:
        edits = json.loads(data)
    except (ValueError, RecursionError):
        return None
    run, state = _optimizer(), _state()
    if not isinstance(edits, dict):
        return run.load_state_dict(edits)
    for path, value in edits.items():
        state = _with(state, path.split("."), value)
    return run.load_state_dict(state)


def _with(tree, keys, value):
    key, *rest = keys
    inner = tree.get(key) if isinstance(tree, dict) else None
    return {**tree, key: _with(inner, rest, value) if rest and isinstance(inner, dict) else value}


def _unchanged(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_unchanged(path, Fingerprint.of_name("digits"))


def _recipes(path):
    folder = RunFolder.open(path)
    return known_recipes(path, folder.recipe), folder.changed_environment()


TARGETS = {
    "recipe": _file(lambda path: load_recipe("smoke", config=path)),
    "config.yaml": _in_folder("config.yaml", RunFolder.open, read_run),
    "genotype": _file(Genotype.load),
    "cell of NAS-Bench-201": _file(SumCell.load),
    "metrics.jsonl": _in_folder("metrics.jsonl", read_run, lambda path: Run(path).metrics),
    "timings.jsonl": _in_folder(
        "timings.jsonl", read_run, lambda path: row_of("table", "arm", path)
    ),
    "result.json": _in_folder(
        "result.json",
        read_run,
        lambda path: RunFolder.open(path).result,
        lambda path: row_of("table", "arm", path),
        lambda path: Run(path)._repr_html_(),
    ),
    "environment.json": _in_folder(
        "environment.json", read_run, _recipes, lambda path: row_of("table", "arm", path)
    ),
    "dataset.json": _in_folder("dataset.json", read_run, _unchanged),
    "changes.jsonl": _in_folder("changes.jsonl", read_run, numbers_changed, _recipes),
    "search.json": _in_folder(
        "search.json", read_run, lambda path: read_search_end(RunFolder.open(path))
    ),
    "runs.csv": _file(read_results),
    "table of cells": _file(lambda path: read_cell_table(path, None)),
    "groups": _file(read_groups_file),
    "network.pt": _file(NetworkFile.load),
    "state of a run": plain_state,
}
"""Name of a kind of file → reads bytes as such a file of a `Folder`."""


def seeds(folder):
    """Name of a target → files that are right, to begin with."""
    run = folder.path
    kept = {
        name: [(run / name).read_bytes()]
        for name in TARGETS
        if "." in name and (run / name).is_file()
    }
    genotype = Genotype.load(run)
    cell = SumCell(("none", "skip_connect", "nor_conv_1x1"))
    change = {
        "key": "search.tf32",
        "old": False,
        "new": True,
        "phase": "search",
        "round": 1,
        "time": "",
    }
    timing = {"phase": "search", "rounds": [1, 2], "seconds": 1.5, "problems": {}}
    return {
        **kept,
        "recipe": [b"seed: 3\nsearch: {nodes: 2, lambda: .5}\ndata: &a {fit: pad}\n"],
        "genotype": [genotype.to_json().encode(), genotype.to_darts().encode()],
        "cell of NAS-Bench-201": [cell.to_json().encode(), cell.notation().encode()],
        "changes.jsonl": [json.dumps(change).encode() + b"\n"],
        "timings.jsonl": [json.dumps(timing).encode() + b"\n"],
        "groups": [b"file,group\na/1.png,p1\n"],
        "table of cells": [
            b"# space: nasbench201\n# nodes: 3\n# cells: 125\n# seeds: 1\n# dataset: digits\n"
            b"cell,seed,test_error_percent,parameters,multiply_adds_millions\n"
            b"|none~0|+|none~0|none~1|,0,5.5,100,1.5\n"
        ],
        "state of a run": [
            b'{"round": 3, "random.numpy.pos": 1, "problems.w.updates": 2}',
            b'{"problems.w.optimizers.w.param_groups": [], "random.python.words": [1, 2]}',
            *(
                json.dumps({path: 1}).encode()
                for path in (".".join(map(str, keys)) for keys in places(_state()))
            ),
        ],
    }


def places(tree, above=()):
    """The path of every entry of plain data."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in entries:
        yield (*above, key)
        if isinstance(value, (dict, list)) and len(value) < 100:
            yield from places(value, (*above, key))


def edited(tree, path, value):
    """A copy of plain data with another value at a path."""
    tree = json.loads(json.dumps(tree))
    within = tree
    for key in path[:-1]:
        within = within[key]
    within[path[-1]] = value
    return tree
