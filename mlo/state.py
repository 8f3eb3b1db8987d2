"""The state of a run: what it holds, whether it fits, and how a run returns to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mlo.errors import CheckpointError, CheckpointWarning
from mlo.levels import History
from mlo.problem import Problem
from mlo.randomness import RandomState
from mlo.sharding import is_sharded
from mlo.solve_sums import SolveSums

__all__ = ["load_state", "state_of"]

STATE_VERSION = 2
READABLE = (1, STATE_VERSION)


def state_of(
    history: History, *, skips_in_a_row: Mapping[str, int], within_round: int
) -> dict[str, Any]:
    """Everything that a run needs to resume, as copies of tensors and plain values.

    Args:
        history: the run.
        skips_in_a_row: problem → updates that were left out since its last one.
        within_round: number of updates of the current round that were made.

    Raises:
        CheckpointError: if parameters are sharded.
    """
    problems = history.graph.problems
    for name, problem in problems.items():
        if any(is_sharded(parameter) for parameter in problem.parameters.values()):
            raise CheckpointError(
                f"Problem {name!r} has sharded parameters, of which no process has the whole. Save "
                "its module and optimizer by torch.distributed.checkpoint."
            )
    saved: dict[str, dict[str, Any]] = {}
    for name, problem in problems.items():
        saved[name] = {
            **_parts_of(problem),
            "optimizer_types": {key: type(o).__name__ for key, o in problem.optimizers.items()},
            "data": history.streams[name].state_dict(),
            "updates": history.updates[name],
            "skips_in_a_row": skips_in_a_row[name],
            "memory": _copied(history.memory[name]),
        }
        if name in history.estimates:
            saved[name]["estimates"] = _copied(history.estimates[name].memory.tensors)
        if name in history.sums:
            saved[name]["solves"] = _copied(history.sums[name].state_dict())
        if name in history.averages:
            saved[name]["average"] = history.averages[name].state_dict()
        if name in history.solve_streams:
            saved[name]["solve_data"] = history.solve_streams[name].state_dict()
    return {
        "version": STATE_VERSION,
        "round": history.round,
        "within_round": within_round,
        "random": RandomState.capture(history.generators).state_dict(history.gpus or None),
        "problems": saved,
    }


def load_state(
    state: Mapping[str, Any],
    history: History,
    *,
    skips_in_a_row: dict[str, int],
    position: bool,
) -> int:
    """Returns a run to a state.

    Args:
        state: as `state_of` returned it.
        history: the run, which is changed.
        skips_in_a_row: problem → number of updates left out; it is filled.
        position: whether batches and random state are those of the state, too.

    Returns:
        The number of updates of the current round that were made.

    Raises:
        CheckpointError: if it is of another graph, or of a version that cannot be read.
    """
    # Everything is checked before anything is changed: a state that does not fit leaves the run as
    # it was.
    problems = history.graph.problems
    if state.get("version") not in READABLE:
        raise CheckpointError(
            f"The state has version {state.get('version')!r}; this version of mlo reads "
            f"{' and '.join(map(str, READABLE))}."
        )
    if set(state["problems"]) != set(problems):
        raise CheckpointError(
            f"The state is of the problems {sorted(state['problems'])}, this optimizer has "
            f"{sorted(problems)}."
        )
    random_state = RandomState.from_state_dict(state["random"], history.gpus or None)
    if len(random_state.generators) != len(history.generators):
        raise CheckpointError(
            f"The state has {len(random_state.generators)} generators, the problems name "
            f"{len(history.generators)}."
        )
    saved = {name: _of_this_version(name, state["problems"][name]) for name in problems}
    for name, problem in problems.items():
        _check(problem, saved[name])
        for part, what, held in (
            ("estimates", "estimator", history.estimates),
            ("average", "average", history.averages),
        ):
            if (name in held) != (part in saved[name]):
                raise CheckpointError(
                    f"The state of problem {name!r} does not fit: it was saved "
                    f"{'with' if part in saved[name] else 'without'} an {what}, and this problem "
                    f"has {'one' if name in held else 'none'}. Declare the problem as it was."
                )

    _load_all(history, saved)
    history.sums.clear()
    for name, problem in problems.items():
        if "solves" in saved[name]:
            history.sums[name] = SolveSums.from_state_dict(saved[name]["solves"], problem.device)
        if position:
            history.streams[name].load_state_dict(saved[name]["data"])
            if name in history.solve_streams and "solve_data" in saved[name]:
                history.solve_streams[name].load_state_dict(saved[name]["solve_data"])
        if name in history.estimates:
            kept = saved[name]["estimates"].items()
            # Counters stay on the processor; the others are where the problem is.
            tensors = {k: t.to(problem.device if t.dim() else "cpu", copy=True) for k, t in kept}
            history.estimates[name].memory.tensors = tensors
        if name in history.averages:
            history.averages[name].load_state_dict(saved[name]["average"], problem.device)
        history.updates[name] = saved[name]["updates"]
        skips_in_a_row[name] = saved[name].get("skips_in_a_row", 0)
        # The dict stays the same one: solutions hold it.
        history.memory[name].clear()
        for key, tensor in saved[name]["memory"].items():
            history.memory[name][key] = tensor.to(problem.device, copy=True)
    history.round = state["round"]
    history.forget()
    history.resumed = set(problems)
    # Last, since nothing may draw after it.
    if position:
        random_state.restore(history.generators)
    return int(state.get("within_round", 0))


def _of_this_version(name: str, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A problem's state with its only player under the problem's name (version 1: no name)."""
    renamed = dict(saved)
    for part in ("optimizers", "schedulers"):
        entries = saved.get(part, {})
        if "" in entries:
            renamed[part] = {name if key == "" else key: value for key, value in entries.items()}
    return renamed


