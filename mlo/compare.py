"""`compare_engines`: one total gradient by several engines, at one state of a run.

Every engine computes the gradient of `MultilevelOptimizer.gradient`, at the same parameters,
batches and noise, and nothing is changed. So the optimizer's own engine gives exactly that
gradient.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mlo.check_schedule import CheckSchedule, NoChecks
from mlo.engine_checks import check_engines, check_restarts
from mlo.errors import ConfigurationError, EngineError, GraphError, ProblemError, nearest
from mlo.history import History
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.registry import EngineChoice, engines_for
from mlo.levels import Levels
from mlo.optimizer import ONE_AT_A_TIME, MultilevelOptimizer
from mlo.records import SolveReport
from mlo.solution import AbstractEngine, RecordedStep, Solution, StepEngine, Stepped
from mlo.tensors import in_precision, real_inner
from mlo.total_gradient import TotalGradient

__all__ = ["EngineComparison", "EngineRow", "compare_engines"]

Choice = EngineChoice | Mapping[str, EngineChoice]
"""What `hypergradient=` takes: one engine for all problems, or one per problem."""

ENOUGH = 1.0
"""Seconds after which the gradient of a row is not repeated for its time."""

SMALL = 1e-2
"""Relative residual up to which a row is called exact."""

HEADINGS = ("engine", "error", "cosine", "seconds", "products")


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineRow:
    """The gradient as one engine computes it.

    Attributes:
        label: of the engine.
        gradient: parameter → gradient; None if the engine does not support it.
        error: ‖g − r‖ / ‖r‖ with the reference's gradient r, over all parameters together.
        cosine: ⟨g, r⟩ / (‖g‖ ‖r‖), over the real numbers; None where one of them is zero.
        seconds: median of the processor time of one gradient (wall-clock time on a GPU).
        products: products with the Jacobians that its solves took.
        reports: of its solves.
        notes: remarks: warnings, solves that failed or were truncated, missing steps.
        failure: why the engine does not support it; empty if it does.
    """

    label: str
    gradient: dict[str, Tensor] | None = field(default=None, repr=False)
    error: float | None = None
    cosine: float | None = None
    seconds: float | None = None
    products: int | None = None
    reports: tuple[SolveReport, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text: an entry per heading, or the label and that it is not supported."""
        if self.failure:
            return self.label, "not supported"
        cosine = "-" if self.cosine is None else f"{self.cosine:.6f}"
        numbers = f"{self.error:.1e}", cosine, f"{self.seconds:.2g}", str(self.products)
        return self.label, *numbers


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EngineComparison:
    """Engines side by side; it prints as a table.

    Attributes:
        problem: whose gradient it is.
        round: number of rounds that had been made.
        reference: label of the row to which errors and cosines are relative.
        why: why it is the reference.
        rows: one per engine, in the given order.
    """

    problem: str
    round: int
    reference: str
    why: str
    rows: tuple[EngineRow, ...]

    @property
    def title(self) -> str:
        """What is compared, and with what."""
        return (
            f"Gradient of {self.problem!r} at round {self.round}; errors are relative to "
            f"{self.reference!r} ({self.why})."
        )

    def __repr__(self) -> str:
        table = [HEADINGS, *[row.cells for row in self.rows]]
        first = max(len(cells[0]) for cells in table)
        whole = [cells[1:] for cells in table if len(cells) == len(HEADINGS)]
        widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
        lines = [self.title]
        for cells in table:
            entries = [cells[0].ljust(first)]
            if len(cells) == len(HEADINGS):
                entries += [
                    text.rjust(width) for text, width in zip(cells[1:], widths, strict=True)
                ]
            else:
                entries += cells[1:]
            lines.append("  ".join(entries))
        lines += [f"{', '.join(labels)}: {note}" for note, labels in self._labels_of.items()]
        return "\n".join(lines)

    @property
    def _labels_of(self) -> dict[str, list[str]]:
        """Note → the labels of the rows that have it."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for note in filter(None, (row.failure, *row.notes)):
                found.setdefault(note, []).append(row.label)
        return found

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        from html import escape  # slow to import, for its table of entities

        body = [f"<tr>{''.join(f'<th>{heading}</th>' for heading in (*HEADINGS, 'notes'))}</tr>"]
        for row in self.rows:
            label, *rest = [escape(cell) for cell in row.cells]
            span = f' colspan="{len(HEADINGS) - 1}"' if row.failure else ""
            numbers = "".join(f"<td{span}>{cell}</td>" for cell in rest)
            notes = escape(" ".join(note for note in (row.failure, *row.notes) if note))
            name, said = [f'<td style="text-align:left">{text}</td>' for text in (label, notes)]
            body.append(f"<tr>{name}{numbers}{said}</tr>")
        return f"<table><caption>{escape(self.title)}</caption>{''.join(body)}</table>"

    def plot(self, axes: Any = None) -> Any:
        """Draws the error of each engine over its time, with matplotlib.

        Args:
            axes: where to draw; None makes a figure.

        Returns:
            The axes.
        """
        # Here, since only a picture needs it.
        from matplotlib import pyplot

        if axes is None:
            axes = pyplot.subplots(layout="constrained")[1]
        served = [row for row in self.rows if row.error is not None]
        # An error of zero has no place on a logarithmic axis: an arrow points down to it.
        finite = [row.error for row in served if row.error and math.isfinite(row.error)]
        floor = min(finite, default=1e-16) / 10
        for row in served:
            assert row.error is not None and row.seconds is not None
            marker, label = ("o", row.label) if row.error else ("v", f"{row.label} (no error)")
            axes.plot(row.seconds, row.error or floor, marker, label=label)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="relative error")
        axes.set_title(f"Gradient of {self.problem!r}, relative to {self.reference!r}")
        return axes


def compare_engines(
    optimizer: MultilevelOptimizer,
    name: str,
    engines: Sequence[Choice] | Mapping[str, Choice],
    *,
    reference: str | None = None,
    repetitions: int = 3,
    on_row: Callable[[EngineRow], object] | None = None,
) -> EngineComparison:
    """Computes one total gradient with several engines, at the optimizer's current state.

    Parameters, batches and noise are those of `optimizer.gradient(name)`, and nothing is changed.
    Engines that differentiate steps use the steps that the optimizer recorded for its own engine.
    If none is recorded, they look one step ahead, as before the first round. Their gradient is then
    taken one step later, and a note says so. `unroll` has no more steps than are recorded. So give
    the optimizer the engine that records the most of those compared. An engine with a memory
    (`soba`, `warm_start`) uses the optimizer's if it is the optimizer's own engine; otherwise it
    starts without one. `one_step` is timed without a kept graph.

    The reference is the most exact row, unless `reference` names one. A row that is not finite
    comes after all others. First come the rows that treat the fewest solutions as constant, then
    those with exact products. Of these, it is one that solves systems for the most problems, with
    the least damping and then the smallest residual; then one that differentiates the most steps,
    of all problems together. (If a lower problem is not solved, an implicit engine and one that
    differentiates steps approach different gradients; then name the reference.)

    Args:
        optimizer: the run.
        name: the problem.
        engines: choices as `hypergradient=` takes them, an engine per problem included; or a dict
            label → choice.
        reference: the label of the row to which errors are relative.
        repetitions: how often each gradient is computed to time it, after one that is not timed;
            fewer times if those take more than a second in all.
        on_row: is called with each row as it is made, for progress. Its error is not known yet.

    Raises:
        GraphError: if there is no problem of that name, or its gradient flows through no solution.
        ConfigurationError: if `engines` is no such collection, or `reference` is not in it.
        EngineError: if a choice is unknown, if no engine supports it, or if the gradient of the
            reference is not finite.
    """
    graph = optimizer.graph
    if name not in graph.problems:
        raise GraphError(f"There is no problem {name!r}. {nearest(name, graph.problems)}")
    if not graph.solutions_depending_on[name]:
        raise GraphError(
            f"The gradient of problem {name!r} flows through no solution, so it is the same with "
            "every engine. Name a problem above others."
        )
    if isinstance(repetitions, bool) or not isinstance(repetitions, int) or repetitions < 1:
        raise ConfigurationError(f"repetitions must be at least 1, got {repetitions!r}.")
    chosen = {
        label: engines_for(graph.problems, choice) for label, choice in _labelled(engines).items()
    }
    if reference is not None and reference not in chosen:
        raise ConfigurationError(f"reference is {reference!r}. {nearest(reference, chosen)}")

    for loss in optimizer._history.losses.values():
        loss.check_unedited()
    # Every row is made before any is compared, since the best of them is the measure.
    rows: dict[str, EngineRow] = {}
    for label, made in chosen.items():
        rows[label] = _row(optimizer, name, label, made, repetitions)
        if on_row is not None:
            on_row(rows[label])
    served = [label for label, row in rows.items() if not row.failure]
    if not served or (reference is not None and reference not in served):
        failures = "; ".join(
            f"{label}: {row.failure}" for label, row in rows.items() if row.failure
        )
        raise EngineError(
            f"No engine can serve as the reference for the gradient of {name!r}. {failures}"
        )
    why = "as asked"
    if reference is None:
        below = graph.solutions_depending_on[name]
        reference = min(served, key=lambda label: _inexactness(rows[label], chosen[label], below))
        why = _reason(rows[reference])
    exact = rows[reference].gradient
    assert exact is not None
    if not _is_finite(exact):
        which = "any engine" if why != "as asked" else repr(reference)
        raise EngineError(
            f"The gradient of {name!r} by {which} is not finite, so nothing can be compared with "
            "it. Look at the losses and parameters of this state, or name another reference."
        )
    return EngineComparison(
        problem=name,
        round=optimizer.round,
        reference=reference,
        why=why,
        rows=tuple([_compared(row, exact) for row in rows.values()]),
    )


# ------------------------------ one row


def _row(
    optimizer: MultilevelOptimizer,
    name: str,
    label: str,
    engines: Mapping[str, AbstractEngine],
    repetitions: int,
) -> EngineRow:
    """Takes the gradient with other engines: once to look at it, and again to time it."""
    notes: list[str] = []
    seconds: list[float] = []
    try:
        with (
            ONE_AT_A_TIME,
            warnings.catch_warnings(record=True) as said,
            _checks_restored(optimizer),
            optimizer._levels[name].unchanged(),  # recorded solutions hold the run's own memory
        ):
            warnings.simplefilter("always")
            looks_ahead = optimizer._history.looks_ahead
            check_engines(
                optimizer.graph,
                engines,
                looks_ahead=looks_ahead,
                parallel=optimizer.parallel,
                simultaneous=optimizer.order == "simultaneous",
            )
            check_restarts(
                optimizer.graph, engines, optimizer._history.starts, looks_ahead=looks_ahead
            )
            history, levels = _under(optimizer, name, engines)
            found = _ask(levels, name)
            notes += _missing_steps(history, name)
            for loss in history.losses.values():
                loss.checks = NoChecks()
            while len(seconds) < repetitions and sum(seconds) < ENOUGH:
                began = _now(optimizer)
                _ask(levels, name)
                seconds.append(_now(optimizer) - began)
    except (EngineError, ProblemError, RuntimeError) as error:
        return EngineRow(label=label, failure=" ".join(str(error).split()))
    notes += _unconverged(found.reports)
    notes += [str(warning.message) for warning in said]

    from statistics import median  # slow to import, with decimals and fractions

    return EngineRow(
        label=label,
        gradient=found.gradient,
        seconds=median(seconds),
        products=sum(report.iterations for report in found.reports),
        reports=tuple(found.reports),
        notes=tuple(dict.fromkeys(notes)),
    )


def _unconverged(reports: Sequence[SolveReport]) -> list[str]:
    """One note for each problem of which solves did not converge, and each outcome."""
    groups: dict[tuple[str, str, str], list[SolveReport]] = {}
    for report in reports:
        if not report.converged:
            groups.setdefault((report.problem, report.outcome, report.advice), []).append(report)
    notes = []
    for (problem, outcome, advice), members in groups.items():
        # In three levels the response of the lowest problem is differentiated several times.
        made = sum(report.problem == problem for report in reports)
        residual = _largest_residual(members)
        left = ""
        if residual is not None:
            largest = "up to " if len(members) > 1 else ""
            left = f" at a relative residual of {largest}{residual:.1g}"
        which = f"the solve of {problem!r}"
        if made > 1:
            which = f"{len(members)} of the {made} solves of {problem!r}"
        are = "is" if len(members) == 1 else "are"
        ending = f"{are} truncated{left}" if outcome == "truncated" else f"failed{left}. {advice}"
        notes.append(f"{which} {ending}")
    return notes


def _ask(levels: Levels, name: str) -> TotalGradient:
    """The question of `MultilevelOptimizer.gradient`."""
    with levels.unchanged():
        return levels.differentiate(name, levels.batches(name))


def _under(
    optimizer: MultilevelOptimizer, name: str, engines: Mapping[str, AbstractEngine]
) -> tuple[History, Levels]:
    """The optimizer's history as it would be seen under other engines."""
    old = optimizer._history
    history = old.with_engines(engines)
    # A row has its own note on missing steps.
    history.warned_of_no_steps |= set(optimizer.graph.problems)
    levels = Levels(history, ahead=name in old.looks_ahead)
    # From the innermost problem, since a step has read the solutions below it.
    for lower in optimizer.graph.problems:
        stepped = _last_step(old, history, levels, lower)
        if stepped is not None:
            history.stepped[lower] = stepped
            history.mark(lower)
        elif lower in history.starts and history.step_engines[lower] is not None:
            raise EngineError(
                f"No step of problem {lower!r} is recorded, which begins each round at the value "
                f"of {history.starts[lower].problem!r}. Compare after a round with an engine that "
                "records them, such as 'unroll'."
            )
    return history, levels


