"""The blocks and the figure of docs/benchmarks.md that are made from docs/data/benchmarks.

The files are written by the benchmarks themselves (`--csv`, see measuring.py). A ratio is the time
of mlo's side over that of the other one, so less than 1 is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import PROVENANCE, Ratio, two_digits
from results_data import Results
from results_markdown import NOTHING, digest, save_figure, table

FOLDER = "benchmarks"

TITLES = {
    "logistic": "logistic regression", "reweighting": "reweighting", "diamond": "diamond",
    "layered-2": "4 paths", "layered-4": "16 paths", "layered-6": "64 paths",
    "layered-8": "256 paths", "layered-10": "1,024 paths",
}  # fmt: skip
"""Problem of engines.csv → what it is; those of the solutions have their own names."""

NETWORKS = {"small": "970 parameters", "perceptron": "1.0 M parameters"}
"""Network of overhead.csv → its size, for the networks that the first table has."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One measured pair: ours and another program of the same method.

    Attributes:
        against: the group that it belongs to.
        what: problem and method.
        ratio: ours over theirs.
    """

    against: str
    what: str
    ratio: Ratio


def rows_of(results: Results, name: str) -> list[dict[str, str]]:
    """The rows of a file of measurements; none where it has not been measured."""
    return results.rows_of(f"{FOLDER}/{name}.csv")


def ratio_of(row: dict[str, str]) -> Ratio | None:
    """The ratio of a row; one without quartiles has its median for them."""
    if not row["ratio"]:
        return None
    median = float(row["ratio"])
    return Ratio(
        median=median,
        low=float(row["ratio_low"] or median),
        high=float(row["ratio_high"] or median),
    )


def said(row: dict[str, str]) -> str:
    """The ratio of a row in words: what was not measured has its reason, or nothing."""
    ratio = ratio_of(row)
    if ratio is None:
        return row.get("failed", "")
    return str(ratio)


def compared(results: Results) -> dict[str, list[Compared]]:
    """Peer or loop → the pairs, the smallest ratio first; groups by their medians."""
    pairs = []
    for row in rows_of(results, "engines"):
        ratio = ratio_of(row)
        if ratio is None or row["library"] == "mlo":
            continue
        compiled = ""
        if row["library"] == "JAXopt":
            compiled = ", compiled" if row["method"].endswith(", jit") else ", not compiled"
        what = f"{TITLES.get(row['problem'], row['problem'])}, {row['method']}"
        pairs.append(Compared(against=f"{row['library']}{compiled}", what=what, ratio=ratio))
    for row in rows_of(results, "overhead"):
        ratio = ratio_of(row)
        if ratio is not None and row["network"] in NETWORKS and row["batch"] == "128":
            group = f"the hand-written loop, {NETWORKS[row['network']]}"
            what = f"{row['problem']}, {row['engine']}"
            pairs.append(Compared(against=group, what=what, ratio=ratio))
    groups: dict[str, list[Compared]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.ratio.median):
        groups.setdefault(pair.against, []).append(pair)
    return dict(sorted(groups.items(), key=lambda item: middle(item[1])))


def middle(pairs: Sequence[Compared]) -> float:
    """The median of the ratios."""
    return statistics.median(pair.ratio.median for pair in pairs)


# ------------------------------ the first table and the figure


def peers(results: Results) -> str:
    """Ours against each peer and against the hand-written loop, best to worst."""
    rows = []
    for against, pairs in compared(results).items():
        faster = sum(pair.ratio.median <= 1.0 for pair in pairs)
        best, worst = pairs[0], pairs[-1]
        rows.append(
            (
                against, f"{faster} of {len(pairs)}", f"{best.ratio}: {best.what}",
                two_digits(middle(pairs)), f"{worst.ratio}: {worst.what}",
            )
        )  # fmt: skip
    return table(("mlo against", "at most 1", "best", "median", "worst"), rows)


def figure(results: Results) -> str:
    """The figure of all ratios."""
    count = sum(map(len, compared(results).values()))
    if not count:
        return NOTHING
    return f"![{count} ratios of mlo's time to that of other programs](benchmarks.svg)"


def ratios_digest(results: Results) -> str:
    """Names what the figure shows."""
    return digest(compared(results).items())


def draw_ratios(results: Results, path: Path) -> None:
    """Draws every ratio with its quartiles, a line of dots for each peer."""
    groups = compared(results)
    drawn = Figure(figsize=(11, 1.2 + 0.5 * len(groups)), layout="constrained")
    axes = drawn.subplots()
    for place, pairs in enumerate(groups.values()):
        draw_group(axes, place, pairs)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(groups)), list(groups), fontsize=9)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.spines[["right", "top"]].set_visible(False)
    axes.set_xlabel("time of mlo ÷ time of the other program, with quartiles: left of 1 is faster")
    save_figure(drawn, path, ratios_digest(results))


def draw_group(axes: Axes, place: int, pairs: Sequence[Compared]) -> None:
    """Draws the dots of one peer, spread over the height of its line by their order."""
    for index, pair in enumerate(pairs):
        height = place - 0.3 + 0.6 * (index + 0.5) / len(pairs)
        colour = "#1a7f37" if pair.ratio.median <= 1.0 else "#c0392b"
        axes.plot([pair.ratio.low, pair.ratio.high], [height, height], color=colour, lw=1)
        axes.plot([pair.ratio.median], [height], "o", color=colour, markersize=3.5)


# ------------------------------ one question each


def engines(results: Results) -> str:
    """Time of a step, and its ratio to that of each peer, by problem and method."""
    flat = [problem for problem in TITLES if not problem.startswith("layered")]
    entries = [row for row in rows_of(results, "engines") if row["problem"] in flat]
    peers = [name for name in dict.fromkeys(row["library"] for row in entries) if name != "mlo"]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in entries:
        place = lines.setdefault((row["problem"], row["method"]), {})
        place[row["library"]] = row["ms"] if row["library"] == "mlo" else said(row)
    rows = []
    for (problem, method), cells in lines.items():
        if method != "-":
            shown = [cells.get(name, "") for name in ("mlo", *peers)]
            rows.append((TITLES[problem], method, *shown))
    return table(("problem", "method", "mlo, ms", *(f"÷ {peer}" for peer in peers)), rows)


def errors(results: Results) -> str:
    """Errors of the gradients on the problems that all libraries have."""
    rows = [
        (
            TITLES[row["problem"]], row["library"], row["method"], row["error"],
            row["error_one_step"], row["memory_mb"], row["losses"], row["passes"],
        )
        for row in rows_of(results, "engines")
        if row["problem"] in ("logistic", "diamond") and row["error"]
    ]  # fmt: skip
    head = (
        "problem", "library", "method", "error", "error (1 step)", "MB", "losses", "passes",
    )  # fmt: skip
    return table(head, rows)


def layers(results: Results) -> str:
    """Time of a step by the number of paths through layers."""
    entries = [row for row in rows_of(results, "engines") if row["problem"].startswith("layered")]
    columns = list(dict.fromkeys(row["problem"] for row in entries))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in entries:
        if row["method"] != "-":
            cell = row["ms"] or row["failed"]
            lines.setdefault((row["library"], row["method"]), {})[row["problem"]] = cell
    rows = [(*key, *(cells.get(name, "") for name in columns)) for key, cells in lines.items()]
    return table(("library", "method", *(TITLES[name] for name in columns)), rows)


def solutions(results: Results) -> str:
    """Solutions of other solvers."""
    rows = [
        (row["problem"], row["library"], row["method"], row["error"], row["ms"], said(row))
        for row in rows_of(results, "engines")
        if row["problem"] not in TITLES
    ]
    return table(("problem", "library", "solver", "error", "ms", "mlo ÷ it"), rows)


def overhead(results: Results) -> str:
    """Rounds beside the same hand-written loop."""
    rows = [
        (
            row["network"], f"{int(row['parameters']):,}", row["batch"], row["problem"],
            row["engine"], row["by_hand_ms"], row["mlo_ms"], said(row), row["noise"],
        )
        for row in rows_of(results, "overhead")
    ]  # fmt: skip
    head = (
        "network", "parameters", "batch", "problem", "engine", "by hand, ms", "mlo, ms",
        "÷ by hand", "noise",
    )  # fmt: skip
    return table(head, rows)


def search_steps(results: Results) -> str:
    """Passes and steps beside the original operations."""
    rows = []
    for row in rows_of(results, "search_step"):
        memory = f"{row['memory_mb']}, original {row['original_memory_mb']}"
        through = f"{row['forward']}, {row['backward']}" if row["forward"] else ""
        where = f"{row['size']}, batch {row['batch']}"
        rows.append((where, row["what"], row["ms"], row["original_ms"], said(row), through, memory))
    head = (
        "size", "pass or step", "ms", "original, ms", "÷ original", "forward, backward", "peak MB",
    )  # fmt: skip
    return table(head, rows)


def before_after(results: Results) -> str:
    """The same work in an older revision and here."""
    rows = [
        (
            row["part"], row["what"], row["unit"], row["before"], row["after"], said(row),
            row["revision"],
        )
        for row in rows_of(results, "before_after")
    ]  # fmt: skip
    head = ("part", "what", "unit", "before", "after", "after ÷ before", "revision before")
    return table(head, rows)


def chain(results: Results) -> str:
    """Operators of a step by the length of a chain."""
    entries = rows_of(results, "chain")
    columns = list(dict.fromkeys(row["problems"] for row in entries))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in entries:
        cells = lines.setdefault((row["engine"], row["reads"]), {})
        cells[row["problems"]] = row["operators"]
    rows = [(*key, *(cells.get(name, "") for name in columns)) for key, cells in lines.items()]
    return table(("engine", "reads", *(f"{name} problems" for name in columns)), rows)


def stochastic(results: Results) -> str:
    """Stochastic methods at equal oracle calls: the best value of each grid."""
    entries = rows_of(results, "stochastic")
    columns = list(dict.fromkeys(row["task"] for row in entries))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in entries:
        second = f" ({100 * float(row['second']):.1f}%)" if row["second"] else ""
        cell = f"{row['value']}{second}; {row['step']}, {row['ratio']}"
        lines.setdefault((row["by"], row["method"]), {})[row["task"]] = cell
    rows = [(*key, *(cells.get(name, "") for name in columns)) for key, cells in lines.items()]
    return table(("by", "method", *columns), rows)


def imports(results: Results) -> str:
    """Imports beside that of torch."""
    rows = [(row["what"], row["seconds"], said(row)) for row in rows_of(results, "import_times")]
    return table(("command", "s", "÷ import torch"), rows)


def fused_loss(results: Results) -> str:
    """The fused class-weighted loss beside PyTorch's composition."""
    rows = [
        (row["size"], row["phase"], row["composition_us"], row["fused_us"], said(row))
        for row in rows_of(results, "fused_loss")
    ]
    return table(("B × C", "phase", "composition, µs", "fused, µs", "fused ÷ composition"), rows)


