"""Whether a saved state is one of this run: its structure, types, counts and shapes.

Everything is checked before anything of a run is changed. The state may come from another version,
another declaration, or an editor.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.errors import CheckpointError, CheckpointWarning
from mlo.inner_optimizer import innermost, is_foreign
from mlo.problem import Problem

__all__ = ["KERNELS", "STATE_VERSION", "changes", "check_problem", "check_state"]

STATE_VERSION = 2
READABLE = (1, STATE_VERSION)

OF_STATE = {"version": int, "round": int, "random": Mapping, "problems": Mapping}
OF_STATE_SINCE = {"within_round": int}
OF_PROBLEM = {
    "module": Mapping,
    "optimizers": Mapping,
    "schedulers": Mapping,
    "data": Mapping,
    "updates": int,
    "memory": Mapping,
}
OF_PROBLEM_SINCE = {
    "buffers": Mapping,
    "optimizer_types": Mapping,
    "skips_in_a_row": int,
    "keeps_graph": bool,
    "estimates": Mapping,
    "solves": Mapping,
    "average": Mapping,
    "solve_data": Mapping,
    "declared": Mapping,
    "options": Mapping,
}
"""Entries of a state, and of a problem in it → their types; then later and optional entries."""

OF_DECLARATION = {
    "engine": str,
    "steps": int,
    "accumulate": int,
    "accumulate_solves": int,
    "warmup_steps": int,
    "grad_clip": str,
    "precision": str,
    "restart_from": str,
}
"""Entries of what a problem was declared with → their types."""

ELEMENTWISE = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum"})
"""Entries of the states of torch.optim's optimizers that have the shape of their parameter."""

KERNELS = ("foreach", "fused")
"""Settings that choose an optimizer's kernels rather than its steps: this run's values stay."""