def _last_step(old: History, new: History, levels: Levels, name: str) -> Stepped | None:
    """The recorded steps of a problem, for another engine to differentiate; None: there are none.

    A step has read solutions, whose engines are exchanged too. The current solutions replace them
    if they still have the values that the step read, as in the last step. An earlier solution works
    only with the engines that it had.
    """
    stepped, engine = old.last_step(name), new.step_engines[name]
    if stepped is None or engine is None:
        return None
    steps: list[RecordedStep] = []
    for recorded in reversed(stepped.history[-engine.recorded_steps :]):
        solutions: dict[str, Solution] = {}
        for lower, read in recorded.evaluation.solutions.items():
            now = levels.find(lower)
            if all(torch.equal(now.value[key], value) for key, value in read.value.items()):
                solutions[lower] = now
            elif _same_engines(old, new, lower):
                solutions[lower] = read
        if len(solutions) < len(recorded.evaluation.solutions):
            break
        evaluation = replace(recorded.evaluation, solutions=solutions)
        steps.insert(0, replace(recorded, evaluation=evaluation))
    if not steps:
        return None
    return replace(
        stepped,
        engine=engine,
        evaluation=steps[-1].evaluation,
        graph=None,
        history=tuple(steps),
        start=stepped.start if len(steps) == len(stepped.history) else None,
        memory=new.memory[name],
    )


