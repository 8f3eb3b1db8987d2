"""The blocks of Python in the README and the docs, and how a test runs one."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks_of(text, language):
    """The blocks of a page in one language, those in tabs too, whose lines are indented there."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```$"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


BLOCKS = [
    (path.relative_to(ROOT), number, code)
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for number, code in enumerate(blocks_of(path.read_text("utf-8"), "python"))
]

PEERS = {
    "betty-ml": ("betty", "make betty"),
    "higher": ("higher", "pip install higher"),
    "jaxopt": ("jaxopt", "pip install jax jaxopt"),
    "onnxruntime": ("onnxruntime", "pip install '.[export]'"),
    "peft": ("peft", "pip install transformers peft"),
    "torchopt": ("torchopt", "pip install torchopt"),
}
"""Package → the module that it installs, and what installs it."""


def require(package):
    """The module of a package that a block needs, or a skipped test."""
    module, how = PEERS[package]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{package} is not installed ({how}): {error}")


def run(code, name):
    """Runs a block as a module of its own (dataclasses look theirs up); returns its names."""
    module = types.ModuleType("block")
    sys.modules["block"] = module
    try:
        exec(compile(code, name, "exec"), module.__dict__)
    finally:
        del sys.modules["block"]
    return module.__dict__