def plain(name: str) -> Callable[[Results], str]:
    """A block that shows a file as it is, but for how it was made."""

    def made(results: Results) -> str:
        entries = rows_of(results, name)
        head = [column for column in (entries[0] if entries else {}) if column not in PROVENANCE]
        return table(head, [[entry[column] for column in head] for entry in entries])

    return made


def measurements(results: Results) -> str:
    """How the files were made: a row for each command."""
    rows = []
    for path in sorted((results.folder / FOLDER).glob("*.csv")):
        loads: dict[tuple[str, ...], list[str]] = {}
        for row in rows_of(results, path.stem):
            made = tuple(row[key] for key in PROVENANCE if key != "load")
            loads.setdefault(made, []).append(row["load"])
        for (command, machine, *others), found in loads.items():
            known = sorted(filter(None, found), key=float)
            load = "–".join(dict.fromkeys(known[:1] + known[-1:]))
            link = f"[{path.name}](data/{FOLDER}/{path.name})"
            rows.append((link, f"`{command}`", machine, load, *others))
    return table(("file", "command", "machine", "load", "date", "commit", "versions"), rows)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "peers": peers,
    "ratios": figure,
    "engines": engines,
    "errors of engines": errors,
    "layers": layers,
    "solutions": solutions,
    "overhead": overhead,
    "search steps": search_steps,
    "before and after": before_after,
    "chain": chain,
    "stochastic": stochastic,
    "imports": imports,
    "fused loss": fused_loss,
    "reading ahead": plain("reading_ahead"),
    "measurements": measurements,
}
"""Name in the page's markers → what makes the block."""
