"""The tables of a report: key figures, the engine's solves, time and memory of each problem."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from lfmcw_app.report.charts import short
from lfmcw_app.report.reading import RunData
from lfmcw_app.result_file import how_sure
from lfmcw_app.stages import TRAINING, WARMUP
from lfmcw_app.units import duration, size

__all__ = [
    "Cost",
    "Figure",
    "OtherCost",
    "Solves",
    "costs",
    "key_figures",
    "other_costs",
    "phase_seconds",
    "progress_text",
    "setting_text",
    "solves",
]

PROBLEM_NAMES = {
    "w1": "W1, weights",
    "gan": "generator and discriminator",
    "w2": "W2, weights",
    "arch": "A, architecture",
    "network": "derived network",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number at the head of the report, and what more is to be known of it."""

    key: str
    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Solves:
    """The inverse products of one lower problem in the search.

    Attributes:
        count: how many.
        residual: median and largest; None where the engine solves no system.
        failed: how many were worse than the engine is good for (a truncated one is not).
    """

    problem: str
    engine: str
    count: int
    iterations: float
    residual: tuple[float, float] | None
    failed: int


@dataclass(frozen=True, kw_only=True)
class OtherCost:
    """What other work of a phase took, beside the updates.

    Attributes:
        work: what it was.
        seconds: of all of it.
        share: of the phase's time, in %.
    """

    phase: str
    work: str
    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a problem's updates took in a phase.

    Attributes:
        seconds: of all updates.
        share: of the phase's time, in %.
        each: milliseconds per update.
        peak: memory while it was updated, in bytes; None where it was not measured.
        held: parameters, buffers and optimizer state, in bytes.
    """

    phase: str
    problem: str
    updates: int
    seconds: float
    share: float
    each: float
    peak: int | None
    held: int


def key_figures(run: RunData) -> list[Figure]:
    """The result first, then what it took."""
    figures = []

    def add(key: str, label: str, value: str, unit: str = "", note: str = "") -> None:
        figures.append(Figure(key=key, label=label, value=value, unit=unit, note=note))

    result = run.result
    if result is not None:
        add(
            "test_error",
            "test error",
            f"{result['test_error_percent']:.2f}",
            "%",
            how_sure(result, between="–"),
        )
        top5 = result.get("test_top5_error_percent")
        if top5 is not None:
            add("top5_error", "top-5 test error", f"{top5:.2f}", "%")
        if "training_error_percent" in result:
            error = f"{result['training_error_percent']:.2f}"
            add("training_error", "training error", error, "%", "of the trained network")
        if "lookup" in result:
            found = result["lookup"]
            add("regret", "regret", f"{found['regret_percent']:.2f}", "points")
            add("rank", f"rank of {found['cells']:,} cells", f"{found['rank']:,}")
        add("parameters", "parameters", _count(result["parameters"]))
        add("multiply_adds", "multiply-adds", short(result["multiply_adds_millions"]), "M")

    # A run that is not complete has taken time and memory too.
    seconds = phase_seconds(run)
    if seconds.get(WARMUP):
        add("warmup_time", "generator's warm-up", *duration(seconds[WARMUP]))
    searched = sum(s for phase, s in seconds.items() if phase not in (WARMUP, TRAINING))
    if searched:
        add("search_time", "search", *duration(searched))
    if seconds.get(TRAINING):
        add("training_time", "training", *duration(seconds[TRAINING]))
    peaks = [cost.peak for cost in costs(run) if cost.peak is not None]
    if peaks:
        whose = "of the device" if run.environment.get("gpu") else "of the whole process"
        add("peak_memory", "peak memory", *size(max(peaks)), whose)
    return figures


FIGURES = (
    "test_error",
    "top5_error",
    "training_error",
    "regret",
    "rank",
    "parameters",
    "multiply_adds",
    "warmup_time",
    "search_time",
    "training_time",
    "peak_memory",
)
"""The keys of `key_figures`, in their order."""


def phase_seconds(run: RunData) -> dict[str, float]:
    """Phase → seconds from its first round to its last, repeated rounds included."""
    found: dict[str, float] = {}
    for entry in run.timings:
        found[entry["phase"]] = found.get(entry["phase"], 0.0) + entry["seconds"]
    return found


def progress_text(run: RunData) -> str:
    """How far the run has come, in words."""
    if run.result is not None:
        return "a trial: the result says nothing" if run.recipe.trial else "complete"
    begun = [phase for phase in (run.warmup, *run.searched, run.training) if phase.entries]
    if not begun:
        return "unfinished: no round yet"
    return f"unfinished: {begun[-1].name}, round {begun[-1].entries[-1]['round']:,}"


def solves(run: RunData) -> list[Solves]:
    """How the engines' solves went, one row per problem and engine."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for stage in run.searched:
        for entry in stage.entries:
            for problem, report in entry.get("solves", {}).items():
                found.setdefault((problem, report["engine"]), []).append(report)
    rows = []
    for (problem, engine), reports in found.items():
        residuals = [report["residual"] for report in reports if report["residual"] is not None]
        rows.append(
            Solves(
                problem=problem,
                engine=engine,
                count=len(reports),
                iterations=statistics.fmean(report["iterations"] for report in reports),
                residual=(statistics.median(residuals), max(residuals)) if residuals else None,
                failed=sum(_failed(report) for report in reports),
            )
        )
    return rows


