"""The state of a run: its contents, whether it fits, and how a run returns to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.errors import CheckpointError, CheckpointWarning, warn_user
from mlo.history import History
from mlo.problem import Problem
from mlo.randomness import RandomState, preserved
from mlo.sharding import is_sharded
from mlo.solve_sums import SolveSums
from mlo.state_checks import KERNELS, STATE_VERSION, changes, check_problem, check_state

__all__ = ["load_state", "state_of"]


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
                f"Problem {name!r} has sharded parameters, of which no process has the whole. "
                "Save its module and optimizer by torch.distributed.checkpoint."
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
            "declared": _declared(history, name),
            "options": _copied(problem.declared_options),
        }
        if name in history.estimates:
            saved[name]["estimates"] = _copied(history.estimates[name].memory.tensors)
        if (keeps := history.graph_decision(name)) is not None:
            saved[name]["keeps_graph"] = keeps
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


def _declared(history: History, name: str) -> dict[str, Any]:
    """What a resumed run takes from its own declaration, of one problem."""
    problem, engine = history.graph.problems[name], history.engines[name]
    differentiated = name in history.differentiated
    return {
        # (An engine that is no dataclass may show its address.)
        "engine": (repr(engine) if is_dataclass(engine) else engine.label) * differentiated,
        "steps": problem.steps,
        "accumulate": problem.accumulate,
        "accumulate_solves": problem.accumulate_solves,
        "warmup_steps": problem.warmup_steps,
        "grad_clip": str(problem.grad_clip),
        "precision": str(problem.precision),
        "restart_from": str(problem.restart_from),
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
    check_state(state, problems)
    random_state = _random_state(state["random"], history)
    saved = {name: _of_this_version(name, state["problems"][name]) for name in problems}
    for name, problem in problems.items():
        check_problem(problem, saved[name])
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

    if position:
        changed = [
            text
            for name, problem in problems.items()
            for text in changes(problem, saved[name], _declared(history, name))
        ]
        if changed:
            warn_user(
                f"The state was saved of another declaration: {'; '.join(changed)}. The run "
                "resumes as it is declared here, except for the optimizers' settings, which are "
                "those of the state.",
                CheckpointWarning,
            )

    # A load may still fail where no check found anything. Then all of it is undone.
    before = state_of(history, skips_in_a_row=skips_in_a_row, within_round=0)
    try:
        _load_all(saved, history, skips_in_a_row, position=position)
    except BaseException:
        _load_all(before["problems"], history, skips_in_a_row, position=position)
        raise
    history.round = state["round"]
    history.forget()
    history.resumed, history.loaded = set(problems), True
    # Last, since nothing may draw after it.
    if position:
        random_state.restore(history.generators)
    return int(state.get("within_round", 0))


def _random_state(state: Any, history: History) -> RandomState:
    """The random state of a state, which can be restored."""
    try:
        found = RandomState.from_state_dict(state, history.gpus or None)
        if len(found.generators) != len(history.generators):
            raise CheckpointError(
                f"The state has {len(found.generators)} generators, the problems name "
                f"{len(history.generators)}."
            )
        with preserved(history.generators):
            found.restore(history.generators)
    except UNFIT as error:
        raise CheckpointError(
            f"The random state does not fit this machine, or is damaged ({error}). Use an earlier "
            "checkpoint."
        ) from error
    return found


UNFIT = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError)
"""What loaders raise for values that they cannot load."""


def _load_all(
    saved: Mapping[str, Mapping[str, Any]],
    history: History,
    skips_in_a_row: dict[str, int],
    *,
    position: bool,
) -> None:
    """Loads the states of all problems; `position` says whether their batches too."""
    history.sums.clear()
    for name, problem in history.graph.problems.items():
        try:
            _load_problem(problem, saved[name])
            _load_history(name, saved[name], history, position=position)
        except UNFIT as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"The state of problem {name!r} does not fit its module, optimizer, scheduler or "
                f"data: {error}"
            ) from error
        skips_in_a_row[name] = saved[name].get("skips_in_a_row", 0)


def _load_history(name: str, saved: Mapping[str, Any], history: History, *, position: bool) -> None:
    """Loads what a run knows of a problem besides its module, optimizers and schedulers."""
    device = history.graph.problems[name].device
    if "solves" in saved:
        history.sums[name] = SolveSums.from_state_dict(saved["solves"], device)
    if position:
        history.streams[name].load_state_dict(saved["data"])
        if name in history.solve_streams and "solve_data" in saved:
            history.solve_streams[name].load_state_dict(saved["solve_data"])
    if name in history.estimates:
        # Counters stay on the processor; the others are where the problem is.
        history.estimates[name].memory.tensors = {
            key: tensor.to(device if tensor.dim() else "cpu", copy=True)
            for key, tensor in saved["estimates"].items()
        }
    if name in history.averages:
        history.averages[name].load_state_dict(saved["average"], device)
    history.updates[name] = saved["updates"]
    history.restore_graph_decision(name, saved.get("keeps_graph"))
    # The dict stays the same one: solutions hold it.
    history.memory[name].clear()
    for key, tensor in saved["memory"].items():
        history.memory[name][key] = tensor.to(device, copy=True)


def _of_this_version(name: str, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A problem's state with its only player under the problem's name (version 1: no name)."""
    renamed = dict(saved)
    for part in ("optimizers", "schedulers"):
        entries = saved.get(part, {})
        if "" in entries:
            renamed[part] = {name if key == "" else key: value for key, value in entries.items()}
    return renamed