def _same_engines(old: History, new: History, name: str) -> bool:
    """Whether the solution of a problem, and those in it, have the engines that they had."""
    names = list(old.graph.problems)[: old.graph.position[name] + 1]
    return all(old.engines[lower] == new.engines[lower] for lower in names)


def _missing_steps(history: History, name: str) -> list[str]:
    """Notes on engines that had fewer recorded steps than they differentiate."""
    notes: list[str] = []
    without: list[str] = []
    if name in history.looks_ahead:  # one step ahead is what such a problem sees
        return notes
    for lower in history.graph.problems:
        engine, stepped = history.step_engines[lower], history.stepped.get(lower)
        depends = lower in history.graph.solutions_depending_on[name]
        if engine is None or not depends or history.rests(lower):
            continue
        if stepped is None:
            without.append(lower)
        elif stepped.start is None and len(stepped.history) < engine.recorded_steps:
            made = len(stepped.history)
            notes.append(f"{made} of {engine.recorded_steps} steps of {lower!r} are recorded")
    if without:
        notes.append(f"no step of {', '.join(without)} is recorded, so it is seen one step ahead")
    return notes


@contextmanager
def _checks_restored(optimizer: MultilevelOptimizer) -> Iterator[None]:
    """Lets losses be checked again in the body, for the notes, without the run's own checks."""
    losses = optimizer._history.losses.values()
    before = [(loss.checks, loss.advice) for loss in losses]
    try:
        for loss in losses:
            loss.checks = CheckSchedule()
        yield
    finally:
        for loss, (checks, advice) in zip(losses, before, strict=True):
            loss.checks, loss.advice = checks, advice


