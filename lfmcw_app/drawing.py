"""How matplotlib draws here: text as written, in whichever fonts have its letters.

Names of classes and folders are text from outside. Matplotlib reads `$` as the start of a formula,
warns of each letter that its font lacks, and lets a long label crowd out the picture.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from matplotlib import font_manager, get_cachedir, rc_context

from lfmcw_app.errors import DataWarning, listed
from lfmcw_app.search_space.cell_cards import text_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["as_label", "as_lines", "drawing", "set_row_names"]

FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP",
    "Noto Sans KR", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "Malgun Gothic", "Yu Gothic", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Noto Sans Devanagari", "Noto Sans Thai", "FreeSans", "Arial Unicode MS",
)  # fmt: skip
"""Fonts for letters that matplotlib's own font lacks; the installed ones are used."""

MISSING = re.compile(r"Glyph (\d+) .*missing from")
"""What matplotlib warns of, with the letter's number."""

ROW, WIDEST_NAME = 0.6, 40
"""Height of a row of images in inches, and letters of a line beside it."""

_told: set[str] = set()
"""Letters that this process has warned of."""


@contextmanager
def drawing() -> Iterator[None]:
    """Draws and saves figures, in its body or in the function that it decorates.

    Letters that no installed font has are drawn as boxes; the first time there is a warning.
    """
    with (
        rc_context({"text.parse_math": False, "text.usetex": False, "font.family": _fonts()}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.filterwarnings("always", message=MISSING.pattern, category=UserWarning)
        yield
    lacking = set()
    for warning in caught:
        if found := MISSING.match(str(warning.message)):
            lacking.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    new = sorted(lacking - _told)
    _told.update(new)
    if new:
        warnings.warn(
            f"No installed font has the letters {listed(new, most=8)}. Pictures show boxes in "
            "their place. Install a font that has them (fonts-noto-cjk on Debian and Ubuntu for "
            "Chinese, Japanese and Korean). Then delete matplotlib's list of fonts, "
            f"{get_cachedir()}/fontlist-*.json.",
            DataWarning,
            stacklevel=3,
        )


def as_label(text: str, longest: int = 40) -> str:
    """A name as one line of a picture, shortened if it is longer than `longest` letters."""
    shown = "".join(map(_visible, text))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def set_row_names(ax: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Writes the whole name of a class beside each row of images, of `ROW` inches."""
    labels = [as_lines(name, WIDEST_NAME) for name in names]
    ax.set_yticks(places, labels=labels)
    most = max(label.count("\n") + 1 for label in labels)
    ax.tick_params(axis="y", labelsize=min(10.0, 72 * ROW / (1.3 * most)))  # lines are 1.3 high


def as_lines(name: str, widest: int) -> str:
    """A whole name as lines of at most `widest` letters, broken at spaces and _ where possible.

    Letters of Chinese, Japanese and Korean are as wide as two.
    """
    lines = [""]
    for part in re.findall(r".+?(?:[ _]|$)|.", as_label(name, longest=len(name))):
        if lines[-1] and text_units(lines[-1] + part.rstrip()) > widest:
            lines.append("")
        for letter in part:
            if text_units(lines[-1] + letter) > widest and letter != " ":
                lines.append("")
            lines[-1] += letter
    return "\n".join(line.rstrip() for line in lines)


@cache
def _fonts() -> list[str]:
    # A font that is not installed would cause a warning each time that text is drawn.
    installed = set(font_manager.fontManager.get_font_names())
    return ["DejaVu Sans", *(font for font in FALLBACK_FONTS if font in installed)]


def _visible(letter: str) -> str:
    """The letter; nothing for marks without a shape, and � for what no line of text can hold."""
    kind = unicodedata.category(letter)
    if kind == "Cf":  # of direction and width
        return ""
    return "�" if kind[0] == "C" or kind in ("Zl", "Zp") else letter
