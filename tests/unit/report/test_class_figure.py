"""The picture of class weights beside a confusion matrix."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from lfmcw_app.drawing import drawing
from lfmcw_app.errors import InputError
from lfmcw_app.report.class_figure import GREY, MOST_CLASSES, draw_class_weights

NAMES = ("cat $", "ship", "dog", "car", "frog", "猫")
LAST = (2.0, 0.5, 1.8, 0.7, 1.5, 1.2)
CONFUSION = [[10 * (row == column) + row for column in range(6)] for row in range(6)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    found = []
    save = Figure.savefig

    def saved(figure, *arguments, **options):
        found.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return found


def weights(rounds=40):
    ramp = np.linspace(0.0, 1.0, rounds)
    return np.stack([2.0 + (last - 2.0) * ramp for last in LAST])


def drawn(path, figures, **options):
    draw_class_weights(weights(), CONFUSION, NAMES, path / "f.png", **options)
    with Image.open(path / "f.png") as image:
        assert image.width > 800
    return figures[-1].axes


def test_rows_and_columns_are_in_the_order_of_the_last_weights(tmp_path, figures):
    _, matrix = drawn(tmp_path, figures)
    order = ["cat $", "dog", "frog", "猫", "car", "ship"]
    assert [label.get_text() for label in matrix.get_yticklabels()] == order
    assert [label.get_text() for label in matrix.get_xticklabels()] == order
    shares = matrix.images[0].get_array()
    assert shares[0, 0] == 100.0  # the cat's row: 10 right of 10
    assert shares[-1, 0] == pytest.approx(100.0 / 16)  # ships as cats: 1 of 16
    assert shares.sum(axis=1).tolist() == pytest.approx([100.0] * 6)


def test_the_heaviest_and_the_lightest_are_in_colour(tmp_path, figures):
    lines, _ = drawn(tmp_path, figures)
    colours = {text.get_text(): text.get_color() for text in lines.texts}
    plain = [name for name, colour in colours.items() if colour == "#626b77"]
    assert plain == ["猫"]
    assert len(set(colours.values())) == len(NAMES)
    assert sum(to_hex(line.get_color()) == GREY for line in lines.lines) == 1


def test_chosen_classes_are_in_colour(tmp_path, figures):
    lines, _ = drawn(tmp_path, figures, emphasised=("ship", "dog"))
    colours = {text.get_text(): text.get_color() for text in lines.texts}
    assert sorted(name for name, colour in colours.items() if colour != "#626b77") == [
        "dog", "ship",
    ]  # fmt: skip


def test_names_at_the_ends_do_not_cover_each_other(tmp_path, figures):
    values = np.full((6, 30), 1.0) + 0.001 * np.arange(6)[:, None] + np.linspace(1, 0, 30)
    draw_class_weights(values, CONFUSION, NAMES, tmp_path / "f.png")
    lines = figures[-1].axes[0]
    low, high = lines.get_ylim()
    places = sorted(text.xy[1] for text in lines.texts)
    assert min(np.diff(places)) > 0.04 * (high - low)


LONG = (
    "Rhododendron ferrugineum subsp. alpinum with an exceptionally long descriptive suffix",
    "pneumonoultramicroscopicsilicovolcanoconiosis_and_more_without_any_space_at_all",
    "狸猫（たぬき）と柴犬の見分けにくい長い長い名前のクラスその一",
    "cat",
)


def drawn_boxes(figure, groups):
    """Where the texts of each group are in the picture."""
    canvas = FigureCanvasAgg(figure)
    with drawing():
        canvas.draw()
        renderer = canvas.get_renderer()
        return [[text.get_window_extent(renderer) for text in texts] for texts in groups]


@pytest.mark.parametrize("names", [LONG, [f"Fashion class {k}" for k in range(17)]])
def test_names_are_whole_and_inside_of_the_picture(tmp_path, figures, names):
    """However long they are, and in whatever script; no two of one side meet."""
    count = len(names)
    values = np.full((count, 30), 1.0) + 0.001 * np.arange(count)[:, None]
    draw_class_weights(values, np.eye(count).tolist(), names, tmp_path / "f.png")
    figure = figures[-1]
    lines, matrix = figure.axes
    groups = (lines.texts, matrix.get_yticklabels(), matrix.get_xticklabels())
    for texts in groups:
        shown = ["".join(text.get_text().split()) for text in texts]
        assert sorted(shown) == sorted("".join(name.split()) for name in names)
    found = drawn_boxes(figure, groups)
    for box in chain.from_iterable(found):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
    for boxes in found[:2]:
        for low, high in pairwise(sorted(boxes, key=lambda box: box.y0)):
            assert low.y1 <= high.y0 + 1


def test_every_cell_has_its_number(tmp_path, figures):
    """Also a zero, which is grey."""
    _, matrix = drawn(tmp_path, figures)
    assert len(matrix.texts) == len(NAMES) ** 2
    zeros = [text for text in matrix.texts if text.get_text() == "0"]
    assert len(zeros) == 5  # the first row: 10 right of 10
    assert {text.get_color() for text in zeros} == {"#8b95a1"}


def test_weights_of_single_rounds_are_called_no_mean(tmp_path, figures):
    for rounds, label in ((3, "class weight"), (40, "class weight (mean of 4 rounds)")):
        draw_class_weights(weights(rounds), CONFUSION, NAMES, tmp_path / "f.png")
        assert figures[-1].axes[0].get_ylabel() == label


def test_one_round_and_equal_weights_can_be_drawn(tmp_path):
    draw_class_weights(np.ones((6, 1)), CONFUSION, NAMES, tmp_path / "f.png")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(InputError, match="No class 'cow'"):
        draw_class_weights(weights(), CONFUSION, NAMES, tmp_path / "f.png", emphasised=("cow",))
    many = MOST_CLASSES + 1
    with pytest.raises(InputError, match=f"room for {MOST_CLASSES} classes, and there are {many}"):
        draw_class_weights(
            np.ones((many, 9)), np.eye(many).tolist(), list("x" * many), tmp_path / "f.png"
        )