def _now(optimizer: MultilevelOptimizer) -> float:
    """Processor time; on a GPU the time at which its work is done."""
    devices = {problem.device for problem in optimizer.problems.values()}
    gpus = [device for device in devices if device.type == "cuda"]
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return time.perf_counter() if gpus else time.process_time()


# ------------------------------ the reference, and the comparison with it


def _inexactness(
    row: EngineRow, engines: Mapping[str, AbstractEngine], below: Iterable[str]
) -> tuple[float, ...]:
    """A key by which the most exact row comes first, and rows that are not finite come last.

    Args:
        row: with the reports of its solves.
        engines: problem → its engine.
        below: the problems whose solutions the gradient flows through.
    """
    dropped = [lower for lower in below if isinstance(engines[lower], FirstOrder)]
    solves: dict[str, list[SolveReport]] = {}  # a path that is not differentiated has no report
    for report in row.reports:
        solves.setdefault(report.problem, []).append(report)
    approximate = [lower for lower in solves if not engines[lower].uses_second_derivatives]
    # A row may solve one problem and differentiate steps of another.
    residuals = [_largest_residual(reports) for reports in solves.values()]
    solved = [residual for residual in residuals if residual is not None]
    damping = [float(getattr(engines[lower], "damping", 0.0)) for lower in solves]
    # (NaN in a key would make the order that of the rows.)
    finite = all(map(math.isfinite, solved)) and _is_finite(row.gradient or {})
    steps = 0
    for lower in solves:
        engine = engines[lower]
        steps += engine.recorded_steps if isinstance(engine, StepEngine) else 0
    return (
        float(not finite),
        float(len(dropped)),
        float(len(approximate)),
        -float(len(solved)),
        max(damping, default=0.0),
        max(solved, default=0.0),
        -float(steps),
    )


