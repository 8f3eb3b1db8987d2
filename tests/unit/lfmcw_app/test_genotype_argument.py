"""The argument GENOTYPE: a name, a number, a file, a run folder, a text, and what is neither."""

from __future__ import annotations

import pytest

from lfmcw_app import run_files
from lfmcw_app.errors import InputError
from lfmcw_app.genotype_argument import read_genotype
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES
from lfmcw_app.search_space.nasbench201 import SumCell
from lfmcw_app.spaces import SPACES

GENOTYPE = random_genotype(3, 5)
HOW = load_recipe("smoke").search
OF_ONE_CELL = load_recipe("smoke", space="nasbench201").search


def test_names_and_numbers_are_genotypes():
    assert read_genotype("PDARTS", HOW) is NAMED_GENOTYPES["PDARTS"]
    assert read_genotype("random:17", HOW) == random_genotype(2, 17)


@pytest.mark.parametrize("write", [GENOTYPE.to_json, GENOTYPE.to_darts])
def test_a_file_and_its_text_are_read_in_both_notations(tmp_path, write):
    path = tmp_path / "cell"
    path.write_text("\ufeff" + write(), encoding="utf-8")  # as Windows's editors begin a file
    assert read_genotype(str(path), HOW) == GENOTYPE
    assert read_genotype(write(), HOW) == GENOTYPE


@pytest.mark.parametrize("name", [run_files.GENOTYPE, run_files.EVALUATED])
def test_a_run_folder_has_the_genotype_found_or_given(tmp_path, name):
    (tmp_path / name).write_text(GENOTYPE.to_json())
    assert read_genotype(str(tmp_path), HOW) == GENOTYPE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PDART", "Did you mean 'PDARTS'"),
        ("x" * 5000, "No file, run folder or published genotype"),
        ("", "No file, run folder or published genotype|cannot be read|holds no genotype"),
        ("random:x", "random:N with a whole number N"),
        ("random:" + "9" * 6000, "below 2\\*\\*62"),
        ("random:²", "random:N"),
        ("missing.json", "missing.json cannot be read"),
        ("a\0b.json", "cannot be read"),
        ("Genotype(", "DARTS's notation"),
        ("{", "JSON"),
    ],
)
def test_what_is_no_genotype_is_refused(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        read_genotype(text, HOW)
    assert len(str(raised.value)) < 600


def test_a_folder_without_a_genotype_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no genotype"):
        read_genotype(str(tmp_path), HOW)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "cell.txt"
    path.write_text("Genotype(normal=3)")
    with pytest.raises(InputError, match=r"cell\.txt is not a genotype\. A genotype in DARTS's"):
        read_genotype(str(path), HOW)


def test_text_and_numbers_are_cells_of_the_space():
    text = "|nor_conv_3x3~0|+|none~0|skip_connect~1|"
    assert read_genotype(text, OF_ONE_CELL) == SumCell(("nor_conv_3x3", "none", "skip_connect"))
    drawn = read_genotype("random:4", OF_ONE_CELL)
    assert drawn == SPACES["nasbench201"].random(OF_ONE_CELL, 4)
    of_s1 = load_recipe("smoke", space="s1").search
    assert read_genotype("random:4", of_s1) == SPACES["s1"].random(of_s1, 4)