def check_state(state: Any, problems: Mapping[str, Problem]) -> None:
    """Checks a state's outer structure, and that of each problem in it.

    Args:
        state: what is to be loaded.
        problems: of this run, by name.

    Raises:
        CheckpointError: naming the version, or the entry that is wrong.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool):
        version = None
    elif version > STATE_VERSION:
        raise CheckpointError(
            f"The state was saved by a newer mlo (version {version} of its states; this one reads "
            f"{' and '.join(map(str, READABLE))}). Update mlo."
        )
    if version not in READABLE:
        raise CheckpointError(
            f"The state has version {version!r}; this version of mlo reads "
            f"{' and '.join(map(str, READABLE))}."
        )
    _check_entries(state, "", OF_STATE, OF_STATE_SINCE)
    if set(state["problems"]) != set(problems):
        raise CheckpointError(
            f"The state is of the problems {sorted(map(str, state['problems']))}, this optimizer "
            f"has {sorted(problems)}."
        )
    for name in problems:
        where = f"problems.{name}"
        saved = state["problems"][name]
        if not isinstance(saved, Mapping):
            raise _wrong(where, "a mapping", saved)
        _check_entries(saved, where, OF_PROBLEM, OF_PROBLEM_SINCE)
        if "declared" in saved:
            _check_entries(saved["declared"], f"{where}.declared", OF_DECLARATION)


def _check_entries(
    found: Mapping[str, Any],
    where: str,
    required: Mapping[str, type],
    optional: Mapping[str, type] = {},
) -> None:
    """Checks the names and types of a mapping's entries; integers must not be negative.

    Raises:
        CheckpointError: naming the entry.
    """
    known = {**required, **optional}
    for key in required:
        if key not in found:
            raise CheckpointError(f"The state lacks {_placed(where, key)}. {EDITED}")
    for key, value in found.items():
        if key not in known:
            raise CheckpointError(
                f"The state has an entry {_placed(where, key)}, which this version of mlo does "
                f"not know. {EDITED}"
            )
        wanted = known[key]
        if wanted is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise _wrong(_placed(where, key), "a count", value)
        if not isinstance(value, wanted):
            what = {bool: "true or false", str: "text"}.get(wanted, "a mapping")
            raise _wrong(_placed(where, key), what, value)


EDITED = "It was edited, or written by another program. Use an earlier checkpoint."


def _placed(where: str, key: object) -> str:
    """The dotted place of an entry."""
    return f"{where}.{key}" if where else str(key)


def _wrong(where: str, what: str, got: Any) -> CheckpointError:
    return CheckpointError(f"{where} of the state must be {what}, got {got!r:.60}. {EDITED}")


# ------------------------------ one problem


def check_problem(problem: Problem, saved: Mapping[str, Any]) -> None:
    """Checks that a saved state fits its problem.

    Raises:
        CheckpointError: naming what differs.
    """
    own, theirs = problem.module_state(), saved["module"]
    wrong = [key for key in own if key not in theirs or _shape(theirs[key]) != _shape(own[key])]
    wrong += [key for key in theirs if key not in own]
    for part, mine in (("optimizers", problem.optimizers), ("schedulers", problem.schedulers)):
        wrong += [f"{part}.{key}" for key in set(mine) ^ set(saved[part])]
    if wrong:
        raise CheckpointError(
            f"The state of problem {problem.name!r} does not fit: "
            f"{', '.join(map(repr, wrong[:3]))} {'differ' if len(wrong) > 1 else 'differs'} in "
            "name or shape. It is of another model or declaration."
        )
    for key, optimizer in problem.optimizers.items():
        kind = saved.get("optimizer_types", {}).get(key)
        why = _misfit(optimizer, saved["optimizers"][key], kind)
        if why:
            raise CheckpointError(
                f"The state of problem {problem.name!r} is of another optimizer: {why}. Make the "
                "optimizer that the state was saved with, or load the module's state alone."
            )
    for key, scheduler in problem.schedulers.items():
        _check_scheduler(f"problems.{problem.name}.schedulers.{key}", scheduler, saved)
    if "options" in saved:
        _check_options(f"problems.{problem.name}.options", problem, saved["options"])
    modules = dict(problem.module.named_modules())
    for key, value in saved.get("buffers", {}).items():
        where = f"problems.{problem.name}.buffers.{key}"
        if not isinstance(value, Tensor):
            raise _wrong(where, "a tensor", value)
        prefix, _, name = str(key).rpartition(".")
        module = modules.get(prefix)
        taken = module is not None and hasattr(module, name) and name not in module._buffers
        if module is None or taken or not name:
            raise CheckpointError(
                f"{where} of the state has no place: {problem.name!r} has no module {prefix!r} "
                f"that could have a buffer {name!r}. It is of another model."
            )
    for key, value in saved["memory"].items():
        if not isinstance(value, Tensor):
            raise _wrong(f"problems.{problem.name}.memory.{key}", "a tensor", value)
    if "average" in saved:
        _check_average(f"problems.{problem.name}.average", problem, saved["average"])
    lost = [key for key in own if _precision(theirs[key]) > _precision(own[key])]
    if lost:
        warnings.warn(
            f"The state of problem {problem.name!r} has a higher precision than its module: "
            f"{lost[0]!r} is {theirs[lost[0]].dtype} there and {own[lost[0]].dtype} here, and is "
            "rounded.",
            CheckpointWarning,
            stacklevel=5,
        )


def changes(problem: Problem, saved: Mapping[str, Any], declared: Mapping[str, Any]) -> list[str]:
    """What differs between a problem and the one that its state was saved of, in words.

    Args:
        problem: of this run.
        saved: its state.
        declared: what the state would hold as "declared" if it were saved of this run.
    """
    before = saved.get("declared", {})
    found = [
        f"{problem.name} had {key}={before[key]!s:.80}, here {value!s:.80}"
        for key, value in declared.items()
        if key in before and before[key] != value
    ]
    # Declarations are compared, because steps, schedules and hooks move what is in the groups.
    if "options" not in saved:
        found += _moved_options(problem, saved)
    else:
        for key, declared_options in problem.declared_options.items():
            found += _changed_options(problem.name, saved["options"][key], declared_options)
    return list(dict.fromkeys(found))


def _moved_options(problem: Problem, saved: Mapping[str, Any]) -> list[str]:
    """The same of the optimizers, where the state (of an earlier version) has no declaration."""
    if problem.schedulers or problem.settings is not None:  # which move the settings
        return []
    found = []
    for key, optimizer in problem.optimizers.items():
        # Steps of torch.optim's classes move none; others may keep counters and modes there.
        if not is_foreign(innermost(optimizer)):
            groups = saved["optimizers"][key]["param_groups"]
            found += _changed_options(problem.name, groups, optimizer.param_groups)
    return found


def _changed_options(
    name: str, before: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The settings that differ between two lists of groups of a problem's optimizer, in words."""
    found = []
    for theirs, own in zip(before, here, strict=True):
        for entry, value in own.items():
            if entry == "params" or entry in KERNELS or entry not in theirs:
                continue
            if not _equal(theirs[entry], value):
                found.append(f"{name} had {entry}={theirs[entry]!r:.40}, here {value!r:.40}")
    return found


