"""How matplotlib draws here: text as written, in whichever fonts have its letters.

Names of classes and folders are text from outside. Matplotlib reads `$` as the start of a formula,
warns of each letter that its font lacks, and lets a long label crowd out the picture.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib import font_manager, rc_context

__all__ = ["as_label", "drawing"]

FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP",
    "Noto Sans KR", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "Malgun Gothic", "Yu Gothic", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Noto Sans Arabic", "Noto Sans Hebrew",
    "Noto Sans Devanagari", "Noto Sans Thai", "FreeSans", "Arial Unicode MS",
)  # fmt: skip
"""Fonts for letters that matplotlib's own font lacks; the installed ones are used."""


@contextmanager
def drawing() -> Iterator[None]:
    """Draws and saves figures, in its body or in the function that it decorates.

    Letters that no installed font has are drawn as boxes, without a warning.
    """
    with (
        rc_context({"text.parse_math": False, "text.usetex": False, "font.family": _fonts()}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def as_label(text: str, longest: int = 40) -> str:
    """A name as one line of a picture, shortened if it is longer than `longest` letters."""
    shown = "".join(map(_visible, text))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


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
