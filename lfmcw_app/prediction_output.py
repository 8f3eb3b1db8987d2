"""Predictions as tables for people, as JSON and CSV for programs, and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lfmcw_app.classifier import Preprocess
from lfmcw_app.prediction import Prediction, Predictions
from lfmcw_app.printing import print_table, printable, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["as_csv", "as_data", "describe_trained_on", "draw", "print_predictions"]

MOST_DRAWN, COLUMNS = 60, 3
"""Largest number of images in a picture, and in a row."""

WIDEST_NAME = 40
"""Letters of a line in the picture, which has room for the name and its probability."""


def print_predictions(predictions: Predictions, count: int, console: Console) -> None:
    """Prints the most likely classes of each image, and the errors if classes are known.

    Images that were taken for another class come first, the surest mistakes before the others, and
    are marked.

    Args:
        predictions: of the images.
        count: classes per image.
        console: where they are printed.
    """
    names, known = predictions.class_names, predictions.scores()
    table = Table(show_edge=False)
    if known:
        table.add_column("")
    table.add_column("image")
    if known:
        table.add_column("class")
    for rank in range(1, min(count, len(names)) + 1):
        table.add_column("prediction" if rank == 1 else f"{rank}.")
    for prediction in sorted(predictions.done, key=_mistakes_first):
        label = prediction.image.label
        row = [_cell(_short_path(prediction.image.path))]
        best = prediction.top(count)
        if known:
            style = "red" if prediction.is_wrong else ""
            row.insert(0, _cell("wrong" if prediction.is_wrong else "", style))
            row.append(_cell("" if label is None else names[label], style))
        row += [_cell(f"{names[label]} {100 * share:.1f}%") for label, share in best]
        table.add_row(*row)
    if predictions.done:
        print_table(console, table)
    if known:
        _print_scores(predictions, console)


def _mistakes_first(prediction: Prediction) -> tuple[bool, float]:
    """A key: mistakes come first, those of the highest probability before the others."""
    wrong = prediction.is_wrong
    return not wrong, -prediction.top(1)[0][1] if wrong else 0.0


def _short_path(path: Path) -> str:
    """The path from the working directory, if the file is in it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _cell(text: str, style: str = "") -> Text:
    """The text of a cell: names of files and classes may hold anything."""
    return Text(printable(text), style=style)


