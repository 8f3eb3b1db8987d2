"""The errors by class in a report."""

from __future__ import annotations

import json
import re

import pytest
from made_run_folders import add_classes, make_folder

from lfmcw_app.report.classes import (
    MOST_MISTAKES,
    MOST_NUMBERS,
    MOST_ROWS,
    class_errors,
    rank_correlation,
    w1_confusion,
)
from lfmcw_app.report.page import run_page
from lfmcw_app.report.reading import read_run


def folder_of(tmp_path, errors, names=("cat", "dog", "cow"), **more):
    tmp_path.mkdir(exist_ok=True)
    folder = make_folder(tmp_path / "run", {"search": (8, 4)}, names=names)
    return add_classes(folder, errors, **more)


def test_classes_stand_beside_their_weights_the_worst_first(tmp_path):
    """The weights end at 4, 0.5, 2.5 (cat, dog, cow)."""
    found = class_errors(read_run(folder_of(tmp_path, [30.0, 0.0, 10.0])))
    assert [(row.name, row.error, row.weight) for row in found.rows] == [
        ("cat", 30.0, 4.0),
        ("cow", 10.0, 2.5),
        ("dog", 0.0, 0.5),
    ]
    assert found.balanced == pytest.approx(40 / 3)
    assert found.confusion is None


def test_ranks_are_correlated():
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert rank_correlation([(1, 1), (1, 2), (2, 3), (4, 9)]) == pytest.approx(0.9486832980505138)
    assert rank_correlation([(1, 1), (2, 2)]) is None
    assert rank_correlation([(1, 1), (1, 2), (1, 3)]) is None


