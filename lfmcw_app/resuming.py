"""Resuming a run with other settings: which ones may change, and the record of changes.

A run is a function of its recipe, unless settings that decide numbers changed in its middle. Each
change is a line of changes.jsonl: when it was made, from which round of which phase it holds, and
what changed. The recipe that the run began with is in environment.json. So all recipes that a run
ever had are known. A checkpoint must be of one of them, and an edit of config.yaml is a change like
any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from lfmcw_app.bounded_files import check_regular, lines_of, parse_json, read_object
from lfmcw_app.errors import InputError, shown
from lfmcw_app.names import FOLDER
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import validate_recipe
from lfmcw_app.run_files import CHANGES, ENVIRONMENT, RESULT
from lfmcw_app.stages import TRAINING, WARMUP, phases_of, search_stages
from mlo import MultilevelOptimizer

__all__ = [
    "CHANGEABLE",
    "Change",
    "known_recipes",
    "learning_rates",
    "leaves",
    "numbers_changed",
    "planned_changes",
    "read_changes",
    "set_learning_rates",
    "with_declared_rates",
]

MOST = 10_000
"""Changes of a run that are read."""

CHANGEABLE = {
    "on_nonfinite": True,
    "checkpoint_every": False,
    "checkpoint_keep_every": False,
    "detect_collapse": False,
    "dataset": False,  # only where a folder is, and its files are compared
    "data.groups": False,  # only where the file is: the groups are compared too
    "data.in_memory": True,
    "search.init.run": False,  # the digest of its weights is checked
    "search.generator.init.run": False,
    "evaluation.init.run": False,
    "lookup.file": False,  # the digest of the file is checked
    "search.gradient_terms_every": False,
    "search.checkpointing": False,
    "search.tf32": True,
    "search.deterministic": True,
    "search.epochs": True,
    "search.steps": True,
    "search.compile": True,
    "search.weights.lr": True,
    "search.weights.min_lr": True,
    "search.weights.grad_clip": True,
    "search.architecture.lr": True,
    "search.architecture.grad_clip": True,
    "search.generator.lr": True,
    "search.generator.warmed_lr": True,
    "search.generator.discriminator_lr": True,
    "search.generator.quality": False,
    "evaluation.tf32": True,
    "evaluation.deterministic": True,
    "evaluation.epochs": True,
    "evaluation.steps": True,
    "evaluation.min_steps": True,
    "evaluation.weights.lr": True,
    "evaluation.weights.min_lr": True,
    "evaluation.weights.grad_clip": True,
}
"""Key that may change during a run → whether numbers of the run can depend on it."""

RATES = ("lr", "initial_lr")
"""Settings of an optimizer that hold its learning rate."""

LENGTHS = {
    "search": ("search.epochs", "search.steps"),
    "evaluation": ("evaluation.epochs", "evaluation.steps", "evaluation.min_steps"),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that changes.

    Attributes:
        key: dotted.
        old: its value before, as plain data. new: its value afterwards.
    """

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {shown(self.old)} → {shown(self.new)}"


# ------------------------------ what changes


def planned_changes(
    path: Path, current: Recipe, wanted: Recipe, *, searches: bool
) -> tuple[Change, ...]:
    """The changes if the run in a folder is resumed by another recipe.

    Args:
        path: the run folder.
        current: the recipe in its config.yaml.
        wanted: the recipe.
        searches: whether the folder holds a search, not the evaluation of a given genotype.

    Raises:
        InputError: naming a setting that may not change, or whose change would have no effect.
    """
    changes = _differences(_recorded(path, current)[-1], wanted)
    for change in changes:
        if change.key not in CHANGEABLE:
            raise InputError(
                f"The run in {path} has another recipe: {change}. This cannot change during a "
                "run. Resume without it, or start a new run. Settings that can: "
                f"{', '.join(CHANGEABLE)}."
            )
        _check_in_time(path, change, wanted, searches=searches)
    of_numbers = [change for change in changes if CHANGEABLE[change.key]]
    if (path / RESULT).exists():
        if not of_numbers:
            return ()
        if not any(change.key in LENGTHS["evaluation"] for change in changes):
            longer = (
                " To train the derived network longer, raise evaluation.epochs or evaluation.steps."
            )
            raise InputError(
                f"The run in {path} is complete, so {of_numbers[0]} would change nothing."
                f"{longer if wanted.trains else ''}"
            )
    return changes


