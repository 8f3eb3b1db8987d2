"""Recipes from presets, files and single settings.

A mistyped key is answered with the nearest valid name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import resources
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from lfmcw_app.bounded_files import text_of
from lfmcw_app.errors import InputError, shown
from lfmcw_app.names import PRESETS
from lfmcw_app.near_paths import near_paths
from lfmcw_app.plain_yaml import LONGEST_TEXT, parse_yaml
from lfmcw_app.recipe import UNASKED, Recipe, Section
from lfmcw_app.recipe_errors import explain
from lfmcw_app.spaces import SPACES
from mlo.errors import nearest

__all__ = [
    "changed_recipe",
    "contradiction",
    "is_imagenet",
    "key_value",
    "load_recipe",
    "merged_settings",
    "parsed_settings",
    "preset_recipe",
    "read_config",
    "trial",
    "validate_recipe",
    "with_options",
]

ADAPTED: dict[str, tuple[str, Any]] = {
    "evaluation.epochs": ("evaluation.min_steps", 0),
    "evaluation.batch_size": ("evaluation.fits_batch", False),
    "search.batch_size": ("search.fits_batch", False),
    "search.generator.init.run": ("search.generator.warmup_rounds", 0),
}
"""Setting that presets adapt to the data → the key that enables this, and its value if the setting
is given.
"""

OPTIONS = {
    "dataset": "the argument DATASET",
    "preset": "--preset",
    "seed": "--seed",
    "detect_collapse": "--detect-collapse",
    "search.space": "--space",
    "search.order": "--order",
    "search.method": "--method",
    "search.init.run": "--init",
    "evaluation.init.run": "--init",
    "lookup.file": "--lookup",
}
"""Setting → the option of a command that gives it too."""

OVERLAYS = {"original": ("paper", "original")}
"""Presets that build on another one; the others are complete."""


def load_recipe(
    preset: str,
    *,
    space: str | None = None,
    config: Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """Resolves a recipe: the preset's files, a configuration file, then single settings.

    A preset has a file, and may have one for a space and one for ImageNet, which override it in
    this order.

    Args:
        preset: one of `PRESETS`.
        space: a name in `lfmcw_app.spaces.SPACES`; by default that of the settings or the file, or
            else darts.
        config: any part of a recipe, or a YAML file with it.
        overrides: dotted key → value; see `merged_settings` for sections.

    Raises:
        InputError: for an unknown preset or key, or a value of the wrong type or range.
    """
    over = read_config(config) if isinstance(config, Path) else config or {}
    given = merged_settings(over, overrides or {})
    space = space or given.get("search.space") or "darts"
    return _over(_preset_tree(preset, space, given.get("dataset")), given)


def _preset_tree(preset: str, space: Any, dataset: Any) -> dict[str, Any]:
    """What a preset's files give for a space and a data set.

    Raises:
        InputError: for an unknown preset or space.
    """
    if preset not in PRESETS:
        raise InputError(f"Unknown preset {shown(preset)}. {nearest(str(preset), PRESETS)}")
    if not isinstance(space, str) or space not in SPACES:
        raise InputError(
            f"Unknown search space {shown(space)}. {nearest(str(space), list(SPACES))}"
        )

    # From general to special; later ones override earlier ones.
    tree: dict[str, Any] = {}
    parts = ["", f".{space}"]
    if isinstance(dataset, str) and is_imagenet(dataset):
        parts.append(".imagenet")
    for part in parts:
        for name in OVERLAYS.get(preset, (preset,)):
            file = resources.files("lfmcw_app").joinpath("recipes", f"{name}{part}.yaml")
            if file.is_file():
                tree = _assigned(tree, _read_yaml(file.read_text("utf-8"), f"{name}{part}"))
    return _assigned(tree, {"search.space": space})


def preset_recipe(recipe: Recipe) -> Recipe | None:
    """What a recipe's preset gives for its data set and space; None if it has none.

    It is made to compare with. No package is asked for the preset's operations and generator, which
    the recipe may not use.
    """
    if recipe.preset not in PRESETS:
        return None
    return _preset_recipe(recipe.preset, recipe.search.space, recipe.dataset)


@lru_cache
def _preset_recipe(preset: str, space: str, dataset: str) -> Recipe:
    tree = {**_preset_tree(preset, space, dataset), "dataset": dataset}
    return Recipe.model_validate(tree, context=UNASKED)


def changed_recipe(
    recipe: Recipe, *, config: Path | None = None, overrides: Mapping[str, Any]
) -> Recipe:
    """The recipe overridden by a configuration file and single settings, as in `load_recipe`.

    Raises:
        InputError: for an unknown key, or a value of the wrong type or range.
    """
    tree = recipe.model_dump(mode="json", by_alias=True)
    return _over(tree, merged_settings({} if config is None else read_config(config), overrides))


def _over(tree: dict[str, Any], given: Mapping[str, Any]) -> Recipe:
    """A tree with settings of `merged_settings`, as a recipe."""
    off = {}
    for key, (adapter, value) in ADAPTED.items():
        no_run = key.endswith(".run") and given.get(key) is None
        if key in given and adapter not in given and not no_run:
            off[adapter] = value
    return validate_recipe(_assigned(tree, {**given, **off}))


@lru_cache
def _sections(model: type[BaseModel] = Recipe, above: str = "") -> frozenset[str]:
    """The dotted names of all sections of a recipe: search, search.generator, ..."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {f"{above}{name}"} | _sections(field.annotation, f"{above}{name}.")
    return frozenset(found)


