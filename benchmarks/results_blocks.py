"""The blocks of the pages of results and of benchmarks, made from the files in docs/data.

Each function takes all results and returns Markdown. A block says what has not been run, and never
fills it in. The verdicts are those of `lfmcw_app.comparison`: one rule for all tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby

import results_answer
import results_benchmarks
import results_classes
import results_ends
import results_further
import results_power
import results_status
from measuring import PROVENANCE
from results_cells import cell_lines
from results_data import (
    BASELINE,
    BOTH,
    CELLS,
    LONGER,
    METHOD,
    RANDOM,
    SYNTHETIC,
    SYNTHETIC_ONLY,
    UNIFORM,
    Effect,
    Results,
    mean,
)  # fmt: skip
from results_effects import ISOLATING, chosen, is_hard, is_oracle, is_plain, points
from results_markdown import NOTHING, folded, table
from scipy.stats import linregress, spearmanr

from lfmcw_app.arms import contrasts
from lfmcw_app.paired_tests import POWER
from lfmcw_app.results_file import Row

WITHOUT_WEIGHTS = (*ISOLATING, (UNIFORM, BASELINE))
"""These, and what the images do without class weights."""


# ------------------------------ Markdown


def effects_table(results: Results, effects: Sequence[Effect]) -> str:
    """A row for each comparison."""
    titles = results.titles(effect.design for effect in effects)
    head = (
        "experiment", "difference", "seeds", f"seen in {POWER:.0%}", "points (95% interval)",
        "% of the error", "p", "p (Holm)", "verdict",
    )  # fmt: skip
    rows = []
    for effect in effects:
        found = effect.found
        seen = "" if math.isinf(found.detectable) else f"{found.detectable:.2f}"
        rows.append(
            (
                titles[effect.design], f"{effect.arm} minus {effect.against}", found.seeds_text,
                seen, points(effect), f"{effect.relative:+.1f}", f"{found.p_value:.2g}",
                f"{effect.p_value:.2g}", effect.verdict,
            )
        )  # fmt: skip
    return table(head, rows)


def pivot(results: Results, name: str, *, row: Sequence[str], column: str, value: str) -> str:
    """A small file as a table: the values of one column side by side, repeated ones in a cell."""
    entries = results.rows_of(name)
    columns = list(dict.fromkeys(entry[column] for entry in entries))
    cells: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for entry in entries:
        key = tuple(entry[part] for part in row)
        cells.setdefault(key, {}).setdefault(entry[column], []).append(entry[value])
    rows = [
        (*key, *(", ".join(found.get(name, [])) for name in columns))
        for key, found in cells.items()
    ]
    return table([*row, *columns], rows)


def verbatim(results: Results, name: str) -> str:
    """A small file as it is."""
    entries = results.rows_of(name)
    head = list(entries[0]) if entries else []
    return table(head, [list(entry.values()) for entry in entries])


def exactness(results: Results) -> str:
    """How exact each engine is, and how that was measured."""
    entries = results.rows_of("exactness.csv")
    columns = ("engine", "options", "compared with", "cases", "relative error")
    rows = [[f"`{entry['engine']}`", *(entry[key] for key in columns[1:])] for entry in entries]
    made = {tuple(entry[key] for key in PROVENANCE if key != "load") for entry in entries}
    lines = [
        f"Measured by `{command}` on {machine}, {date}, at commit {commit}, with {versions}."
        for command, machine, date, commit, versions in sorted(made)
    ]
    return table(columns, rows) + "\n\n" + "\n".join(lines)


# ------------------------------ the questions


def plain_search(results: Results) -> str:
    """LFM-CW beside search without it, at equal rounds and at equal time."""
    return effects_table(results, chosen(results, [(METHOD, BASELINE), (METHOD, LONGER)], is_plain))


def class_weights_question(results: Results) -> str:
    """LFM-CW beside itself without class weights, and without generated images."""
    return effects_table(results, chosen(results, WITHOUT_WEIGHTS, is_plain))


def oracle(results: Results) -> str:
    """The same with real images in the place of generated ones."""
    return effects_table(
        results, chosen(results, [(METHOD, BASELINE), *WITHOUT_WEIGHTS], is_oracle)
    )


def hard(results: Results) -> str:
    """The same where a class is hard, or classes are unequal."""
    return effects_table(results, chosen(results, [(METHOD, BASELINE), *WITHOUT_WEIGHTS], is_hard))


def random_cells(results: Results) -> str:
    """Cells that were searched beside those that were drawn."""
    return effects_table(
        results, chosen(results, [(BASELINE, RANDOM), (METHOD, RANDOM)], lambda _: True)
    )


def ablations(results: Results) -> str:
    """What the paper varies: images of W2, generator, λ."""
    pairs = [(BOTH, SYNTHETIC), (SYNTHETIC_ONLY, BASELINE)]
    for name in ("table5", "fig3"):
        pairs += contrasts(name)
    return effects_table(results, chosen(results, pairs, lambda _: True))


def quality(results: Results) -> str:
    """What is known of the generators of the searches."""
    rows = []
    for title, experiment in (*results.trained(), *results.looked_up()):
        for arm in experiment.arms:
            known = [row for row in experiment.runs(arm) if row.gan_test_percent is not None]
            if known:
                figures = (
                    mean(row.gan_test_percent for row in known),
                    mean(row.gan_train_percent for row in known),
                )
                shown = ["" if math.isnan(figure) else f"{figure:.1f}" for figure in figures]
                variety = mean(row.variety for row in known)
                shown.append("" if math.isnan(variety) else f"{variety:.2f}")
                rows.append((title, arm, len(known), *shown))
    head = ("experiment", "arm", "runs", "GAN-test, %", "GAN-train, %", "variety")
    return table(head, rows)


def ranks(results: Results) -> str:
    """Where the cells of looked-up searches stand in the table of all cells."""
    rows = []
    for title, experiment in results.looked_up():
        for arm in experiment.arms:
            runs = experiment.runs(arm)
            regrets = [row.regret_percent for row in runs if row.regret_percent is not None]
            places = [row.rank for row in runs if row.rank is not None]
            spread = f" ± {statistics.stdev(regrets):.2f}" if len(regrets) > 1 else ""
            within = sum(place <= 10 for place in places)
            rows.append(
                (
                    title, arm, len(runs),
                    f"{statistics.fmean(regrets):.2f}{spread}",
                    f"{statistics.median(places):g} ({min(places)} to {max(places)})",
                    f"{within} of {len(places)}",
                    f"{mean(row.parameters for row in runs):,.0f}",
                    _median_seconds(runs),
                )
            )  # fmt: skip
    head = (
        "experiment", "arm", "searches", "regret, points (mean ± SD)", "rank (median, range)",
        "among the ten best cells (copies of a network count)", "parameters (mean)",
        "search, seconds (median)",
    )  # fmt: skip
    return folded("Every arm of every experiment", table(head, rows))


def _median_seconds(runs: Sequence[Row]) -> str:
    """How long the searches took; empty for random cells, which are not searched."""
    known = [row.search_seconds for row in runs if row.search_seconds is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def trained_arms(results: Results) -> str:
    """Errors, sizes and times of searches whose networks were trained, and size as a confounder."""
    rows = []
    for title, experiment in results.trained():
        first = experiment.runs(experiment.arms[0])
        for arm in experiment.arms:
            runs = experiment.runs(arm)
            errors = [row.test_error_percent for row in runs]
            within, _ = _size_and_error([row.parameters for row in runs], errors)
            over_pairs, at_equal_size = _size_and_error(*_differences(first, runs))
            rows.append(
                (
                    title, arm, len(runs),
                    _spread(errors, ".2f"),
                    _spread([row.parameters for row in runs], ",.0f"),
                    within, over_pairs, at_equal_size,
                    _minutes([row.search_seconds for row in runs]),
                    _minutes([row.training_seconds for row in runs]),
                )
            )  # fmt: skip
    head = (
        "experiment", "arm", "runs", "test error, % (mean ± SD)", "parameters (mean ± SD)",
        "size and error, within the arm", "size and error, over the pairs",
        "minus the first arm at equal size, points (± SE)", "search, minutes", "training, minutes",
    )  # fmt: skip
    return table(head, rows) if rows else NOTHING


def _minutes(seconds: Sequence[float | None]) -> str:
    """The mean of what is known, in minutes; empty where nothing is, as for a random cell."""
    found = mean(seconds) / 60
    return "" if math.isnan(found) else f"{found:.1f}"


def _spread(values: Sequence[float | None], form: str) -> str:
    """Mean ± standard deviation of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{form}}{spread}"


