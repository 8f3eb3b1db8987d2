"""The command that draws a genotype."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from lfmcw_app.commands.draw import draw
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import GENOTYPE
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES
from lfmcw_app.search_space.nasbench201 import SumCell


def call(*arguments):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(draw)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_genotype_is_drawn_and_printed(tmp_path, suffix):
    out = tmp_path / f"cells.{suffix}"
    code, printed = call("PDARTS", "--out", out)
    assert code == 0
    assert out.stat().st_size > 5000
    first, *_ = printed.splitlines()
    assert Genotype.from_darts(first) == NAMED_GENOTYPES["PDARTS"]


def test_no_title_fails(tmp_path):
    out = tmp_path / "cells.png"
    assert call("random:0", "--nodes=2", "--out", out, "--title", r"$x_{ 細胞 \frac €50$")[0] == 0
    assert out.exists()


def test_only_new_files_of_known_formats_are_written(tmp_path):
    out = tmp_path / "cells.png"
    out.write_text("mine")
    code, printed = call("PDARTS", "--out", out)
    assert (code, out.read_text()) == (2, "mine")
    assert "already exists" in printed
    code, printed = call("PDARTS", "--out", tmp_path / "cells.docx")
    assert code == 2
    assert ".png, .svg, .pdf" in printed
    assert call("PDART", "--out", tmp_path / "new.png")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["cells.png"]


def test_a_cell_of_another_space_is_drawn(tmp_path):
    text = "|nor_conv_3x3~0|+|none~0|skip_connect~1|"
    code, printed = call(text, "--space", "nasbench201", "--out", tmp_path / "cell.png")
    assert (code, printed.splitlines()[0]) == (0, text)
    assert (tmp_path / "cell.png").stat().st_size > 5000


def test_a_run_folder_is_drawn_as_its_own_space(tmp_path):
    recipe = load_recipe("smoke", space="nasbench201")
    folder = RunFolder.create(tmp_path / "run", recipe)
    cell = SumCell(("nor_conv_3x3", "none", "skip_connect"))
    folder.write(GENOTYPE, cell.to_json())
    code, printed = call(folder.path, "--out", tmp_path / "cell.png")
    assert (code, printed.splitlines()[0]) == (0, cell.notation())
