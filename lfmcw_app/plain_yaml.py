"""YAML for recipes: plain data, and nothing that two readers read differently.

PyYAML reads YAML 1.1 and keeps the last of two equal keys. Here

1. a key that occurs twice in one mapping is refused, because the first section would be lost;
2. values that YAML 1.1 and YAML 1.2 read differently are refused: `010`, `0o17`, `1:30`, `yes`,
   `off`;
3. a number with an exponent and without a dot (`1e-3`, text in YAML 1.1) is a number;
4. a date is text, since no setting is a date;
5. what a few lines can blow up by anchors is refused, and so is what holds itself.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["dump_yaml", "parse_yaml"]

ERRORS = (
    yaml.YAMLError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
    RecursionError,
)  # fmt: skip
"""What PyYAML raises for text that is not YAML; an AttributeError, for instance, for a bad tag."""

MERGE = "tag:yaml.org,2002:merge"
TEXT = "tag:yaml.org,2002:str"

PATTERNS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    # 1_000_000 is a number in Python and in YAML 1.1, and looks like nothing else.
    "int": (r"[-+]?(?:0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:_[0-9]{3})+|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
}
"""YAML's type → the pattern of its unquoted values, and the characters that they begin with."""

AMBIGUOUS = {
    r"[-+]?0[0-9_]+": "an octal number to some readers of YAML, and a decimal number to others; "
    "drop the leading zeros",
    r"[-+]?0(?:o[0-7_]+|b[01_]+)": "a number to some readers of YAML, and text to others; write "
    "it in decimal digits",
    r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?": "a base-60 number to some readers of "
    "YAML, and text to others; write it in decimal digits, or in quotes if it is text",
    r"(?i:yes|no|on|off)": "true or false to some readers of YAML, and text to others; write "
    "true or false, or put it in quotes if it is text",
}
"""Values that readers of YAML read differently → the reason for refusing them."""


LONGEST_TEXT = 2**20
"""Characters; a recipe with all candidates of all edges of 64 nodes has half as many."""

MOST_VALUES = 200_000
"""Maximum number of values of a document; what an alias repeats counts each time."""


class _Refused(ValueError):
    """YAML that is valid but refused."""


class _Reader(yaml.SafeLoader):
    """Reads one document."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if node is None or node in self._sizes:
            return node
        if isinstance(event, yaml.AliasEvent):  # of a node that has not ended yet
            raise _Refused(f"{_line(event)}: *{event.anchor} stands within what it repeats")
        # Aliases of aliases double what is read with each line; a merge (<<) copies all of it.
        entries: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        size = 1 + sum(
            sum(self._sizes[part] for part in entry) if pairs else self._sizes[entry]
            for entry in entries
        )
        if size > MOST_VALUES:
            raise _Refused(f"{_line(event)}: with its aliases it holds over {MOST_VALUES:,} values")
        self._sizes[node] = size
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        event: yaml.ScalarEvent = self.peek_event()  # type: ignore[no-untyped-call]
        if event.implicit[0]:  # without quotes and without a tag
            for pattern, reason in AMBIGUOUS.items():
                if re.fullmatch(pattern, event.value):
                    raise _Refused(f"{_line(event)}: {event.value} is {reason}")
        return super().compose_scalar_node(anchor)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked here, not where the mapping is made. There a merge (<<) has already added the keys
        # of another mapping, which the mapping's own keys may override.
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if key.tag not in (TEXT, MERGE):
                raise _Refused(f"{_line(key)}: a key must be text, got {_shown(key)}")
            if key.value in first:
                raise _Refused(
                    f"{_line(key)}: the key {key.value!r} is already in the same section, in "
                    f"{_line(first[key.value])}; only one of the two can count, so drop or rename "
                    "one"
                )
            first[key.value] = key
        return node


class _Writer(yaml.SafeDumper):
    """Writes what `_Reader` reads back."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


for _name, (_pattern, _beginnings) in PATTERNS.items():
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_beginnings)
        )
# Text that would be refused without quotes is written in quotes, like text that looks like another
# type.
_Writer.add_implicit_resolver("!ambiguous", re.compile(rf"(?:{'|'.join(AMBIGUOUS)})\Z"), None)


def parse_yaml(text: str) -> Any:
    """Reads YAML as plain data.

    Raises:
        ValueError: if it is not YAML, or ambiguous (see above), with the number of the line.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"it has more than {LONGEST_TEXT:,} characters")
    reader = None
    try:
        reader = _Reader(text)  # looks at the characters already
        return reader.get_single_data()
    except _Refused:
        raise
    except ERRORS as error:
        words = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())[:500]
        raise ValueError(f"it is not valid YAML ({words})") from None
    finally:
        if reader is not None:
            reader.dispose()


def dump_yaml(data: Any) -> str:
    """Writes plain data as YAML that `parse_yaml` reads back, keys in their order."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False)


def _line(place: yaml.Node | yaml.Event) -> str:
    assert place.start_mark is not None
    return f"line {place.start_mark.line + 1}"


def _shown(node: yaml.Node) -> str:
    return str(node.value)[:80] if isinstance(node, yaml.ScalarNode) else "a list or a section"
