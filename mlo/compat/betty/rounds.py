"""Betty's order of steps, as rounds of `MultilevelOptimizer`.

In Betty all leaves step once per iteration. A problem above steps when every problem directly below
it has ended a cycle since its own last step. A cycle is `unroll_steps` steps, each of
`gradient_accumulation` counts: batches of a leaf, solves of a problem above. While a problem's
count is at most its `warmup_steps`, the ends of its cycles go unnoticed.

Let time count iterations. A leaf counts at every one. A problem above counts as often as the child
with the longest cycle ends one, so

    interval = 1 for a leaf, otherwise the longest cycle below;   cycle = unroll · accumulate ·
    interval.

`MultilevelOptimizer` repeats one round of updates: level by level, each problem `steps` times per
update of the level above (`DependencyGraph.schedule`). So `plan` derives `steps` from the
intervals, follows Betty's rules until all warm-ups are over and for two more rounds, and compares.
A program whose order is not one repeated round is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlo.errors import ConfigurationError

__all__ = ["Member", "Plan", "betty_order", "plan"]

LONGEST_WARM_UP = 10_000_000
"""Iterations after which a problem that has not stepped is given up."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What the order of steps depends on, for one problem.

    Attributes:
        name: of the problem.
        children: the problems directly below.
        parents: the problems directly above, in the order in which they are called.
        unroll: steps of a cycle.
        accumulate: counts of a step.
        warmup: count up to which the problems above wait.
        level: of the problem in the graph; 0 is the lowest.
    """

    name: str
    children: tuple[str, ...]
    parents: tuple[str, ...]
    unroll: int = 1
    accumulate: int = 1
    warmup: int = 0
    level: int = 0

    @property
    def counts(self) -> int:
        """Counts of a cycle."""
        return self.unroll * self.accumulate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rounds are declared.

    Attributes:
        steps: problem → its `steps`.
        warmup_rounds: problem → its `warmup_steps`, in rounds.
        iterations: Betty's iterations per round.
    """

    steps: dict[str, int]
    warmup_rounds: dict[str, int]
    iterations: int


def plan(
    members: Sequence[Member],
    schedule: Callable[[Mapping[str, int]], Sequence[str]],
    reads: Mapping[str, Sequence[str]],
) -> Plan:
    """Finds the rounds in which problems move as in Betty.

    Args:
        members: the problems, in the order in which Betty has them.
        schedule: steps of each problem → the updates of one round.
        reads: problem → those that its loss reads. The order of two problems matters where one
            reads the other.

    Raises:
        ConfigurationError: if Betty's order is not one repeated round.
    """
    intervals = _intervals(members)
    iterations = max(intervals.values())
    steps = _steps(members, intervals, iterations)
    round_ = tuple(schedule(steps))

    made, begun = _played(members, iterations)
    # The user's loop steps the leaves, so their order must be exactly Betty's.
    leaves = [member.name for member in members if not member.children]
    apart = [{name, read} for name, others in reads.items() for read in others]
    for number, names in enumerate(made):
        expected = [name for name in round_ if begun[name] <= number]
        if not _same_order(names, expected, [set(leaves), *apart]):
            raise ConfigurationError(_refusal(members, intervals, names, expected, number))
    return Plan(steps=steps, warmup_rounds=begun, iterations=iterations)


def _played(members: Sequence[Member], iterations: int) -> tuple[list[list[str]], dict[str, int]]:
    """Betty's steps in every round until all problems have begun, and in two more rounds.

    Also problem → the round in which it begins.
    """
    order = betty_order(members)
    begun: dict[str, int] = {}
    made: list[list[str]] = []
    while len(begun) < len(members) or len(made) < max(begun.values()) + 2:
        if len(made) * iterations > LONGEST_WARM_UP:
            waiting = [member.name for member in members if member.name not in begun]
            raise ConfigurationError(
                f"The problems {waiting} would not step in {LONGEST_WARM_UP:,} iterations: the "
                "warmup_steps of those below are too many, or no problem below is in 'l2u'."
            )
        names = [name for _ in range(iterations) for name in next(order)]
        for name in names:
            begun.setdefault(name, len(made))
        made.append(names)
    return made, begun


def betty_order(members: Sequence[Member]) -> Iterator[list[str]]:
    """Follows Betty's rules; yields the optimizer steps of each iteration.

    (A problem above a leaf is listed at each of its counts, of which only every `accumulate`-th
    moves it: an update of `MultilevelOptimizer` either way.)
    """
    of = {member.name: member for member in members}
    counts = dict.fromkeys(of, 0)
    ready: dict[str, set[str]] = {name: set() for name in of}

    def step(member: Member, made: list[str]) -> None:
        counts[member.name] += 1
        if member.children or counts[member.name] % member.accumulate == 0:
            made.append(member.name)
        if counts[member.name] % member.counts == 0 and counts[member.name] > member.warmup:
            for parent in member.parents:
                ready[parent].add(member.name)
                if len(ready[parent]) == len(of[parent].children):
                    step(of[parent], made)
                    ready[parent].clear()

    while True:
        made: list[str] = []
        for member in members:
            if not member.children:
                step(member, made)
        yield made


def _intervals(members: Sequence[Member]) -> dict[str, int]:
    """Problem → iterations between two of its updates."""
    of = {member.name: member for member in members}
    cycles: dict[str, int] = {}
    intervals: dict[str, int] = {}
    # From the leaves upwards; every level lies above those of its children.
    for member in sorted(members, key=lambda member: member.level):
        if member.children:
            intervals[member.name] = max(cycles[child] for child in member.children)
            cycles[member.name] = member.counts * intervals[member.name]
        else:
            intervals[member.name] = member.accumulate
            cycles[member.name] = member.counts
    assert len(of) == len(intervals)
    return intervals


def _steps(
    members: Sequence[Member], intervals: Mapping[str, int], iterations: int
) -> dict[str, int]:
    """Problem → updates per update of the most frequent problem on the level above."""
    # As `DependencyGraph.schedule` reads `steps`. If a division leaves a remainder, the resulting
    # order is not Betty's, which is noticed there.
    levels = sorted({member.level for member in members}, reverse=True)
    steps: dict[str, int] = {}
    above = iterations
    for level in levels:
        here = [member.name for member in members if member.level == level]
        for name in here:
            steps[name] = max(1, above // intervals[name])
        above = min(intervals[name] for name in here)
    return steps


def _same_order(one: Sequence[str], other: Sequence[str], groups: Sequence[set[str]]) -> bool:
    """Whether two orders have the same problems, and those of each group in the same order."""
    if sorted(one) != sorted(other):
        return False
    for group in groups:
        if [name for name in one if name in group] != [name for name in other if name in group]:
            return False
    return True


def _refusal(
    members: Sequence[Member],
    intervals: Mapping[str, int],
    names: Sequence[str],
    expected: Sequence[str],
    number: int,
) -> str:
    cycles = ", ".join(
        f"{m.name}: a step per {intervals[m.name]} iterations, {m.counts} counts per cycle"
        + (f", {m.warmup} of warm-up" if m.warmup else "")
        for m in members
    )
    return (
        f"The problems' cycles do not fit into one round that repeats ({cycles}). In round "
        f"{number + 1} Betty's order would be {_shown(names)}, and rounds here make "
        f"{_shown(expected)}. Choose unroll_steps, gradient_accumulation and warmup_steps so that "
        "each cycle above is a whole number of those below, and warm-ups are whole rounds."
    )


def _shown(names: Sequence[str]) -> str:
    shown = " → ".join(names[:12])
    return f"{shown} → …" if len(names) > 12 else shown
