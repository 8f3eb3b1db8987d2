"""The dependency graph: which loss reads which problems, and in which order problems move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from mlo.errors import GraphError, nearest
from mlo.problem import Problem
from mlo.tensors import sharing_memory

__all__ = ["DependencyGraph", "Order"]

Order = Literal["lower_first", "outermost_first", "simultaneous"]
"""Whether the outermost problems end a round or begin it, or see all problems as it began."""


class DependencyGraph:
    """Problems, from the innermost to the outermost, and the edges that their losses declare.

    A loss that reads a problem listed before its own reads that problem's *response*: its solution
    as a function of everything that it depends on. A loss that reads a problem listed after its own
    is *conditioned* on that problem's current value. So is a problem that starts from the value of
    a later one (`restart_from`).

    For example, in the list `net, decay`, the training loss of `net` reads `decay`, and the
    validation loss of `decay` reads `net`. Then `decay` has `net` in `reads_below` and in
    `solutions_depending_on`, and `net` has `decay` in `reads_above`.

    Each attribute is a mapping by problem name, and is computed once.

    Attributes:
        reads: the problems that it reads, by its loss or otherwise.
        reads_below: those of them whose solutions it reads.
        reads_above: those of them on whose current values it is conditioned.
        solutions_in: the problems that it sees by their solutions, in listed order: those in
            `reads_below`, and those listed before it on which any of these is conditioned. The
            solutions inside these (which they read themselves) are in *their* `solutions_in`.
        values_in: the problems listed after it on whose values its loss depends, itself or through
            solutions.
        solutions_depending_on: the problems listed before it whose solutions, as it sees them, are
            functions of its own value.
        level: the longest chain of solutions in its total gradient; 0 where there is none.
        position: its place in the list.

    Raises:
        GraphError: for a duplicate name, an unknown read, a problem that reads itself, a shared
            trainable parameter.
    """

    def __init__(self, problems: Sequence[Problem] | Mapping[str, Problem]) -> None:
        self.problems: dict[str, Problem] = {}
        for problem in _as_list(problems):
            if problem.name in self.problems:
                raise GraphError(
                    f"Two problems are called {problem.name!r}. Give each problem its own name."
                )
            self.problems[problem.name] = problem
        self.position = {name: index for index, name in enumerate(self.problems)}
        self.reads = {name: self._resolve_reads(problem) for name, problem in self.problems.items()}
        self._check_shared_parameters()
        # Computed once, since every evaluation of a loss needs them.
        names = tuple(self.problems)
        self.reads_below = {name: self._reads_where(name, below=True) for name in names}
        self.reads_above = {name: self._reads_where(name, below=False) for name in names}
        self._values_seen = self._find_values_seen()
        self.solutions_in = {name: self._find_solutions_in(name) for name in names}
        self.values_in = {name: self._find_values_in(name) for name in names}
        self.solutions_depending_on = {name: self._find_depending_on(name) for name in names}
        # All solutions count, not only those read. A step is differentiated at the values of the
        # problems below that it saw, so these must not move until it is read.
        self.level: dict[str, int] = {}
        for name in names:
            below = [self.level[lower] for lower in self.solutions_in[name]]
            self.level[name] = 1 + max(below, default=-1)

    # ------------------------------ facts

    def _reads_where(self, name: str, *, below: bool) -> tuple[str, ...]:
        own = self.position[name]
        return tuple(read for read in self.reads[name] if (self.position[read] < own) == below)

    def _find_values_seen(self) -> dict[str, set[str]]:
        """The problems on whose values each one is conditioned, itself or through solutions."""
        seen: dict[str, set[str]] = {}
        # Innermost first, so that the sets of all solutions that a loss reads are known already.
        for name in self.problems:
            through = [seen[lower] for lower in self.reads_below[name]]
            seen[name] = set(self.reads_above[name]).union(*through) - {name}
        return seen

    def _find_solutions_in(self, name: str) -> tuple[str, ...]:
        own = self.position[name]
        found: set[str] = set()
        waiting = list(self.reads_below[name])
        # A solution may be conditioned on the value of a problem that `name` has below it. `name`
        # sees that problem's solution in its place, which is then one more solution to follow.
        while waiting:
            lower = waiting.pop()
            if lower not in found:
                found.add(lower)
                waiting += [seen for seen in self._values_seen[lower] if self.position[seen] < own]
        return self._listed(found)

    def _find_values_in(self, name: str) -> tuple[str, ...]:
        through = [self._values_seen[lower] for lower in self.solutions_in[name]]
        seen = self._values_seen[name].union(*through)
        return self._listed({other for other in seen if self.position[other] > self.position[name]})

    def _find_depending_on(self, name: str) -> frozenset[str]:
        # A solution depends on the values that it is conditioned on. Where such a value belongs to
        # a problem listed before `name`, `name` sees that problem's solution in its place, so what
        # that one depends on counts too.
        own = self.position[name]
        found = set()
        for lower in list(self.problems)[:own]:
            seen: set[str] = set()
            waiting = [lower]
            while waiting:
                new = self._values_seen[waiting.pop()] - seen
                seen |= new
                waiting += [value for value in new if self.position[value] < own]
            if name in seen:
                found.add(lower)
        return frozenset(found)

    def _levels(self) -> list[list[str]]:
        """The problems on each level, the lowest level first."""
        rows: list[list[str]] = [[] for _ in range(1 + max(self.level.values()))]
        for name, level in self.level.items():
            rows[level].append(name)
        return rows

    def _listed(self, names: set[str]) -> tuple[str, ...]:
        """The names in listed order."""
        return tuple(name for name in self.problems if name in names)

    # ------------------------------ the order of a round

    def schedule(self, order: Order = "lower_first") -> tuple[str, ...]:
        """Returns the order of the updates in one round, each problem as often as it moves.

        A problem with `steps=K` moves K times per move of those above it. One with
        `accumulate_solves=N` is there N times per move, as if it moved each time. Problems move
        level by level (a level is the longest chain of responses in a gradient), and in listed
        order within one. A level moves as often as its most frequent problem. The less frequent
        ones join in its last moves, so each problem has just moved when the next level does. Of one
        level, problems that restart from the value of another move after it. With "outermost_first"
        the last level begins the round.
        """
        return tuple(self._round(order).updates())

    def _round(self, order: Order) -> _Block:
        """The updates of one round, as blocks that repeat."""
        block = _Block(parts=())
        rows = self._levels()
        for row in rows:
            first = order == "outermost_first" and row is rows[-1]
            block = _Block(
                parts=tuple([self._moves(group, block, first) for group in self._in_turn(row)])
            )
        return block

    def _moves(self, names: Sequence[str], below: _Block, first: bool) -> _Block:
        """The moves of problems of one level, each with everything below."""
        # Everything below moves again before (or, outermost first, after) each of these moves.
        # Moves of the same problems are one block.
        members = [self.problems[name] for name in names]
        most = max(problem.turns for problem in members)
        moves: list[_Block] = []
        for movers, same in groupby(_movers(move, members, first) for move in range(most)):
            parts: tuple[str | _Block, ...] = (*movers, below) if first else (below, *movers)
            moves.append(_Block(parts=parts, times=len(list(same))))
        return _Block(parts=tuple(moves))

    def _in_turn(self, row: Sequence[str]) -> list[list[str]]:
        """A level in groups: a problem that restarts from another's value follows it."""
        # So that the value does not move while the problem makes its steps from there.
        groups: list[list[str]] = []
        turn: dict[str, int] = {}
        for name in reversed(row):  # a source is listed later
            turn[name] = 1 + turn.get(_source(self.problems[name]) or "", -1)
        for name in row:
            groups += [[] for _ in range(1 + turn[name] - len(groups))]
            groups[turn[name]].append(name)
        return groups

    @property
    def outermost(self) -> tuple[str, ...]:
        """The problems of the last level."""
        return tuple(
            name for name, level in self.level.items() if level == max(self.level.values())
        )

    def round_text(self, order: Order = "lower_first") -> str:
        """Returns the order of a round in readable form: "(net ×5 → decay) ×2"; see `schedule`."""
        return str(self._round(order))

    def to_mermaid(self) -> str:
        """Returns a Mermaid flowchart: solid arrows are solutions, dashed ones values."""
        lines = ["flowchart BT"]
        for name, problem in self.problems.items():
            players = f"<br/>players: {', '.join(problem.players)}" if problem.is_game else ""
            lines.append(f'    {name}["{name}{players}"]')
        for name in self.problems:
            lines += [f"    {lower} -->|solution| {name}" for lower in self.reads_below[name]]
            for upper in self.reads_above[name]:
                what = "start" if upper == _source(self.problems[name]) else "value"
                lines.append(f"    {upper} -.->|{what}| {name}")
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = ["Dependency graph, from the innermost problem to the outermost:"]
        for name in self.problems:
            solutions = ", ".join(self.reads_below[name]) or "-"
            values = ", ".join(self.reads_above[name]) or "-"
            rows.append(
                f"  level {self.level[name]}  {name:<12} reads solutions: {solutions:<16} values: "
                f"{values}{_restart(self.problems[name])}"
            )
        rows.append(f"  order of a round: {self.round_text()}")
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        """The picture that a notebook shows."""
        return self.to_svg()

    def to_svg(self) -> str:
        """Returns the picture as SVG text: solid arrows are solutions, dashed ones values."""
        from mlo.graph_picture import Arrow, graph_svg  # with html, slow to import

        arrows = [
            Arrow(start=start, end=name, dashed=reads is self.reads_above)
            for name in self.problems
            for reads in (self.reads_below, self.reads_above)
            for start in reads[name]
        ]
        return graph_svg(
            self._levels(),
            arrows,
            subtitles={name: _subtitle(problem) for name, problem in self.problems.items()},
            description=str(self),
        )

    def __repr__(self) -> str:
        return f"DependencyGraph({', '.join(self.problems)})"

    def _resolve_reads(self, problem: Problem) -> tuple[str, ...]:
        for name in problem.ignored_defaults:
            if name in self.problems:
                raise GraphError(
                    f"The loss of problem {problem.name!r} has the positional argument {name}=..., "
                    f"also a problem. Put it after a * to read that problem, or rename it."
                )
        self._check_restart(problem)
        for read in problem.reads:
            if read not in self.problems:
                raise GraphError(
                    f"The loss of problem {problem.name!r} reads {read!r}, which is not a problem "
                    f"of this optimizer. {nearest(read, self.problems)} (A keyword-only argument "
                    "without a default names a problem.)"
                )
        reads = problem.reads + tuple(
            read for read in problem.optional_reads if read in self.problems
        )
        if problem.name in reads:
            raise GraphError(
                f"The loss of problem {problem.name!r} reads {problem.name!r}: a cycle of "
                "responses. Its own module is its first argument; drop the keyword."
            )
        return reads

    def _check_restart(self, problem: Problem) -> None:
        source = _source(problem)
        if source is None:
            return
        if source not in self.problems:
            raise GraphError(
                f"Problem {problem.name!r} restarts from {source!r}, which is not a problem of "
                f"this optimizer. {nearest(source, self.problems)}"
            )
        if self.position[source] <= self.position[problem.name]:
            raise GraphError(
                f"Problem {problem.name!r} restarts from {source!r}, which must be listed after "
                "it: a solution starts from a value from above."
            )

    def _check_shared_parameters(self) -> None:
        # By identity: a parameter that two modules hold is one tensor, which two optimizers move. A
        # parameter that no problem optimizes (a frozen encoder's) is a constant, which many may
        # hold.
        trainable: set[int] = set()
        for problem in self.problems.values():
            trainable.update(map(id, problem.parameters.values()))
        owner: dict[int, tuple[str, str]] = {}
        for name, problem in self.problems.items():
            for key, parameter in problem.module.named_parameters():
                other, other_key = owner.setdefault(id(parameter), (name, key))
                if other != name and id(parameter) in trainable:
                    raise GraphError(
                        f"Problems {other!r} and {name!r} share a parameter ({other}.{other_key} "
                        f"is {name}.{key}). Each trainable parameter belongs to one problem: let "
                        "the loss read the other problem instead, or freeze what is shared "
                        "(requires_grad_(False)) before the problems are declared."
                    )
        alike = sharing_memory(
            {f"{n}.{k}": t for n, p in self.problems.items() for k, t in p.parameters.items()}
        )
        if alike is not None:
            raise GraphError(
                f"The parameters {alike[0]} and {alike[1]} share memory (one's .data is the "
                "other's), so that a step of one problem moves the other's. Let the loss read the "
                "other problem instead, or give each its own memory (.data.clone())."
            )