def weigh(folder, weights):
    """Gives the classes of a run other weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["phase"] == "search":
            line["metrics"]["w2"]["class_weights"] = weights
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_correlation_says_how_often_chance_gives_it(tmp_path):
    """All orders of five classes are counted; of four, no order could be told from chance."""
    few = folder_of(tmp_path / "few", [4.0, 0.0, 1.0, 3.0, 2.0], names=list("abcde"))
    weigh(few, [1.0, 2.0, 3.0, 4.0, 5.0])
    relation = class_errors(read_run(few)).relation
    assert (relation.classes, relation.is_seen) == (5, False)
    assert relation.correlation == pytest.approx(-0.1)
    assert relation.chance == pytest.approx(114 / 120)
    page = run_page(read_run(few))
    assert "<b data-correlation>−0.10</b>" in page
    assert f"in {relation.how_often} of 100 cases, so it is no evidence of a relation." in page
    four = folder_of(tmp_path / "four", [4.0, 3.0, 2.0, 1.0], names=list("abcd"))
    weigh(four, [4.0, 3.0, 2.0, 1.0])
    assert class_errors(read_run(four)).relation is None
    assert "data-relation" not in run_page(read_run(four))
    many = folder_of(tmp_path / "many", list(map(float, range(12))), names=list("abcdefghijkl"))
    weigh(many, [1.0 + k / 10 for k in range(12)])
    relation = class_errors(read_run(many)).relation
    assert (relation.is_seen, relation.how_often) == (True, "fewer than 1")
    assert "in fewer than 1 of 100 cases, so chance hardly explains it." in run_page(read_run(many))


def test_zeros_stand_in_a_confusion_table_as_zeros(tmp_path):
    confusion = [[7, 3, 0], [0, 10, 0], [1, 0, 9]]
    page = run_page(read_run(folder_of(tmp_path, [30.0, 0.0, 10.0], confusion=confusion)))
    table = page[page.index('<table class="confusion"') :].split("</table>")[0]
    assert re.findall(r"<td[^>]*>(.*?)</td>", table) == [
        "7",
        "3",
        "0",
        "0",
        "10",
        "0",
        "1",
        "0",
        "9",
    ]
    assert table.count(" zero") == 4


def test_columns_without_any_value_are_left_out(tmp_path):
    """Here nothing is taken for another class, and the weights are of other classes."""
    plain = folder_of(tmp_path / "plain", [30.0, 0.0, 10.0])
    assert "most often taken for" not in run_page(read_run(plain))
    assert "class weight l<sub>c</sub></th>" in run_page(read_run(plain))
    confusion = [[7, 3, 0, 0], [0, 10, 0, 0], [1, 0, 9, 0], [0, 0, 0, 10]]
    other = folder_of(
        tmp_path / "other", [30.0, 0.0, 10.0, 0.0], names=("a", "b", "c", "d"), confusion=confusion
    )
    page = run_page(read_run(other))
    assert "most often taken for" in page
    assert "class weight l<sub>c</sub></th>" not in page


def test_confusion_has_numbers_or_is_a_picture(tmp_path):
    confusion = [[7, 3, 0], [0, 10, 0], [1, 0, 9]]
    folder = folder_of(tmp_path, [30.0, 0.0, 10.0], confusion=confusion)
    found = class_errors(read_run(folder)).confusion
    assert found.rows[0] == [(7, 0.7), (3, 0.3), (0, 0.0)]
    assert found.source is None
    many = MOST_NUMBERS + 1
    rows = [[10 if row == column else row % 2 for column in range(many)] for row in range(many)]
    names = [f"class {k}" for k in range(many)]
    folder = folder_of(tmp_path / "many", [1.0] * many, names=names, confusion=rows)
    found = class_errors(read_run(folder))
    assert found.confusion.source.startswith("data:image/png")
    assert len(found.mistakes) == MOST_MISTAKES
    first = found.mistakes[0]
    assert (first.right, first.answer, first.images, first.share) == (
        "class 1", "class 0", 1, 10.0
    )  # fmt: skip


def test_of_very_many_classes_the_commonest_mistakes_are_shown(tmp_path):
    names = [f"class {k}" for k in range(120)]
    mistakes = [[3, 7, 5], [119, 0, 1]]
    folder = folder_of(tmp_path, [1.0] * 120, names=names, mistakes=mistakes)
    found = class_errors(read_run(folder))
    assert found.confusion is None
    told = [(one.right, one.answer, one.images, one.share) for one in found.mistakes]
    assert told == [("class 3", "class 7", 5, 50.0), ("class 119", "class 0", 1, 10.0)]
    page = run_page(read_run(folder))
    assert '<tr data-mistake="class 3">' in page
    few = folder_of(tmp_path / "few", [1.0] * 3, mistakes=[])
    assert "The commonest mistakes" not in run_page(read_run(few))


def test_the_page_shows_classes_with_any_name(tmp_path):
    names = ("$10_$20", "häß lich 猫" * 12, "<b>&")
    confusion = [[7, 3, 0], [0, 10, 0], [1, 0, 9]]
    folder = folder_of(tmp_path, [30.0, 0.0, 10.0], names=names, confusion=confusion, doubt="Why?")
    page = run_page(read_run(folder))
    assert 'data-class-error="$10_$20"' in page
    assert "&lt;b&gt;&amp;" in page
    assert '<p class="doubt" data-doubt>Why?</p>' in page


def test_a_class_says_what_it_is_most_often_taken_for(tmp_path):
    confusion = [[4, 2, 4], [0, 10, 0], [1, 0, 9]]
    folder = folder_of(tmp_path, [60.0, 0.0, 10.0], confusion=confusion)
    rows = {row.name: row.taken_for for row in class_errors(read_run(folder)).rows}
    assert rows == {"cat": ("cow", 4), "dog": None, "cow": ("cat", 1)}
    page = run_page(read_run(folder))
    row = re.search(r'<tr data-class-error="cat">(.*?)</tr>', page)[1]
    assert 'cow <span class="count">(4)</span>' in row


def test_the_largest_class_weight_has_the_longest_bar(tmp_path):
    folder = folder_of(tmp_path, [60.0, 0.0, 10.0])
    page = run_page(read_run(folder))
    shares = dict(re.findall(
        r'data-class-error="(\w+)".*?class="n bar weight" style="--share:([\d.]+)%"', page
    ))  # fmt: skip
    assert shares == {"cat": "100.0", "dog": "12.5", "cow": "62.5"}


def test_a_result_of_an_earlier_version_has_no_classes(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 4)})
    assert class_errors(read_run(folder)) is None
    assert 'id="classes"' not in run_page(read_run(folder))


def test_of_very_many_classes_the_worst_are_shown(tmp_path):
    count = MOST_ROWS + 5
    names = [f"class {k}" for k in range(count)]
    found = class_errors(read_run(folder_of(tmp_path, list(map(float, range(count))), names=names)))
    assert len(found.rows) == MOST_ROWS
    assert found.rows[0].error == count - 1
    assert found.count == count


def test_the_mistakes_of_w1_stand_beside_the_class_weights(tmp_path):
    folder = make_folder(tmp_path / "run", {"search": (8, 4)})
    assert w1_confusion(read_run(folder)) is None
    assert "What W1 takes for what" not in run_page(read_run(folder))
    end = {"stage": "search", "round": 4, "generator": None}
    for counts in ([[7, 3, 0], [0, 10, 0], [1, 0, 9]], None):
        (folder / "search.json").write_text(json.dumps({**end, "w1_confusion": counts}))
        found, page = w1_confusion(read_run(folder)), run_page(read_run(folder))
        assert ("What W1 takes for what" in page) == (counts is not None)
        if counts is not None:
            assert found.names == ["cat", "dog", "cow"]
            assert found.rows[0] == [(7, 0.7), (3, 0.3), (0, 0.0)]
            assert "numbers of images of D<sub>val</sub>" in page
        else:  # of very many classes
            assert found is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interval_percent", [1.0, {}]),
        ("interval_percent", 3),
        ("error_percent", []),
        ("images", {}),
    ],
)
def test_entries_of_another_shape_are_named_in_the_page(tmp_path, key, value):
    folder = folder_of(tmp_path, [30.0, 0.0, 10.0])
    result = json.loads((folder / "result.json").read_text())
    result["classes"][1][key] = value
    (folder / "result.json").write_text(json.dumps(result))
    assert "the errors by class (" in run_page(read_run(folder))