def merged_settings(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of several mappings; later ones override earlier ones.

    A section that is given as a mapping, in a file or as one setting, sets the keys that it has and
    leaves the others of the section as they are. Mappings that are values (an engine with its
    options, `class_shares`, `primitives`) replace what was there as a whole.

    Raises:
        InputError: if one mapping gives a key two values, as `search.steps` and within `search`.
    """
    found: dict[str, Any] = {}
    for part in parts:
        of_part: dict[str, Any] = {}
        for key, value in part.items():
            inner = {key: value}
            if key in _sections() and isinstance(value, Mapping):
                inner = merged_settings({f"{key}.{name}": entry for name, entry in value.items()})
            for name, entry in inner.items():
                if name in of_part and of_part[name] != entry:
                    raise InputError(
                        f"{name} is {shown(of_part[name])} in one place and {shown(entry)} in "
                        "another, within its section and by its dotted name. Only one of the two "
                        "can count, so drop one."
                    )
                of_part[name] = entry
        found |= of_part
    return found


def with_options(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of single settings and of options, which must not contradict them.

    Args:
        settings: dotted key → value.
        options: key of `OPTIONS` → the option's value; None if it was not given.

    Raises:
        InputError: naming an option and a setting that differ.
    """
    given = merged_settings(settings)
    chosen = {key: value for key, value in options.items() if value is not None}
    for key, value in chosen.items():
        if key in given and given[key] != value:
            raise contradiction(OPTIONS[key], value, f"--set {key}", given[key])
    return {**chosen, **given}


def contradiction(place: str, value: Any, other: str, differing: Any) -> InputError:
    """The error on two places that give different values for one setting."""
    return InputError(
        f"{place} is {shown(value)}, and {other} is {shown(differing)}. They contradict each "
        "other; drop one."
    )


def parsed_settings(assign: Iterable[str]) -> dict[str, Any]:
    """Dotted key → value of texts key=value, as --set takes them; the last one of a key counts.

    Raises:
        InputError: naming a text that is no setting.
    """
    example = "search.channels=8"
    return merged_settings(*(dict([key_value(text, "--set", example)]) for text in assign))


def read_config(path: Path) -> dict[str, Any]:
    """Reads a YAML file with any part of a recipe.

    Raises:
        InputError: if it cannot be read, or holds something else.
    """
    try:
        text = text_of(path, LONGEST_TEXT, pipes=True)
    except FileNotFoundError:
        raise InputError(
            f"--config: there is no file {path}.{near_paths(path, os.path.isfile)}"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The configuration file {path} cannot be read ({why}).") from None
    return _read_yaml(text, str(path))


def validate_recipe(tree: Any) -> Recipe:
    """Makes a recipe from plain data.

    Raises:
        InputError: naming the first key that is wrong.
    """
    try:
        return Recipe.model_validate(_plain(tree, ()))
    except ValidationError as error:
        raise InputError(explain(error, Recipe)) from None


def _as_text() -> str:
    """What to do about the name of a file that is no text."""
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        return "rename that"
    return f"set PYTHONUTF8=1 (Python reads names of files as {encoding} here), or rename that"


def _plain(value: Any, path: tuple[str, ...]) -> Any:
    """The value as text, numbers, truth values, lists and mappings alone, as YAML has them.

    Numbers of NumPy and paths are turned into these. Refused is what no file of text can hold: half
    a character, or the name of a file with one; or another object of a script, which would be
    another one when the recipe is read back.

    Raises:
        InputError: naming the key.
    """
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        return {_plain(key, path): _plain(entry, (*path, str(key))) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, (*path, str(place))) for place, entry in enumerate(value)]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"Configuration key {'.'.join(path)!r}: {shown(value)} is no text in UTF-8, which "
                f"a recipe must be. If it is the name of a file or a folder, {_as_text()}."
            ) from None
        return str(value)
    if isinstance(value, bool | None):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise InputError(
        f"Configuration key {'.'.join(path)!r}: {shown(value)} is a {type(value).__name__}. A "
        "recipe holds text, numbers, true, false, null, and lists and mappings of these."
    )