def _print_scores(predictions: Predictions, console: Console) -> None:
    scores = predictions.scores()
    table = Table(show_edge=False)
    for column in ("class", "images", "wrong", "error"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for score in scores:
        table.add_row(
            _cell(predictions.class_names[score.label]),
            f"{score.images:,}",
            f"{score.wrong:,}",
            f"{score.error_percent:.2f}%",
        )
    say(console, "")
    print_table(console, table)
    error, images = _error(predictions)
    say(console, f"error {error:.2f}% on {images:,} images in folders of known classes")


def _error(predictions: Predictions) -> tuple[float, int]:
    """The error in percent, and the number of images of known classes, of which there are some."""
    scores = predictions.scores()
    images, wrong = sum(s.images for s in scores), sum(s.wrong for s in scores)
    return 100.0 * wrong / images, images


def describe_trained_on(predictions: Predictions, unknown: str) -> str:
    """Says how many images the network was trained on, which makes the error that of no test.

    Args:
        predictions: of the images.
        unknown: why it cannot be told; "" if it can.
    """
    total, trained, known = len(predictions.done), predictions.trained_on, predictions.scores()
    if not trained:
        if not known:
            return ""
        doubt = f"Whether the network was trained on these images is unknown. {unknown}"
        return doubt if unknown else f"The network was trained on none of these {total:,} images."
    of = "the only image" if total == 1 else f"{trained:,} of these {total:,} images"
    said = f"The network was trained on {of}"
    if not known:
        return f"{said}, and is more certain there than on new ones."
    said += ", so this error says little about new ones."
    held_out = predictions.held_out()
    if not held_out.scores():
        return said
    error, images = _error(held_out)
    return f"{said} On the {images:,} others it is {error:.2f}%; --held-out predicts only these."


def as_data(predictions: Predictions, count: int) -> dict[str, Any]:
    """Predictions as plain data.

    `images` has an entry per image, in their order: path, class (null where unknown), trained_on
    (null where unknown) and the `count` likeliest classes; `failed` the images that could not be
    read, with the reasons; `error` what `print_predictions` prints of it, null where no class is
    known.
    """
    names, scores = predictions.class_names, predictions.scores()
    images = [
        {
            "path": str(prediction.image.path),
            "class": _name(names, prediction.image.label),
            "trained_on": prediction.image.trained_on,
            "top": [
                {"class": names[label], "probability": share}
                for label, share in prediction.top(count)
            ],
        }
        for prediction in predictions.done
    ]
    error = None
    if scores:
        percent, total = _error(predictions)
        error = {
            "images": total,
            "error_percent": percent,
            "classes": {
                names[score.label]: {
                    "images": score.images,
                    "wrong": score.wrong,
                    "error_percent": score.error_percent,
                }
                for score in scores
            },
        }
    failed = [{"path": str(path), "reason": why} for path, why in predictions.failed.items()]
    return {"class_names": list(names), "images": images, "failed": failed, "error": error}


def as_csv(predictions: Predictions, count: int) -> str:
    """Predictions as CSV: a line per image with path, class, `count` pairs of class and share.

    The last column, trained_on, is true, false, or empty where it is unknown.

    Images that could not be read have a line with only their path.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, min(count, len(predictions.class_names)) + 1)
    header = ["path", "class"]
    for rank in ranks:
        header += [f"class_{rank}", f"probability_{rank}"]
    header.append("trained_on")
    writer.writerow(header)
    writer.writerows(_csv_rows(predictions, count))
    writer.writerows([str(path)] + [""] * (len(header) - 1) for path in predictions.failed)
    return text.getvalue()


def _csv_rows(predictions: Predictions, count: int) -> Iterator[list[str]]:
    names = predictions.class_names
    for prediction in predictions.done:
        row = [str(prediction.image.path), _name(names, prediction.image.label) or ""]
        for label, share in prediction.top(count):
            row += [names[label], repr(share)]
        trained_on = prediction.image.trained_on
        yield [*row, "" if trained_on is None else str(trained_on).lower()]


def _name(names: tuple[str, ...], label: int | None) -> str | None:
    return None if label is None else names[label]


# ------------------------------ picture


def draw(predictions: Predictions, preprocess: Preprocess, count: int, path: Path) -> None:
    """Draws the images as the network sees them, each with its most likely classes as bars.

    Args:
        predictions: of the images; the first `MOST_DRAWN` are drawn.
        preprocess: decodes the files.
        count: classes per image.
        path: of the picture, a PNG file.
    """
    # Slow to import, and not needed without a picture.
    from matplotlib.figure import Figure

    from lfmcw_app.drawing import as_lines, drawing

    drawn = predictions.done[:MOST_DRAWN]
    rows = -(-len(drawn) // COLUMNS)
    names = [as_lines(name, WIDEST_NAME) for name in predictions.class_names]
    titles = [as_lines(_title(prediction, predictions), WIDEST_NAME) for prediction in drawn]
    bars = min(count, len(names)) * max(name.count("\n") + 1 for name in names)
    most = max([title.count("\n") + 1 for title in titles], default=1)
    height = 0.6 + 0.15 * most + 0.2 * bars
    with drawing():
        figure = Figure(figsize=(4.2 * COLUMNS, height * rows), layout="constrained")
        axes = figure.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 2] * COLUMNS)
        for ax in axes.flat:
            ax.axis("off")
        for index, prediction in enumerate(drawn):
            row, column = divmod(index, COLUMNS)
            left, right = axes[row, 2 * column], axes[row, 2 * column + 1]
            pixels = preprocess.pixels(prediction.image.path).movedim(0, -1).numpy()
            left.imshow(_colours(pixels), interpolation="nearest")
            _draw_bars(right, prediction, names, count)
            right.set_title(titles[index], fontsize=8, loc="left")
        figure.savefig(path, dpi=110, format="png")


def _colours(pixels: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")


def _title(prediction: Prediction, predictions: Predictions) -> str:
    name, label = prediction.image.path.name, prediction.image.label
    return name if label is None else f"{name} ({predictions.class_names[label]})"


def _draw_bars(ax: Axes, prediction: Prediction, names: Sequence[str], count: int) -> None:
    """Bars of the most likely classes; the first one is green if it is known to be right."""
    best = prediction.top(count)
    label = prediction.image.label
    colours = ["tab:blue"] * len(best)
    if label is not None:
        colours[0] = "tab:green" if best[0][0] == label else "tab:red"
    places = range(len(best))
    ax.axis("on")
    ax.barh(places, [share for _, share in best], color=colours, alpha=0.5)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    for place, (of_class, share) in zip(places, best, strict=True):
        text = f" {names[of_class]} {100 * share:.1f}%"
        ax.text(0.0, place, text, va="center", fontsize=8)