def _differences(
    first: Sequence[Row], second: Sequence[Row]
) -> tuple[list[int | None], list[float]]:
    """How much the second arm differs from the first in parameters and in error, by pairs."""
    others = {row.seed: row for row in first}
    pairs = [(row, others[row.seed]) for row in second if row.seed in others]
    sizes = [
        None if row.parameters is None or other.parameters is None
        else row.parameters - other.parameters
        for row, other in pairs
    ]  # fmt: skip
    return sizes, [row.test_error_percent - other.test_error_percent for row, other in pairs]


def _size_and_error(sizes: Sequence[int | None], errors: Sequence[float]) -> tuple[str, str]:
    """How parameters and error go together, over runs or over differences of pairs.

    Returns:
        Their rank correlation; and the error at size 0 on a straight line through them, with its
        standard error. Empty with fewer than ten, if a size is not known, or if all are alike.
    """
    if len(sizes) < 10 or None in sizes or len(set(sizes)) == 1 or len(set(errors)) == 1:
        return "", ""
    line = linregress(sizes, errors)
    correlation = float(spearmanr(sizes, errors).statistic)
    return f"{correlation:+.2f}", f"{line.intercept:+.2f} ± {line.intercept_stderr:.2f}"


def rank_differences(results: Results) -> str:
    """The planned comparisons of looked-up searches by the ranks of their cells."""
    rows = []
    for title, experiment in results.looked_up():
        for found in experiment.findings_by_rank:
            of = found.comparison
            rows.append(
                (
                    title, f"{found.arm} minus {found.against}",
                    of.seeds_text,
                    "" if math.isinf(of.detectable) else f"{of.detectable:.1f}",
                    of.describe(1), f"{found.p_value:.2g}", found.verdict,
                )
            )  # fmt: skip
    head = (
        "experiment", "difference", "seeds", f"seen in {POWER:.0%}", "places (95% interval)",
        "p (Holm)", "verdict",
    )  # fmt: skip
    return folded("Every comparison by rank", table(head, rows))