def _check_in_time(path: Path, change: Change, wanted: Recipe, *, searches: bool) -> None:
    """Raises an InputError for a change that comes too late."""
    if change.key == "dataset":
        if not all(str(name).startswith(FOLDER) for name in (change.old, change.new)):
            raise InputError(
                f"The run in {path} has another recipe: {change}. Only the place of a folder of "
                "images can change, not its files."
            )
        return
    if change.key.startswith("evaluation.") and not wanted.trains:
        raise InputError(
            f"The run in {path} trains no network, because its error is looked up. So {change} "
            "would change nothing. Drop it."
        )
    if not change.key.startswith("search."):
        return
    of_search = tuple(name for name in phases_of(wanted) if name != WARMUP)
    later = [name for name in of_search[1:] if (path / f"{name}.pt").exists()]
    if not searches or TRAINING in later or not search_stages(wanted.search):
        has = "has no search" if not searches else "has ended its search"
        raise InputError(f"The run in {path} {has}, so {change} would change nothing. Drop it.")
    if later and change.key in LENGTHS["search"]:
        raise InputError(
            f"The run in {path} is in its stage {later[-1]}. {change} would also change earlier "
            "stages, whose result is already in use. Drop it."
        )


def _differences(old: Mapping[str, Any], new: Recipe) -> tuple[Change, ...]:
    before, after = dict(leaves(old)), dict(leaves(_tree(new)))
    keys = [*after, *(key for key in before if key not in after)]
    return tuple(
        Change(key=key, old=before.get(key), new=after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
    )


def _tree(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True)


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key → value; engines are one value."""
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and name != "hypergradient":
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


# ------------------------------ the record


def read_changes(path: Path) -> list[dict[str, Any]]:
    """The changes of a run so far, the earliest first: time, phase, round, key, old and new.

    Raises:
        InputError: if the file is damaged.
    """
    file = path / CHANGES
    if not file.exists():
        return []
    try:
        check_regular(file)
        with file.open("rb") as lines:
            entries = [_entry(line) for line in islice(lines_of(lines, cut=True), MOST)]
    except PermissionError:  # it may be whole
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} is damaged ({error}). It says when the run had which settings. Put it back, "
            "or start a new run."
        ) from None
    return entries


def _entry(line: bytes) -> dict[str, Any]:
    """A change, as it stands in a line.

    Raises:
        ValueError: if it is none.
    """
    entry = parse_json(line.decode("utf-8"))
    if not isinstance(entry, dict) or not {"key", "old", "new"} <= set(entry):
        raise ValueError(f"a line is no change: {shown(entry)}")
    for name, kind in (("key", str), ("phase", str), ("time", str), ("round", int)):
        value = entry.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} of a change is {shown(value)}")  # noqa: TRY004
    return entry


def numbers_changed(path: Path) -> list[dict[str, Any]]:
    """The changes so far on which numbers of the run can depend, without their times."""
    return [
        {name: entry.get(name) for name in ("phase", "round", "key", "old", "new")}
        for entry in read_changes(path)
        if CHANGEABLE.get(entry["key"], True)
    ]


def change_lines(changes: Sequence[Change], *, time: str, phase: str, round_number: int) -> str:
    """The lines of changes that take effect after a round."""
    where = {"time": time, "phase": phase, "round": round_number}
    return "".join(json.dumps({**where, **asdict(change)}) + "\n" for change in changes)


def known_recipes(path: Path, current: Recipe) -> list[Recipe]:
    """All recipes that the run in a folder has had, the last one at the end.

    Args:
        path: the run folder.
        current: the recipe in its config.yaml.
    """
    try:
        return [validate_recipe(tree) for tree in _recorded(path, current)]
    except InputError as error:
        raise _unfit(path, str(error)) from None


def _recorded(path: Path, current: Recipe) -> list[dict[str, Any]]:
    changes = read_changes(path)
    try:
        began = read_object(path / ENVIRONMENT)["recipe"]
        trees = [_tree(validate_recipe(began))]  # with the defaults of keys that are new since
    except (OSError, LookupError, TypeError, ValueError):
        # A folder of an earlier version: undo the changes one by one, starting from the current
        # recipe.
        trees = [_tree(current)]
        for entry in reversed(changes):
            trees.append(_with(path, trees[-1], entry["key"], entry["old"]))
        return trees[::-1]
    for entry in changes:
        trees.append(_with(path, trees[-1], entry["key"], entry["new"]))
    return trees


def _with(path: Path, tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a tree, of the run in a folder, with another value of a dotted key."""
    name, dot, rest = key.partition(".")
    if name not in tree or (dot and not isinstance(tree[name], Mapping)):
        raise _unfit(path, f"there is no setting {shown(name)}.")
    return {**tree, name: _with(path, tree[name], rest, value) if dot else value}


def _unfit(path: Path, why: str) -> InputError:
    return InputError(
        f"{path / CHANGES} does not fit the recipe of the run: {why} Put it back, or start a new "
        "run."
    )


# ------------------------------ learning rates


def learning_rates(optimizer: MultilevelOptimizer) -> dict[tuple[str, str], list[float]]:
    """The rates that a recipe gave each (problem, optimizer), before any state was loaded."""
    return {
        (name, key): [float(group.get("initial_lr", group["lr"])) for group in own.param_groups]
        for name, problem in optimizer.problems.items()
        for key, own in problem.optimizers.items()
    }


def with_declared_rates(
    state: Mapping[str, Any], optimizer: MultilevelOptimizer
) -> Mapping[str, Any]:
    """The state of an optimizer as if it had been declared with the learning rates of this one.

    `set_learning_rates` sets these, and the run says so. mlo would warn that those of the state
    hold. A state of another form stays as it is: the optimizer says what is wrong with it.
    """
    try:
        problems = dict(state["problems"])
        for name, problem in optimizer.problems.items():
            options = {
                key: [
                    {**theirs, **{entry: group[entry] for entry in RATES if entry in group}}
                    for theirs, group in zip(problems[name]["options"][key], groups, strict=True)
                ]
                for key, groups in problem.declared_options.items()
            }
            problems[name] = {**problems[name], "options": options}
    except (LookupError, TypeError, ValueError):
        return state
    return {**state, "problems": problems}


def set_learning_rates(
    optimizer: MultilevelOptimizer, rates: Mapping[tuple[str, str], Sequence[float]]
) -> None:
    """Sets the rates of `learning_rates` after a state was loaded, which brings its own.

    A schedule stays where the state left it, and continues from the new rates. If none has changed,
    all stay the same, to the last bit.
    """
    for (name, key), initial in rates.items():
        problem = optimizer.problems[name]
        groups = problem.optimizers[key].param_groups
        factors = [1.0] * len(groups)
        for scheduler in problem.schedulers.values():
            if scheduler.optimizer is problem.optimizers[key]:
                assert isinstance(scheduler, LambdaLR)
                scheduler.base_lrs = list(initial)
                factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
                scheduler._last_lr = [
                    rate * factor for rate, factor in zip(initial, factors, strict=True)
                ]
        for group, rate, factor in zip(groups, initial, factors, strict=True):
            group["lr"] = rate * factor
            if "initial_lr" in group:
                group["initial_lr"] = rate
