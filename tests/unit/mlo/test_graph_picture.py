"""What a user of the library meets everywhere: pictures in notebooks, reprs, `python -m mlo.info`,
completion, metadata.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
import yaml

import mlo
from lfmcw_app import cli
from mlo import info
from mlo.testing import bilevel_quadratic, diamond

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def optimizer():
    return mlo.MultilevelOptimizer(diamond().problems, "cg")


def test_a_notebook_shows_the_graph_with_all_problems_and_arrows():
    graph = optimizer().graph
    picture = ET.fromstring(graph._repr_html_())
    assert [title.text for title in picture.iter(f"{SVG}title")] == list(graph.problems)
    solutions = sum(len(graph.lower(name)) for name in graph.problems)
    values = sum(len(graph.upper(name)) for name in graph.problems)
    paths = list(picture.iter(f"{SVG}path"))
    assert len(paths) == solutions + values
    assert sum("stroke-dasharray" in path.attrib for path in paths) == values
    assert solutions > 0
    width, height = (float(part) for part in picture.attrib["viewBox"].split()[2:])
    for box in picture.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_lower_problems_stand_below_those_above_them():
    graph = optimizer().graph
    picture = ET.fromstring(graph._repr_html_())
    heights = {
        group.find(f"{SVG}title").text: float(group.find(f"{SVG}rect").attrib["y"])
        for group in picture.iter(f"{SVG}g")
    }
    for name in graph.problems:
        assert all(heights[lower] > heights[name] for lower in graph.lower(name))


def test_a_notebook_shows_an_optimizer_with_its_engines():
    html = optimizer()._repr_html_()
    assert "<svg" in html
    assert "w2: cg" in html or ": cg" in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_reprs_say_what_a_person_wants_to_know():
    opt = mlo.MultilevelOptimizer(bilevel_quadratic().problems, "cg")
    record = opt.step()
    text = repr(record)
    assert text.startswith("Record(round=1: ")
    for name, loss in record.losses.items():
        assert f"{name}={loss:.4g}" in text
    assert "solved: " in text
    assert "tensor" not in text
    assert repr(opt).startswith("MultilevelOptimizer(")
    assert "cg" in repr(opt)
    assert "parameters" in repr(next(iter(opt.problems.values())))
    assert repr(mlo.Neumann(num_terms=3)).startswith("Neumann(")


def test_the_record_of_a_game_and_of_a_failed_solve_says_so():
    record = mlo.Record(round=2)
    record.add(
        "gan",
        loss={"g": torch.tensor(0.5), "d": torch.tensor(1.25)},
        metrics={},
        gradient_norm=torch.tensor(1.0),
    )
    record.solves["gan"] = mlo.SolveReport(problem="gan", engine="gmres", converged=False)
    assert repr(record) == "Record(round=2: gan=(g=0.5, d=1.25); solved: gan; not converged: gan)"


def test_every_public_name_exists_is_documented_and_completes():
    for name in mlo.__all__:
        assert name in dir(mlo)
        assert getattr(mlo, name).__doc__
    assert (Path(mlo.__file__).parent / "py.typed").exists()


def test_info_lists_versions_devices_and_every_engine(monkeypatch):
    text = info.describe()
    for words in (mlo.__version__, torch.__version__, "threads", "cuda"):
        assert words in text
    for engine in mlo.available_engines():
        assert f"\n  {engine} " in text
    assert "[finite_difference]" in next(
        line for line in text.splitlines() if line.startswith("  darts ")
    )
    printed = subprocess.run(
        [sys.executable, "-m", "mlo.info"], capture_output=True, text=True, timeout=120
    )
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.splitlines()[0] == text.splitlines()[0]


@pytest.mark.parametrize(
    ("module", "words", "expected"),
    [
        ("run", "lfmcw fash", "fashion-mnist"),
        ("run", "lfmcw --preset sm", "small"),
        ("run", "lfmcw --space pc", "pcdarts"),
        ("evaluate", "lfmcw-evaluate DARTS", "DARTS_V2"),
    ],
)
def test_the_shell_completes_options_and_values(module, words, expected):
    program = words.split()[0]
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    environment = {
        **os.environ,
        variable: "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = f"import sys; sys.argv = [{program!r}]; from lfmcw_app.{module} import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert expected in finished.stdout.split()


def test_completion_offers_only_what_begins_alike():
    assert cli.completing("smoke", "small", "paper")("sm") == ["smoke", "small"]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(citation["version"]) == mlo.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_hooks_before_a_commit_are_the_checks_of_ci_and_fetch_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    programs = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    checks = makefile.split("\ncheck:")[1].split("\n\n")[0]
    assert programs == {line.split("$(BIN)/")[1].split()[0] for line in checks.splitlines()[1:]}