def cells(results: Results) -> str:
    """The table of all cells of the small space."""
    if results.cells is None:
        return NOTHING
    found = table(
        ("", "cell", "cells", "test error, %", "by seed", "parameters"), cell_lines(results.cells)
    )
    return f"{found}\n\n![errors of all cells, and where searches end](results_cells.svg)\n\n" + (
        f"[The table](data/{CELLS})."
    )


# ------------------------------ machines, sources, the appendix


def machines(results: Results) -> str:
    """Comparisons that were made on several machines."""
    found: dict[tuple[object, ...], list[Effect]] = {}
    for pair in ((METHOD, BASELINE), *ISOLATING, (RANDOM, METHOD)):
        for effect in results.effects(*pair):
            d = effect.design
            of = (d.dataset, d.preset, d.space, d.order, d.generator, d.condition, d.settings)
            found.setdefault((*of, *pair), []).append(effect)
    rows = []
    for effects in found.values():
        if len({effect.design.device for effect in effects}) < 2:
            continue
        signs = {math.copysign(1, effect.found.difference) for effect in effects}
        agree = "the sign agrees" if len(signs) == 1 else "**the sign differs**"
        rows += [
            (
                e.design.title, f"{e.arm} minus {e.against}", e.design.device, e.design.date,
                e.found.seeds_text, points(e), agree,
            )
            for e in effects
        ]  # fmt: skip
    head = ("experiment", "difference", "machine", "date", "seeds", "points (95% interval)", "")
    return table(head, rows)


def sources(results: Results) -> str:
    """What the figures come from: a row for each file of runs."""
    rows = []
    for experiment in results.experiments:
        design = experiment.design
        seeds = sorted({row.seed for row in experiment.rows})
        commits = ", ".join(sorted({short_commit(r.commit) for r in experiment.rows if r.commit}))
        settings = " ".join(f"`{setting}`" for setting in design.distinguishing)
        rows.append(
            (
                f"[{design.source}](data/runs/{design.source})", design.title, design.table,
                len(experiment.rows), f"{min(seeds)} to {max(seeds)}", settings, design.device,
                design.date, commits,
            )
        )  # fmt: skip
    head = ("file", "experiment", "table", "runs", "seeds", "settings", "machine", "date", "commit")
    return folded("Every file of runs", table(head, rows))