def _equal(one: Any, other: Any) -> bool:
    """Whether two settings are the same numbers, which tensors may hold too."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if _is_number(one) and _is_number(other):
        return float(one) == float(other)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.cpu(), other.cpu())
    return type(one) is type(other) and bool(one == other)


def _check_scheduler(where: str, scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Checks a scheduler's entries, since `load_state_dict` would accept anything."""
    key = where.rpartition(".")[2]
    own, theirs = scheduler.state_dict(), saved["schedulers"][key]
    if not isinstance(theirs, Mapping):
        raise _wrong(where, "a mapping", theirs)
    for entry, value in theirs.items():
        if entry in own and not _alike(value, own[entry]):
            raise _wrong(f"{where}.{entry}", f"like {own[entry]!r:.60}", value)


def _check_options(where: str, problem: Problem, saved: Mapping[str, Any]) -> None:
    """Checks the settings that the optimizers were declared with: a list of groups for each."""
    if set(saved) != set(problem.declared_options):
        raise _wrong(where, "of the problem's optimizers", sorted(map(str, saved)))
    for key, own in problem.declared_options.items():
        groups = saved[key]
        if (
            not isinstance(groups, list)
            or len(groups) != len(own)
            or not all(isinstance(group, Mapping) for group in groups)
        ):
            raise _wrong(f"{where}.{key}", f"a list of {len(own)} mappings", groups)
        foreign = is_foreign(innermost(problem.optimizers[key]))
        for index, (group, mine) in enumerate(zip(groups, own, strict=True)):
            if entry := _unlike_entry(group, mine, foreign=foreign):
                place = f"{where}.{key}[{index}].{entry}"
                raise _wrong(place, f"like {mine[entry]!r:.60}", group[entry])


def _check_average(where: str, problem: Problem, saved: Mapping[str, Any]) -> None:
    _check_entries(saved, where, {"count": int, "kept": Mapping})
    kept = saved["kept"]
    if set(kept) != (set(problem.parameters) if saved["count"] else set()):
        raise _wrong(f"{where}.kept", "of the problem's parameters", sorted(map(str, kept)))
    for key, tensors in kept.items():
        shapes = (problem.parameters[key].shape, torch.Size([]))
        if not isinstance(tensors, Mapping) or not tensors:
            raise _wrong(f"{where}.kept.{key}", "a mapping of tensors", tensors)
        for name, tensor in tensors.items():
            if _shape(tensor) not in shapes:
                raise _wrong(f"{where}.kept.{key}.{name}", f"of shape {shapes[0]}", tensor)


