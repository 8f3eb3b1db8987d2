"""DARTS's notation: what published programs print is read, nothing else, and nothing is run."""

from __future__ import annotations

import warnings

import pytest

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.darts_notation import is_notation, read_notation, write_notation
from lfmcw_app.search_space.genotype import Genotype, random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES

# As quark0/darts has it in genotypes.py, line breaks included.
DARTS_V2 = """
DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0),
('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0),
('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0),
('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])
"""
EDGES = "[('sep_conv_3x3', 1), ('skip_connect', 0)]"


def cell(edges=EDGES, concat="range(2, 3)", *, reduce=EDGES, reduce_concat="range(2, 3)"):
    return (
        f"Genotype(normal={edges}, normal_concat={concat}, reduce={reduce}, "
        f"reduce_concat={reduce_concat})"
    )


SMALL = {kind: [["sep_conv_3x3", 1], ["skip_connect", 0]] for kind in ("normal", "reduction")}


def test_the_published_text_of_darts_is_its_published_genotype():
    assert Genotype.from_text(DARTS_V2) == NAMED_GENOTYPES["DARTS_V2"]


def test_a_genotype_is_written_as_published_programs_print_it():
    edges = [("sep_conv_3x3", 1), ("skip_connect", 0)]
    assert write_notation({"normal": edges, "reduction": edges}) == cell()


@pytest.mark.parametrize("name", NAMED_GENOTYPES)
def test_published_genotypes_survive_the_notation(name):
    genotype = NAMED_GENOTYPES[name]
    assert Genotype.from_darts(genotype.to_darts()) == genotype
    assert is_notation(genotype.to_darts())
    assert not is_notation(genotype.to_json())


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "PC_DARTS_cifar = ",
        "# found in May\n\nBEST=",
        "05/28 03:22:11 PM genotype = ",
        "05/28 03:22:11 PM ",
        "2019-08-08 10:11:12,123 genotype = ",
        "2019-08-08 10:11:12,123 - INFO - genotype = ",
        "[11/22 10:11:12] genotype = ",
        "INFO:root:genotype = ",
    ],
)
def test_a_name_and_the_time_of_a_log_may_stand_before_it(prefix):
    assert read_notation(f"{prefix}{cell()}\n") == SMALL


@pytest.mark.parametrize(
    "concat", ["range(2, 3)", "list(range(2, 3))", "[2]", "(2,)", "[np.int64(2)]", "list([2])"]
)
def test_all_ways_of_writing_the_returned_nodes_are_read(concat):
    assert read_notation(cell(concat=concat, reduce_concat=concat)) == SMALL


@pytest.mark.parametrize("one", ["1", "np.int64(1)", "numpy.int32(1)"])
def test_integers_may_be_those_of_numpy(one):
    edges = f"[['sep_conv_3x3', {one}], ('skip_connect', 0)]"
    assert read_notation(cell(edges, reduce=edges)) == SMALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (cell() + "\n" + cell(), r"2 genotypes in this text \(lines \[1, 2\]\)"),
        (cell(concat="[3]"), r"normal_concat is \[3\].*returns fewer"),
        (cell(concat="[2, 2]"), "normal_concat"),
        (cell(concat="range(3)"), "normal_concat"),
        (cell(concat="[True]"), "consists of names in quotes"),
        (cell(reduce_concat="range(2, 10000000000000000000000)"), "reduce_concat"),
        (cell(concat="range(2, 10**9)"), r"got '10 \*\* 9'"),
        (cell(concat="range('2')"), "consists of names in quotes"),
        (cell(concat="len([1, 2])"), "consists of names in quotes"),
        (cell("[]"), "2 pairs"),
        (cell("[('sep_conv_3x3', 1)]"), "2 pairs"),
        (cell("[('sep_conv_3x3', 1), 3]"), "An edge of the genotype's 'normal' is a pair"),
        (cell("[('sep_conv_3x3', 1), ('skip_connect',)]"), "is a pair"),
        (cell("[('sep_conv_3x3', 1), ('skip_connect', -1)]"), "got '-1'"),
        (cell("[('sep_conv_3x3', 1), ('skip_connect', 0.0)]"), "got '0.0'"),
        ("Genotype([], [], [], [])", "names its fields"),
        ("Genotype(normal=[])", "has the fields normal, normal_concat, reduce"),
        ("Genotype(normal=[], **x)", "each once"),
        (cell().replace("(n", f"(normal={EDGES}, n", 1), "each once"),
        ("x.Genotype(normal=[])", "with at most"),
        ("a = b = " + cell(), "with at most"),
        ("a.b = " + cell(), "with at most"),
        ("import os; " + cell(), "with at most"),
        (cell() + ".normal", "with at most"),
        ("Genotype(", "not a genotype in DARTS's notation"),
        ("Genotype(\x00)", "not a genotype in DARTS's notation"),
        ("Genotype('\ud800')", "not a genotype in DARTS's notation"),
        ("Genotype(" + "[" * 50_000, "not a genotype in DARTS's notation"),
        ("Genotype(normal=" + "-" * 50_000 + "1)", "nested too deeply"),
        ("Genotype(normal=1" + "0" * 5000 + ")", "not a genotype in DARTS's notation"),
        ("Genotype" + "()" * 4000, "not a genotype in DARTS's notation"),
        ("Genotype(normal=" + "f(" * 80 + ")" * 80 + ")", "has the fields"),
        (cell("f(" * 80 + ")" * 80), "consists of names in quotes"),
        (cell("[" * 80 + "]" * 80), "consists of names in quotes"),
        (cell() + " " * 100_001, "at most 100,000 characters"),
        ("no genotype at all", "with at most|not a genotype in DARTS's notation"),
    ],
)
def test_what_is_no_genotype_is_refused_with_words(text, message):
    with pytest.raises(InputError, match=message) as raised:
        read_notation(text)
    assert len(str(raised.value)) < 600


def test_names_and_sources_are_checked_as_those_of_json_are():
    with pytest.raises(InputError, match="Did you mean 'sep_conv_3x3'"):
        Genotype.from_darts(cell("[('sep_conv_3x4', 1), ('skip_connect', 0)]"))
    with pytest.raises(InputError, match="can read 0 to 1"):
        Genotype.from_darts(cell("[('sep_conv_3x3', 2), ('skip_connect', 0)]"))
    with pytest.raises(InputError, match="Unknown primitive"):
        Genotype.from_darts(cell("[(['a'], 1), ('skip_connect', 0)]"))


def test_nothing_in_the_text_is_run(tmp_path):
    made = tmp_path / "made"
    with pytest.raises(InputError):
        read_notation(cell(concat=f"open({str(made)!r}, 'w')"))
    assert not made.exists()


def test_odd_text_is_refused_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="Unknown primitive"):
            Genotype.from_darts(cell("[('\\d', 1), ('skip_connect', 0)]"))


def test_random_genotypes_survive_the_notation():
    for seed in range(20):
        genotype = random_genotype(1 + seed % 6, seed)
        assert Genotype.from_text(genotype.to_darts()) == genotype
