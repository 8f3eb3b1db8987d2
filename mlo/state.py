"""The state of a run: what it holds, whether it fits, and how a run returns to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mlo.errors import CheckpointError
from mlo.levels import History
from mlo.problem import Problem
from mlo.randomness import RandomState
from mlo.sharding import is_sharded

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
            "module": _copied(dict(problem.module.state_dict())),
            "optimizers": {key: _copied(o.state_dict()) for key, o in problem.optimizers.items()},
            "schedulers": {key: _copied(s.state_dict()) for key, s in problem.schedulers.items()},
            "data": history.streams[name].state_dict(),
            "updates": history.updates[name],
            "skips_in_a_row": skips_in_a_row[name],
            "memory": _copied(history.memory[name]),
        }
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

    for name, problem in problems.items():
        _load_problem(problem, saved[name])
        if position:
            history.streams[name].load_state_dict(saved[name]["data"])
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