def _misfit(optimizer: Optimizer, saved: Any, kind: Any) -> str:
    """Why a state is not one of an optimizer of this kind; empty if it is.

    Args:
        optimizer: of this run.
        saved: the state.
        kind: the name of the class that it was saved of; None where it is not known.
    """
    mine = type(optimizer).__name__
    if kind is not None and kind != mine:
        return f"it was saved of {kind}, this is {mine}"
    if not isinstance(saved, Mapping):
        return f"it is a {type(saved).__name__}, not a mapping"

    # torch's `load_state_dict` matches parameters by their position in the groups, so their numbers
    # must agree; it does not know names.
    groups, theirs = optimizer.param_groups, saved.get("param_groups", [])
    if not isinstance(theirs, Sequence) or len(groups) != len(theirs):
        return f"its groups of parameters are not {len(groups)}, as here"
    for own, group in zip(groups, theirs, strict=True):
        if why := _group_misfit(own, group, optimizer, mine):
            return why

    # An entry per element of a parameter (momentum, moments) must have the parameter's shape. Other
    # libraries' entries of these names may have other shapes (one moment per row), and they may
    # keep entries that belong to no parameter.
    foreign = is_foreign(innermost(optimizer))
    states, parameters = saved.get("state", {}), [p for group in groups for p in group["params"]]
    if not isinstance(states, Mapping):
        return "its entries by parameter are no mapping"
    for index, entries in states.items():
        if foreign and isinstance(index, str):
            continue
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            return f"it has a state of parameter {index!r} of {len(parameters)}"
        if not isinstance(entries, Mapping):
            return f"its state of parameter {index} is no mapping"
        shape = parameters[index].shape
        for key in () if foreign else ELEMENTWISE.intersection(entries):
            # (The first momentum is made by the first step.)
            none_yet = key == "momentum_buffer" and entries[key] is None
            if not none_yet and _shape(entries[key]) != shape:
                return f"its {key} has the shape {_shape(entries[key])}, not {shape}"
        made = entries.get("step", 0)
        if not _is_number(made) or made < 0:
            return f"its count of steps is {made!r:.60}"
        known = optimizer.state.get(parameters[index], {})
        if missing := set(known) - set(entries):
            return f"it lacks {', '.join(sorted(missing))} of parameter {index}"
    return ""


def _group_misfit(own: Mapping[str, Any], group: Any, optimizer: Optimizer, mine: str) -> str:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
        return "a group of it is no list of parameters with settings"
    if len(own["params"]) != len(group["params"]):
        return f"a group has {len(group['params'])} parameters, here {len(own['params'])}"
    # (Settings that a scheduler adds, like initial_lr, may come later.)
    if missing := set(optimizer.defaults) - set(group):
        return f"it lacks {', '.join(sorted(missing))} of {mine}"
    if entry := _unlike_entry(group, own, foreign=is_foreign(innermost(optimizer))):
        return f"its {entry} is {group[entry]!r:.60}, here {own[entry]!r:.60}"
    return ""


def _unlike_entry(group: Mapping[str, Any], own: Mapping[str, Any], *, foreign: bool) -> str:
    """The first setting of a group that cannot replace this run's; empty if all can.

    Args:
        group: of a state.
        own: of this run.
        foreign: whether the optimizer is of another class than torch.optim's. Those may keep a mode
            in the group, such as one for training and one for evaluation.
    """
    for key, value in group.items():
        if key == "params" or key not in own:
            continue
        if key in KERNELS and (value is None or isinstance(value, bool)):
            continue
        if foreign and isinstance(value, bool) and isinstance(own[key], bool):
            continue
        if not _alike(value, own[key]):
            return str(key)
    return ""


def _alike(found: Any, own: Any) -> bool:
    """Whether a value may replace another: a number a number, and so on."""
    if own is None:  # an option that is not set
        return found is None or _is_number(found)
    if isinstance(own, Mapping):
        known = isinstance(found, Mapping) and [key for key in found if key in own]
        return isinstance(known, list) and all(_alike(found[key], own[key]) for key in known)
    if isinstance(own, (list, tuple)):
        # (Betas are two; of a list, such as rates or milestones, the length may change.)
        if not isinstance(found, (list, tuple)):
            return False
        if all(map(_is_number, own)):
            same_length = isinstance(own, list) or len(found) == len(own)
            return same_length and all(map(_is_number, found))
        return len(found) == len(own) and all(map(_alike, found, own))
    if isinstance(own, bool):  # the state's entries depend on it (amsgrad)
        return found is own
    if _is_number(own):
        return _is_number(found) and not isinstance(found, bool)
    return type(found) is type(own)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _precision(value: Any) -> int:
    """Bytes of a floating-point number in a tensor; 0 of anything else."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.element_size() if floating else 0


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
