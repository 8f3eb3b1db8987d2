"""Problems that restart from another problem's value: which tensors start where."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.errors import ProblemError, nearest
from mlo.inner_optimizer import layers_of
from mlo.problem import Problem, Tensors

__all__ = ["Start", "restarts_in", "starts_of"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a problem starts each block of its steps (`restart_from`).

    A parameter starts from the value x of the source's parameter or, with an extra leading
    dimension, from that many copies of it. So θ_0 = expand(x), and a cotangent of θ_0 is summed
    over the copies on its way to x.

    Attributes:
        problem: name of the source, which is listed later.
        source_of: parameter → name of the source's parameter, for those that the source optimizes.
            (A frozen one is a constant.)
        values: parameter → the live tensor from which it starts.
    """

    problem: str
    source_of: dict[str, str]
    values: dict[str, Tensor]

    @torch.no_grad()
    def put(self, problem: Problem) -> None:
        """Restarts: sets the problem's parameters, and empties its optimizers' state."""
        for name, parameter in problem.parameters.items():
            parameter.copy_(self.values[name].expand_as(parameter))
        for optimizer in problem.optimizers.values():
            for layer in layers_of(optimizer):
                _empty(layer)

    def linked(self, values: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Tensors:
        """Tensors of some values with the derivative of θ_0 with respect to the source.

        Args:
            values: parameter → value, some or all.
            source: the source's parameter → tensor, to which the derivative flows unchanged.
        """
        found: Tensors = {}
        for name, value in values.items():
            found[name] = value.detach()
            x = source.get(self.source_of.get(name, ""))
            if x is not None and x.requires_grad:
                # The bracket is zero.
                found[name] = value.detach() + (x - x.detach()).expand_as(value)
        return found

    def pulled(self, cotangents: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Tensors:
        """The cotangents of the source, from those of θ_0.

        Args:
            cotangents: parameter → cotangent, some or all.
            source: the source's parameter → a tensor of its shape.
        """
        found: Tensors = {}
        for name, cotangent in cotangents.items():
            key = self.source_of.get(name, "")
            if key in source:
                found[key] = cotangent.sum_to_size(source[key].shape)
        return found


def starts_of(problems: Mapping[str, Problem]) -> dict[str, Start]:
    """Problem → where it starts, for those with `restart_from`.

    Raises:
        ProblemError: if the source has no such module, or no parameter of a name and shape.
    """
    found: dict[str, Start] = {}
    for name, problem in problems.items():
        if problem.restart_from is not None:
            source, _, path = problem.restart_from.partition(".")
            found[name] = _start(problem, problems[source], path)
    return found


def restarts_in(
    problems: Mapping[str, Problem],
    solutions_in: Mapping[str, Collection[str]],
    starts: Mapping[str, Start],
    updates: Sequence[str],
    turns: Sequence[int],
    *,
    looks_ahead: Collection[str] = (),
) -> list[list[str]]:
    """Which problems restart before each update of a round, the sources first.

    A block of steps includes what the problems below make for its first step. So a problem restarts
    before the first of these updates, and they see it where its steps begin, as in nested loops.

    Args:
        problems: the problems.
        solutions_in: problem → those whose solutions its gradient contains.
        starts: problem → where it starts each block of its steps.
        updates: the problems of the round's updates, in order.
        turns: of each update, its number among its problem's, from 0.
        looks_ahead: the problems whose steps precede the updates below that belong to them.
    """
    found: list[list[str]] = [[] for _ in updates]
    for name in reversed(list(problems)):  # sources are listed later
        if name not in starts:
            continue
        source = starts[name].problem
        below = () if name in looks_ahead else solutions_in[name]
        # The block before ends with the problem's own last step, and with the updates that read
        # it; the value is there once its source has moved, and has restarted itself.
        ends = {name, source} | {other for other in updates if name in solutions_in[other]}
        for turn, (mover, number) in enumerate(zip(updates, turns, strict=True)):
            if mover != name or number % problems[name].turns:
                continue
            first = place = turn
            while place > 0 and updates[place - 1] not in ends and source not in found[place]:
                place -= 1
                first = place if updates[place] in below else first
            found[first].append(name)
    return found


def _start(problem: Problem, source: Problem, path: str) -> Start:
    try:
        module = source.module.get_submodule(path)
    except AttributeError:
        children = ", ".join(key for key, _ in source.module.named_children()) or "none"
        raise ProblemError(
            f"Problem {problem.name!r}: restart_from={problem.restart_from!r} names a submodule "
            f"{path!r} of {source.name!r}, which does not exist. Submodules: {children}."
        ) from None
    trainable = {id(parameter): key for key, parameter in source.parameters.items()}
    offered = dict(module.named_parameters(remove_duplicate=False))
    source_of: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    for name in problem.parameters:
        if name not in offered:
            raise ProblemError(
                f"Problem {problem.name!r} restarts from {problem.restart_from!r}, which has no "
                f"parameter {name!r}. {nearest(name, offered)} Name a submodule (such as "
                f"'{source.name}.head') whose parameters have the names of the problem's own. "
                f"Or give {problem.restart_from!r} a frozen parameter of that name "
                "(requires_grad_(False)): a constant start, which may be set between rounds."
            )
        values[name] = offered[name]
        if id(offered[name]) in trainable:
            source_of[name] = trainable[id(offered[name])]
    _check_shapes(problem, values)
    return Start(problem=source.name, source_of=source_of, values=values)


def _check_shapes(problem: Problem, values: Mapping[str, Tensor]) -> None:
    copies: dict[str, int] = {}
    for name, x in values.items():
        own = problem.parameters[name]
        if own.ndim == x.ndim + 1 and own.shape[1:] == x.shape:
            copies[name] = own.shape[0]
        elif own.shape != x.shape:
            raise ProblemError(
                f"Problem {problem.name!r} restarts from {problem.restart_from!r}, whose {name!r} "
                f"has the shape {tuple(x.shape)}; its own has {tuple(own.shape)}. Give it the "
                "same shape, or an extra leading dimension, along which the value is repeated."
            )
    if copies and (len(copies) < len(values) or len(set(copies.values())) > 1):
        counts = {name: copies.get(name, "one") for name in values}
        raise ProblemError(
            f"Problem {problem.name!r} restarts from {problem.restart_from!r} with different "
            f"numbers of copies: {counts}. Give all of its parameters the same first dimension, or "
            "none."
        )


def _empty(optimizer: Optimizer) -> None:
    """Empties an optimizer's state, as if it had made no step."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        optimizer.state.clear()
        return
    # Adagrad's state is made with the optimizer.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.zeros_like(state["step"])
            state["sum"] = torch.full_like(state["sum"], group["initial_accumulator_value"])