def _is_finite(gradient: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in gradient.values())


def _largest_residual(reports: Iterable[SolveReport]) -> float | None:
    """The largest residual of some solves, ∞ if one is no number; None: no system was solved."""
    residuals = [r.residual for r in reports if r.residual is not None]
    return max([math.inf if math.isnan(r) else r for r in residuals], default=None)


def _reason(row: EngineRow) -> str:
    largest = _largest_residual(row.reports)
    if largest is None:
        return "the most exact of these: no other solves more, or differentiates more steps"
    if largest > SMALL:
        return (
            f"no other solves more, but its largest residual is {largest:.1e}: name another one "
            "with reference="
        )
    return f"the most exact of these: its largest residual is {largest:.1e}"


def _compared(row: EngineRow, exact: Mapping[str, Tensor]) -> EngineRow:
    """The row with its error and cosine."""
    if row.gradient is None:
        return row
    g = torch.cat([in_precision(row.gradient[key], torch.float64).flatten() for key in exact])
    r = torch.cat([in_precision(tensor, torch.float64).flatten() for tensor in exact.values()])
    size, own, distance = float(r.norm()), float(g.norm()), float((g - r).norm())
    error = distance / size if size else (float("inf") if distance else 0.0)
    cosine = float(real_inner(g, r)) / (size * own) if size and own else None
    return replace(row, error=error, cosine=cosine)


# ------------------------------ labels


def _labelled(engines: Sequence[Choice] | Mapping[str, Choice]) -> dict[str, Choice]:
    """Label → choice.

    Raises:
        ConfigurationError: if it is one choice, or two have one label.
    """
    single = isinstance(engines, (str, AbstractEngine))
    if single or (isinstance(engines, Mapping) and "name" in engines):
        raise ConfigurationError(
            f"engines is the single engine {engines!r}. Pass a list of engines, or a dict label → "
            "engine."
        )
    if isinstance(engines, Mapping):
        found = dict(engines)
    else:
        found = {}
        for choice in engines:
            label = _label(choice)
            if label in found:
                raise ConfigurationError(
                    f"Two of the engines are called {label!r}. Pass a dict label → engine."
                )
            found[label] = choice
    if not found:
        raise ConfigurationError("engines is empty. Name the engines to compare.")
    return found


def _label(choice: Choice) -> str:
    """What a row is called: the name of an engine and the options that are not its defaults."""
    if isinstance(choice, str):
        return choice
    if isinstance(choice, Mapping):
        if "name" in choice:
            options = [f"{key}={value}" for key, value in choice.items() if key != "name"]
            return _call(str(choice["name"]), options)
        return ", ".join(f"{problem}: {_label(one)}" for problem, one in choice.items())
    options = []
    for option in fields(choice):
        value = getattr(choice, option.name)
        if option.name != "products" and value != option.default:  # (the label says the products)
            options.append(f"{option.name}={value}")
    return _call(choice.label, options)


def _call(name: str, options: Sequence[str]) -> str:
    return f"{name}({', '.join(options)})" if options else name