def _failed(report: dict[str, Any]) -> bool:
    """Whether a solve failed; entries of older runs say only whether it converged."""
    return bool(report.get("failed", not report.get("converged", True)))


def costs(run: RunData) -> list[Cost]:
    """What each problem's updates took, one row per phase and problem."""
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in run.timings:
        for problem, values in entry["problems"].items():
            taken.setdefault((entry["phase"], problem), []).append(values)
    total = phase_seconds(run)
    rows = []
    for (phase, problem), values in taken.items():
        seconds, updates = sum(v["seconds"] for v in values), sum(v["updates"] for v in values)
        peaks = [v["peak_bytes"] for v in values if v["peak_bytes"] is not None]
        rows.append(
            Cost(
                phase=phase,
                problem=problem,
                updates=updates,
                seconds=seconds,
                share=100.0 * seconds / total[phase] if total[phase] else 0.0,
                each=1000.0 * seconds / max(1, updates),
                peak=max(peaks) if peaks else None,
                held=values[-1]["held_bytes"],
            )
        )
    return rows


def other_costs(run: RunData) -> list[OtherCost]:
    """What is measured beside the updates, and what is left of each phase's time.

    Runs of earlier versions measured nothing beside, so all of it is left.
    """
    taken: dict[str, float] = {}
    beside: dict[tuple[str, str], float] = {}
    for entry in run.timings:
        phase = entry["phase"]
        for values in entry["problems"].values():
            taken[phase] = taken.get(phase, 0.0) + values["seconds"]
        for work, seconds in entry.get("beside", {}).items():
            beside[phase, work] = beside.get((phase, work), 0.0) + seconds
            taken[phase] = taken.get(phase, 0.0) + seconds
    rows = []
    for phase, total in phase_seconds(run).items():
        parts = {work: seconds for (of, work), seconds in beside.items() if of == phase}
        parts[LEFT] = max(0.0, total - taken.get(phase, 0.0))
        for work, seconds in parts.items():
            share = 100.0 * seconds / total if total else 0.0
            rows.append(OtherCost(phase=phase, work=work, seconds=seconds, share=share))
    return rows


LEFT = "data, logging and checkpoints"
"""What the rest of a phase's time goes into."""


def _count(number: int) -> str:
    if number >= 1_000_000:
        return f"{number / 1e6:.2f} M"
    return f"{number:,}" if number < 10_000 else short(number)


def setting_text(value: Any) -> str:
    """A setting as a recipe has it, on one line: true, null, a name, or parts with their names."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {setting_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(setting_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The environment as names and values; command and recipe have places of their own.

    What has parts has a row for each of them. Parts without a value are left out.
    """
    rest = {
        key.replace("_", " "): value
        for key, value in environment.items()
        if key not in ("command", "recipe")
    }
    return _rows_of("", rest)


def _rows_of(name: str, value: Any) -> list[tuple[str, str]]:
    """The rows of a value, with parts in parts."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [
            row
            for key, part in value.items()
            for row in _rows_of(f"{name}, {key}" if name else str(key), part)
        ]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return [(name, str(value))]