def short_commit(commit: str) -> str:
    """The first letters of a commit, and whether files of the checkout had been edited."""
    known, _, edited = commit.partition("-")
    return f"{known[:7]}-{edited}" if edited else known[:7]


def reported(results: Results) -> str:
    """The tables whose single runs are not kept."""
    rows = []
    for line in results.reported:
        difference = ""
        if line.found is not None:
            difference = f"{line.found.difference:+.2f} (± {line.found.interval:.2f})"
        rows.append(
            (
                line.design.table, line.arm, f"{line.error:.2f} ± {line.deviation:.2f}", line.runs,
                difference, f"{line.parameters:,}", line.design.date,
                line.design.device, line.commit,
            )
        )  # fmt: skip
    head = (
        "table", "arm", "test error, % (mean ± SD)", "runs", "minus the first arm (95% interval)",
        "parameters (mean)", "date", "machine", "commit",
    )  # fmt: skip
    return table(head, rows)


def weights_of_classes(results: Results) -> str:
    """Classes with large weights, and some others, of searches whose other classes are not kept."""
    entries = results.rows_of("class_weights.csv")
    rows = []
    for key, group in groupby(entries, key=lambda e: (e["data"], e["labels"], e["rounds"])):
        found = list(group)
        found.sort(key=lambda entry: -float(entry["weight"]))
        weights = ", ".join(f"{entry['class']} {entry['weight']}" for entry in found)
        rows.append((*key, weights, f"`{found[0]['command']}`"))
    head = ("data", "labels in training and validation", "rounds", "weights", "command")
    return table(head, rows)


def forest(results: Results) -> str:
    """The figure."""
    count = len(results.kept_effects(METHOD, BASELINE))
    return (
        f"![paired differences of test errors with 95% intervals; {count} comparisons of LFM-CW "
        "with plain search and further controls](results.svg)"
    )


BLOCKS: dict[str, Callable[[Results], str]] = {
    "status": results_status.status,
    "forest": forest,
    "answer": results_answer.answer,
    "power": results_power.power,
    "plain search": plain_search,
    "class weights": class_weights_question,
    "oracle": oracle,
    "hard": hard,
    "random cells": random_cells,
    "in common": results_answer.in_common,
    "significant": results_ends.significant,
    "equal searches": results_further.equal_searches,
    "images of W2": results_further.images_of_w2,
    "pooled": results_further.pooled,
    "dead cells": results_ends.dead_cells,
    "dead tests": results_ends.dead_tests,
    "living": results_ends.living,
    "beside random": results_ends.beside_random,
    "beside random by experiment": results_ends.beside_random_by_experiment,
    "ranks": ranks,
    "rank differences": rank_differences,
    "trained arms": trained_arms,
    "cells": cells,
    "ablations": ablations,
    "quality": quality,
    "machines": machines,
    "sources": sources,
    "reported": reported,
    "weights and errors": results_classes.weights_and_errors,
    "weights of classes": weights_of_classes,
    "digits": lambda r: verbatim(r, "digits.csv"),
    "exactness": exactness,
    "kinks": lambda r: verbatim(r, "finite_difference_kinks.csv"),
    "bfloat16": lambda r: pivot(
        r, "bfloat16_gradients.csv", row=("game", "engine"), column="problem",
        value="relative error",
    ),
    "threads": lambda r: pivot(
        r, "threads.csv", row=("search",), column="threads", value="seconds"
    ),
    "norm statistics": lambda r: pivot(
        r, "norm_statistics.csv", row=("data",), column="statistics", value="test_error_percent"
    ),
    "norm passes": lambda r: pivot(
        r, "norm_statistics_passes.csv", row=("data",), column="statistics",
        value="test_error_percent",
    ),
    **results_benchmarks.BLOCKS,
}  # fmt: skip
"""Name in the page's markers → what makes the block."""