def _parts_of(problem: Problem) -> dict[str, Any]:
    """Copies of the part of a problem's state that its module, optimizers and schedulers hold.

    Raises:
        CheckpointError: if a scheduler cannot tell its state.
    """
    held = problem.module_state()
    for scheduler in problem.schedulers.values():
        if not hasattr(scheduler, "state_dict") or not hasattr(scheduler, "load_state_dict"):
            raise CheckpointError(
                f"Problem {problem.name!r}: its scheduler {type(scheduler).__name__} has no "
                "state_dict() and load_state_dict(), so a run could not resume where it is. Give "
                "it both: what it counts, as a dict."
            )
    found = {
        "module": _copied(held),
        "optimizers": {key: _copied(o.state_dict()) for key, o in problem.optimizers.items()},
        "schedulers": {key: _copied(s.state_dict()) for key, s in problem.schedulers.items()},
    }
    # Those that are not persistent may change all the same, and those that a module makes when it
    # runs are none that another one could load.
    others = {key: b for key, b in problem.module.named_buffers() if key not in held}
    if others:
        found["buffers"] = _copied(others)
    return found


def _load_problem(problem: Problem, saved: Mapping[str, Any]) -> None:
    own = problem.module.state_dict()
    made = {key: value for key, value in own.items() if key not in saved["module"]}
    problem.module.load_state_dict({**made, **saved["module"]})
    for key, tensor in saved.get("buffers", {}).items():
        _load_buffer(problem, key, tensor)
    # Optimizers keep the tensors that they are given, and change them in place later.
    for key, optimizer in problem.optimizers.items():
        state = _copied(saved["optimizers"][key])
        for own, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: own[name] for name in KERNELS if name in own})
        optimizer.load_state_dict(state)
        _keep_precisions(problem, optimizer, saved, key)
    for key, scheduler in problem.schedulers.items():
        scheduler.load_state_dict(_copied(saved["schedulers"][key]))


def _keep_precisions(
    problem: Problem, optimizer: Optimizer, saved: Mapping[str, Any], key: str
) -> None:
    """Gives an optimizer's entries the precision that they were saved in.

    `load_state_dict` casts them to that of their parameter: float32 moments of bfloat16 weights
    would be rounded. Where the module had another precision when it was saved, the cast is right.
    """
    before = saved["module"]
    same = {
        id(parameter)
        for name, parameter in problem.parameters.items()
        if name in before and before[name].dtype == parameter.dtype
    }
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved["optimizers"][key]["state"].items():
        if isinstance(index, str) or id(parameters[index]) not in same:
            continue
        own = optimizer.state[parameters[index]]
        for entry, value in entries.items():
            cast = own.get(entry)
            if isinstance(value, Tensor) and isinstance(cast, Tensor) and cast.dtype != value.dtype:
                own[entry] = value.to(cast.device, copy=True)


@torch.no_grad()
def _load_buffer(problem: Problem, key: str, saved: Tensor) -> None:
    """Loads a buffer that is not persistent, or that the module has made when it ran."""
    prefix, _, name = key.rpartition(".")
    module = problem.module.get_submodule(prefix)
    buffer = module._buffers.get(name)
    if buffer is not None and buffer.shape == saved.shape:
        buffer.copy_(saved)
    elif name in module._buffers:
        module._buffers[name] = saved.to(problem.device, copy=True)
    else:
        module.register_buffer(name, saved.to(problem.device, copy=True), persistent=False)


def _copied(value: Any) -> Any:
    """A nested state with every tensor in it copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry) for entry in value)
    return value