def _as_list(problems: Sequence[Problem] | Mapping[str, Problem]) -> list[Problem]:
    """The problems in order; of a mapping (another optimizer's `problems`) its values.

    Raises:
        GraphError: if there is none, or anything but problems under their names.
    """
    if isinstance(problems, Problem):
        raise GraphError(f"Pass a list of problems; got the single {problems!r}: [problem].")
    if isinstance(problems, Mapping):
        for key, problem in problems.items():
            if isinstance(problem, Problem) and problem.name != key:
                raise GraphError(
                    f"The mapping of problems has {problem.name!r} under the key {key!r}. Losses "
                    "read a problem by its own name: pass list(problems.values()), or name it "
                    f"{key!r}."
                )
        problems = list(problems.values())
    found = list(problems)
    if not found:
        raise GraphError(
            "No problem was given. Pass the problems from the innermost to the outermost."
        )
    for problem in found:
        if not isinstance(problem, Problem):
            raise GraphError(
                f"Problems must be mlo.Problem objects, from the innermost to the outermost; got a "
                f"{type(problem).__name__}."
            )
    return found


def _movers(move: int, members: Sequence[Problem], first: bool) -> tuple[str, ...]:
    """The problems of a level that take part in one of its moves: the first ones, or the last."""
    most = max(problem.turns for problem in members)
    remaining = move if first else most - 1 - move
    return tuple(problem.name for problem in members if problem.turns > remaining)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A part of a round: updates and other blocks, one after another, and their repetitions."""

    parts: tuple[str | _Block, ...]
    times: int = 1

    def updates(self) -> Iterator[str]:
        """The names of the problems that move, one per update."""
        for _ in range(self.times):
            for part in self.parts:
                if isinstance(part, str):
                    yield part
                else:
                    yield from part.updates()

    def __str__(self) -> str:
        """For example "(pre ×20 → fine) ×20 → weights"."""
        text = " → ".join(filter(None, map(str, self.parts)))
        if self.times == 1:
            return text
        return f"({text}) ×{self.times}" if " → " in text else f"{text} ×{self.times}"


def _source(problem: Problem) -> str | None:
    """The problem from whose value this one starts, or None."""
    return None if problem.restart_from is None else problem.restart_from.partition(".")[0]


def _restart(problem: Problem) -> str:
    return "" if problem.restart_from is None else f", starts from {problem.restart_from}"


def _subtitle(problem: Problem) -> str:
    if problem.restart_from is not None:
        text = f"begins at {problem.restart_from}"
        return text if len(text) <= 22 else f"{text[:21]}…"
    if problem.is_game:
        return "game"
    return f"{problem.size:,} parameter{'s' * (problem.size != 1)}"
