"""Entries of another package: found by its entry points, and missed where it is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MODULE = """
from torch import nn

from lfmcw_app.generators.games import GAMES
from lfmcw_app.recipe import Recipe  # an own module may import any of the application's
from lfmcw_app.search_space.operations import Primitive
from lfmcw_app.spaces import Space


def layer(channels, stride, style):
    return nn.Sequential(
        style.make_activation(),
        nn.Conv2d(channels, channels, 1, stride, bias=False),
        style.make_norm(channels),
    )


CONV = Primitive(layer=layer, colour="#12ab34")
SPACE = Space(title="A space of my own")
GAME = GAMES["dcgan"]
"""

ENTRY_POINTS = """
[lfmcw_app.primitives]
conv_1x1 = own_entries:CONV
broken = no_such_module:CONV
dil_conv_5x5 = own_entries:CONV

[lfmcw_app.spaces]
own_space = own_entries:SPACE

[lfmcw_app.generators]
own_game = own_entries:GAME
"""

CHOSEN = "search.primitives=[none, skip_connect, conv_1x1]"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "own_entries.py").write_text(MODULE)
    metadata = folder / "own_entries-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-entries\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def call(folder, module, *args, package=None):
    path = os.pathsep.join(map(str, [ROOT, *([package] if package else [])]))
    return subprocess.run(
        [sys.executable, "-m", f"lfmcw_app.{module}", *args],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, package):
    """A short run with the package's operation, space and generator."""
    folder = tmp_path_factory.mktemp("own")
    given = ("--space", "own_space", "--set", CHOSEN, "--set", "search.generator.name=own_game")
    small = ("--preset", "smoke", "--max-steps", "1", "--seed", "1", "--out", "run")
    done = call(folder, "run", "digits", *small, *given, package=package)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_an_operation_of_another_package_is_searched_and_trained(run_folder):
    genotype = (run_folder / "genotype.json").read_text("utf-8")
    assert "conv_1x1" in genotype
    page = (run_folder / "report.html").read_text("utf-8")
    assert "--op-conv_1x1: #12ab34;" in page
    assert "A space of my own" in page
    # What a package brings, and the run does not use, is not imported, so that it can be broken.
    assert "broken" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "args"),
    [("run", ("--resume", "run")), ("report", ("run",)), ("evaluate", ("run", "digits"))],
)
def test_a_run_says_what_is_not_installed(run_folder, module, args):
    done = call(run_folder.parent, module, *args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    told = " ".join(done.stderr.split())
    assert re.search("Unknown (generator 'own_game'|primitive 'conv_1x1')", told)
    assert "install" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("broken", "'broken' (no_such_module:CONV) cannot be loaded: ModuleNotFoundError"),
        ("dil_conv_5x5", "Several packages have a primitive called 'dil_conv_5x5'"),
    ],
)
def test_a_broken_package_is_named_where_it_is_used(run_folder, package, chosen, message):
    given = ("--preset", "smoke", "--set", f"search.primitives=[{chosen}]", "--print-config")
    done = call(run_folder.parent, "run", "digits", *given, package=package)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert call(run_folder.parent, "run", "--help", package=package).returncode == 0
