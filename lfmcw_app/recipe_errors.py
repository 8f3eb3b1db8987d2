"""What is wrong with a recipe, in words: which key, what it takes, what it got, what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lfmcw_app.errors import shown
from lfmcw_app.plain_yaml import parse_yaml

__all__ = ["explain"]

LIKE, ALIKE = 0.6, 0.75
"""Least similarity of a key's last part to be meant: in the section that was given, elsewhere."""

LONGEST = 200
"""Letters of a key that is compared with all others, which takes a time that grows with it."""

SOME = 8
"""Keys beside a mistyped one that are listed after a suggestion."""

TAKES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list, as [a, b]",
    "list_type": "a list, as [a, b]",
    "dict_type": "a section of keys and values, as {key: value}",
    "model_type": "a section of keys and values, as {key: value}",
}
"""Pydantic's name of an error → what the key takes."""

LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong, as a sentence or several.

    Args:
        error: of pydantic.
        model: what was validated, whose fields are the keys.
    """
    first = error.errors()[0]
    path, value, kind = first["loc"], first["input"], first["type"]
    if kind == "extra_forbidden":
        return _unknown(path, value, model)
    key = f"Configuration key {_dotted(path)!r}"
    if kind == "value_error":
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
        is_said = isinstance(value, Mapping | BaseModel) or shown(value).strip("'") in said
        return f"{key}: {said}{'' if is_said else f'; got {_shown(value)}'}."
    if kind in ("missing", "too_long"):
        return _of_wrong_length(error)
    if kind == "model_type" and not path:
        return f"A recipe is a mapping of keys to values, got {_shown(value)}."
    if kind == "model_type":
        keys = _keys_at(model, path)
        return (
            f"{key} is a section of keys, got {_shown(value)}. Set one of them, as --set "
            f"{_dotted((*path, keys[0]))}=VALUE: {', '.join(keys)}."
        )
    return f"{key} must be {_takes(first)}, got {_shown(value)}.{_advice(first)}"


def _takes(error: Any) -> str:
    """What a key takes, after "must be"."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in TAKES:
        return TAKES[kind]
    for name, words in LIMITS.items():
        if name in context:
            return f"{words} {context[name]:,}".removesuffix(".0")
    return str(context.get("expected", error["msg"].removeprefix("Input should be ")))


def _of_wrong_length(error: ValidationError) -> str:
    """Message on a list of a wrong length, or a section without a key that it needs."""
    first, missing = error.errors()[0], [one["loc"] for one in error.errors()]
    value, path = first["input"], first["loc"]
    if first["type"] == "too_long":
        needed = first["ctx"]["max_length"]
    elif isinstance(path[-1], int):
        path = path[:-1]
        needed = len(value) + sum(place[:-1] == path for place in missing)
    else:
        return f"Configuration key {_dotted(path[:-1])!r} lacks {path[-1]!r}, got {shown(value)}."
    return f"Configuration key {_dotted(path)!r} takes {needed} values, got {shown(value)}."


def _shown(value: Any) -> str:
    """A value as it is written in YAML."""
    if value is None:
        return "no value (null)"
    return str(value).lower() if isinstance(value, bool) else shown(value)


def _advice(error: Any) -> str:
    """The sentence after a wrong value, if what was meant can be guessed."""
    value, kind = error["input"], error["type"]
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), choices, n=1)
        return f" Did you mean {near[0]!r}?" if near else ""
    if not isinstance(value, str) or kind not in ("int_type", "float_type", "bool_type"):
        return ""
    if value == "None":
        return " To give no value, write null."
    try:
        meant = parse_yaml(value)
    except ValueError:
        return ""
    return f" Write {value.strip()} without quotes." if isinstance(meant, int | float) else ""


# ------------------------------ keys


def _unknown(path: tuple[int | str, ...], value: Any, model: type[BaseModel]) -> str:
    """Message on an unknown key: the whole keys that could be meant, and those beside it."""
    given = [part for part in path if isinstance(part, str)]
    above, beside = tuple(path[:-1]), _keys_at(model, path[:-1])
    if isinstance(value, Mapping) and value:  # search.lambda, for serch.lambda
        given = [*given, str(next(iter(value)))]
    near = " or ".join(map(repr, _near(given, model)))
    hint = ""
    if near:  # the other keys are seldom meant
        hint = f" Did you mean {near}?"
        beside = [*beside[:SOME], "…"] if len(beside) > SOME else beside
    of = f"The keys of {_dotted(above)} are" if above else "A recipe has"
    return f"Unknown configuration key {_dotted(path)!r}.{hint} {of} {', '.join(beside)}."


def _near(given: list[str], model: type[BaseModel]) -> list[str]:
    """The keys that a mistyped one could mean, with their sections; several if they tie."""
    if sum(map(len, given)) > LONGEST:
        return []
    section, name = ".".join(given[:-1]).lower(), given[-1].lower().replace("-", "_")
    scores: dict[str, float] = {}
    for key in _all_keys(model):
        of, _, last = key.rpartition(".")
        like = difflib.SequenceMatcher(None, name, last).ratio()
        if like >= (LIKE if of == section else ALIKE):
            scores[key] = like + difflib.SequenceMatcher(None, section, of).ratio() / 2
    best = max(scores.values(), default=0.0)
    return [key for key, score in scores.items() if score == best][:3]


def _all_keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """All keys with their sections: search, search.generator, search.generator.lr, ..."""
    for name, field in model.model_fields.items():
        key = f"{above}{field.alias or name}"
        yield key
        if (section := _section(field.annotation)) is not None:
            yield from _all_keys(section, f"{key}.")


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a path, as a recipe spells them; none if it is no section."""
    section: type[BaseModel] | None = model
    for part in path:
        if section is None or isinstance(part, int):
            continue
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        section = _section(fields[part].annotation) if part in fields else None
    if section is None:
        return []
    return sorted(field.alias or name for name, field in section.model_fields.items())


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone or in a list; None if it holds values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def _dotted(path: tuple[int | str, ...]) -> str:
    """A key as --set takes it; an entry of a list by its number in brackets, from 0."""
    words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return words.removeprefix(".") or "recipe"