def trial(recipe: Recipe, steps: int) -> Recipe:
    """Returns the recipe with `steps` rounds of each phase and no warm-ups, to try a whole run."""
    # A warm-up longer than the trial would be refused.
    tree = recipe.model_dump(mode="json", by_alias=True)
    for phase in (tree["search"], tree["evaluation"]):
        phase["epochs"], phase["steps"] = None, steps
        phase["weights"]["warmup_epochs"] = 0
    tree["search"]["architecture"]["warmup_epochs"] = 0
    generator = tree["search"]["generator"]
    generator["warmup_rounds"] = min(generator["warmup_rounds"], steps)
    tree["trial"] = True
    return validate_recipe(tree)


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{source} cannot be read: {error}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{source} holds a {type(tree).__name__}, but a recipe is a mapping of keys to values."
        )
    return tree


def key_value(setting: str, option: str, example: str) -> tuple[str, Any]:
    """Reads key=value, the value in YAML.

    Args:
        setting: what was given.
        option: the option that it was given to, for messages.
        example: a valid setting.

    Raises:
        InputError: naming the option.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{option} takes key=value, for example {example}, got {setting!r}.")
    try:
        return key.strip(), parse_yaml(text)
    except ValueError as error:
        raise InputError(f"The value in {option} {setting!r} cannot be read: {error}.") from None


def is_imagenet(dataset: str) -> bool:
    """Whether a data set is ImageNet or noise in its shape."""
    return dataset.removeprefix("random:") == "imagenet"


def _assigned(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree with other values of some keys, as `merged_settings` takes them.

    Raises:
        InputError: if a key is no text, or leads through a value that is no section.
    """
    result = dict(tree)
    for key, value in merged_settings(settings).items():
        if not isinstance(key, str):
            raise InputError(
                f"A key of a recipe is text, such as search.channels; got {shown(key)}."
            )
        *above, last = key.split(".")
        section = result
        for name in above:
            inner = section.get(name, {})
            if not isinstance(inner, dict):
                raise InputError(f"Configuration key {key!r}: {name!r} is a value, not a section.")
            section[name] = dict(inner)
            section = section[name]
        section[last] = value
    return result
