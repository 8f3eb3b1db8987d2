"""DARTS's notation of a genotype, as published programs print it: read strictly, and written.

    Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ...], normal_concat=range(2, 6),
             reduce=[('max_pool_3x3', 0), ...], reduce_concat=range(2, 6))

The text is parsed as Python and never executed. Two edges follow one another for each node, and
`concat` names the states that the cell returns.

Reference: Liu et al., DARTS (2019), the program's genotypes.py.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lfmcw_app.errors import InputError, shown

__all__ = ["is_notation", "read_notation", "write_notation"]

EDGES_PER_NODE = 2
FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
LONGEST = 100_000
"""Largest number of characters that are parsed; a genotype of ten nodes has about a thousand."""

CALL = re.compile(r"\bGenotype\s*\(")
LOG_PREFIX = re.compile(
    r"""\A\s*(?:\[?\d|[A-Z]+:)[^\n'"(#=]*?[\s|:\]](?=(?:\w+\s*=\s*)?Genotype\s*\()"""
)
"""The beginning of a line of a log: a time or a level, as in `05/28 03:22:11 PM genotype = …`."""

INTEGERS = re.compile(r"(?:np|numpy)\.u?int(?:8|16|32|64|p)?")
"""NumPy's integers as its version 2 prints them: np.int64(1)."""


def is_notation(text: str) -> bool:
    """Whether a text looks like a genotype in this notation."""
    return CALL.search(text) is not None


def read_notation(text: str) -> dict[str, list[list[Any]]]:
    """Reads one genotype: kind of cell → its edges as [primitive, source].

    `NAME =` may come before `Genotype`, and the beginning of a line of a log before that.
    Primitives and sources are returned unchecked; `Genotype` checks them.

    Raises:
        InputError: if the text is not one genotype in this notation, or a cell does not return all
            its nodes.
    """
    call = _call(text)
    if call.args:
        raise InputError(
            f"A genotype in DARTS's notation names its fields: Genotype({'=…, '.join(FIELDS)}=…)."
        )
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if set(given) != set(FIELDS) or len(call.keywords) != len(FIELDS):
        names = [keyword.arg or "**" for keyword in call.keywords]
        raise InputError(
            f"A genotype in DARTS's notation has the fields {', '.join(FIELDS)}, each once, got "
            f"{shown(names)}."
        )
    values = {name: _value(node) for name, node in given.items()}
    cells = {}
    for kind, field in (("normal", "normal"), ("reduction", "reduce")):
        cells[kind] = _edges(field, values[field])
        _check_concat(field, values[f"{field}_concat"], len(cells[kind]) // EDGES_PER_NODE)
    return cells


def write_notation(cells: Mapping[str, Sequence[tuple[str, int]]]) -> str:
    """Writes a genotype on one line, character by character as DARTS's program prints it.

    Args:
        cells: kind of cell → its edges.
    """
    parts = []
    for kind, field in (("normal", "normal"), ("reduction", "reduce")):
        end = 2 + len(cells[kind]) // EDGES_PER_NODE
        parts.append(f"{field}={list(cells[kind])!r}, {field}_concat=range(2, {end})")
    return f"Genotype({', '.join(parts)})"


# ------------------------------ reading


def _call(text: str) -> ast.Call:
    """The one call of `Genotype` that a text consists of."""
    if len(text) > LONGEST:
        raise InputError(
            f"A genotype has at most {LONGEST:,} characters, but this text has {len(text):,}. "
            "Keep only the genotype itself."
        )
    found = list(CALL.finditer(text))
    if len(found) > 1:
        lines = [text.count("\n", 0, match.start()) + 1 for match in found]
        raise InputError(
            f"There are {len(found)} genotypes in this text (lines {shown(lines)}). Keep the one "
            "that you mean: copy it into its own file, or give it as the argument."
        )
    # Parsing warns of legal but odd text, such as '\d', which is harmless here.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(LOG_PREFIX.sub("", text).strip()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(f"This is not a genotype in DARTS's notation ({_why(error)}).") from None

    statement = body[0] if len(body) == 1 else None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        named = isinstance(statement.targets[0], ast.Name)
        call: ast.expr | None = statement.value if named else None
    else:
        call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or _name(call.func) != "Genotype":
        raise InputError(
            "A genotype in DARTS's notation is only Genotype(normal=[…], …), with at most NAME = "
            f"before it, got {shown(text.strip())}."
        )
    return call


def _why(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return shown(error.msg) + (f", line {error.lineno}" if error.lineno else "")
    return "it is nested too deeply, or has a number with too many digits"


def _value(node: ast.expr, depth: int = 4) -> Any:
    """The value of a literal, a list, a tuple, a range, list(range) or a NumPy integer.

    Args:
        node: of the parsed text.
        depth: levels of brackets that may follow: a list of pairs, whose members may be calls.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, str):
        return node.value
    if depth and isinstance(node, (ast.List, ast.Tuple)):
        return [_value(member, depth - 1) for member in node.elts]
    if depth and isinstance(node, ast.Call) and not node.keywords:
        name, args = _name(node.func), [_value(arg, depth - 1) for arg in node.args]
        if name == "list" and len(args) == 1 and isinstance(args[0], (range, list)):
            return args[0]
        whole = all(type(arg) is int for arg in args)
        if name == "range" and whole and len(args) in (1, 2):
            return range(*args)
        if INTEGERS.fullmatch(name) and whole and len(args) == 1:
            return args[0]
    raise InputError(
        "A genotype in DARTS's notation consists of names in quotes, whole numbers, lists, pairs "
        f"and range(), got {_source(node)}."
    )


def _name(function: ast.expr) -> str:
    """What is called: `range`, or `np.int64`; nothing else has a name here."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def _source(node: ast.expr) -> str:
    """A piece of the text, for a message."""
    try:
        return shown(ast.unparse(node))
    except (RecursionError, ValueError):  # too deep, or a number with too many digits
        return "something too long to print"


def _edges(field: str, value: Any) -> list[list[Any]]:
    if not isinstance(value, list) or not value or len(value) % EDGES_PER_NODE:
        raise InputError(
            f"The genotype's {field!r} is a list with {EDGES_PER_NODE} pairs (primitive, state) "
            f"per node, got {shown(value)}."
        )
    for edge in value:
        if not isinstance(edge, list) or len(edge) != 2:
            raise InputError(
                f"An edge of the genotype's {field!r} is a pair (primitive, state), got "
                f"{shown(edge)}."
            )
    return value


def _check_concat(field: str, value: Any, nodes: int) -> None:
    """Refuses a cell that does not return all its nodes."""
    expected = range(2, 2 + nodes)
    # A range is compared by its ends: it may be too long to be listed.
    if isinstance(value, list) and all(type(state) is int for state in value):
        matches = sorted(value) == list(expected)
    else:
        matches = isinstance(value, range) and value == expected
    if not matches:
        raise InputError(
            f"The genotype's {field}_concat is {shown(value)}. Cells here return all their nodes, "
            f"{expected} for {nodes}. A published cell that returns fewer (AmoebaNet's, for "
            "example) is a different network, and cannot be built."
        )