def _load_all(history: History, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Loads modules, optimizers and schedulers of all problems, or of none."""
    # A load may still fail where the check found nothing. Then all problems go back, and the run is
    # as it was.
    problems = history.graph.problems
    before = {name: _parts_of(problem) for name, problem in problems.items()}
    try:
        for name, problem in problems.items():
            _load_problem(problem, saved[name])
    except BaseException:
        for name, problem in problems.items():
            _load_problem(problem, before[name])
        raise


def _parts_of(problem: Problem) -> dict[str, Any]:
    """What of a problem's state its module, optimizers and schedulers hold, as copies."""
    return {
        "module": _copied(dict(problem.module.state_dict())),
        "optimizers": {key: _copied(o.state_dict()) for key, o in problem.optimizers.items()},
        "schedulers": {key: _copied(s.state_dict()) for key, s in problem.schedulers.items()},
    }


def _load_problem(problem: Problem, saved: Mapping[str, Any]) -> None:
    try:
        problem.module.load_state_dict(saved["module"])
        # Optimizers keep the tensors that they are given, and change them in place later.
        for key, optimizer in problem.optimizers.items():
            optimizer.load_state_dict(_copied(saved["optimizers"][key]))
        for key, scheduler in problem.schedulers.items():
            scheduler.load_state_dict(_copied(saved["schedulers"][key]))
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"The state of problem {problem.name!r} does not fit its module, optimizer or "
            f"scheduler: {error}"
        ) from error


def _check(problem: Problem, saved: Mapping[str, Any]) -> None:
    """Checks that a saved state fits its problem.

    Raises:
        CheckpointError: naming what differs.
    """
    own, theirs = problem.module.state_dict(), saved.get("module", {})
    wrong = [key for key in own if key not in theirs or _shape(theirs[key]) != _shape(own[key])]
    wrong += [key for key in theirs if key not in own]
    for part, mine in (("optimizers", problem.optimizers), ("schedulers", problem.schedulers)):
        wrong += [f"{part}.{key}" for key in set(mine) ^ set(saved.get(part, {}))]
    wrong += [part for part in ("data", "updates", "memory") if part not in saved]
    if wrong:
        raise CheckpointError(
            f"The state of problem {problem.name!r} does not fit: "
            f"{', '.join(map(repr, wrong[:3]))} {'differ' if len(wrong) > 1 else 'differs'} in "
            "name or shape. It is of another model or declaration."
        )
    for key, optimizer in problem.optimizers.items():
        why = _misfit(
            optimizer, saved["optimizers"][key], saved.get("optimizer_types", {}).get(key)
        )
        if why:
            raise CheckpointError(
                f"The state of problem {problem.name!r} is of another optimizer: {why}. Make the "
                "optimizer that the state was saved with, or load the module's state alone."
            )
    lost = [key for key in own if _precision(theirs[key]) > _precision(own[key])]
    if lost:
        warnings.warn(
            f"The state of problem {problem.name!r} has a higher precision than its module: "
            f"{lost[0]!r} is {theirs[lost[0]].dtype} there and {own[lost[0]].dtype} here, and is "
            "rounded.",
            CheckpointWarning,
            stacklevel=5,
        )


def _misfit(optimizer: Optimizer, saved: Mapping[str, Any], kind: str | None) -> str:
    """Why a state is not one of an optimizer of this kind; empty if it is."""
    mine = type(optimizer).__name__
    if kind is not None and kind != mine:
        return f"it was saved of {kind}, this is {mine}"

    # torch's `load_state_dict` matches parameters by their position in the groups, so these must
    # agree in number; names it does not know.
    groups, theirs = optimizer.param_groups, saved.get("param_groups", [])
    if len(groups) != len(theirs):
        return f"it has {len(theirs)} groups of parameters, this one {len(groups)}"
    for own, group in zip(groups, theirs, strict=True):
        if len(own["params"]) != len(group["params"]):
            return f"a group has {len(group['params'])} parameters, here {len(own['params'])}"
        # (Settings that a scheduler adds, like initial_lr, may come later.)
        missing = set(optimizer.defaults) - set(group)
        if missing:
            return f"it lacks {', '.join(sorted(missing))} of {mine}"

    # An entry per element of a parameter (momentum, moments) must have the parameter's shape.
    parameters = [p for group in groups for p in group["params"]]
    for index, entries in saved.get("state", {}).items():
        if index >= len(parameters):
            return f"it has a state of parameter {index} of {len(parameters)}"
        shape = parameters[index].shape
        for key in ELEMENTWISE.intersection(entries):
            if _shape(entries[key]) != shape:
                return f"its {key} has the shape {_shape(entries[key])}, not {shape}"
    return ""


ELEMENTWISE = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum"})
"""Entries of the states of torch.optim's optimizers that have the shape of their parameter."""


def _precision(value: Any) -> int:
    """Bytes of a floating-point number in a tensor; 0 of anything else."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.element_size() if floating else 0


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def _copied(value: Any) -> Any:
    """A nested state with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry) for entry in value)
    return value
