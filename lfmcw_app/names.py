"""Names that command lines take, for `--help`, which imports no torch."""

from __future__ import annotations

__all__ = ["FOLDER", "PRESETS", "RANDOM"]

PRESETS = ("smoke", "small", "paper", "original")

FOLDER, RANDOM = "folder:", "random:"
"""What the name of a data set begins with: a folder of images, or noise in the shape of another."""
