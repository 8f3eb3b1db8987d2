"""The blocks of the pages of results and of benchmarks, made from the files in docs/data.

Each function takes all results and returns Markdown. A block says what has not been run, and never
fills it in. The verdicts are those of `lfmcw_app.comparison`: one rule for all tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import results_benchmarks
import results_classes
import results_ends
import results_further
from measuring import PROVENANCE
from results_cells import cell_lines
from results_data import (
    BASELINE,
    BOTH,
    CELLS,
    DATASETS,
    GENERATORS,
    LONGER,
    METHOD,
    NO_WEIGHT,
    ORACLE,
    RANDOM,
    SYNTHETIC,
    SYNTHETIC_ONLY,
    UNIFORM,
    Design,
    Effect,
    PaperRow,
    Results,
    condition_said,
    mean,
)  # fmt: skip
from results_markdown import NOT_RUN, NOTHING, folded, table
from scipy.stats import spearmanr

from lfmcw_app.arms import contrasts
from lfmcw_app.comparison import TOO_FEW, TOO_FEW_DIFFER
from lfmcw_app.paired_tests import LEVEL, POWER, detectable_in_spreads, least_pairs
from lfmcw_app.results_file import Row

Pair = tuple[str, str]

ISOLATING = ((METHOD, UNIFORM), (METHOD, NO_WEIGHT))
"""The comparisons that isolate the class weights and the generated images."""

WITHOUT_WEIGHTS = (*ISOLATING, (UNIFORM, BASELINE))
"""These, and what the images do without class weights."""


# ------------------------------ Markdown


def points(effect: Effect) -> str:
    """The difference with its 95% interval, percentage points."""
    return effect.found.describe()


def verdict_said(effect: Effect) -> str:
    """The verdict; if no difference is seen, also which gain is ruled out, if any."""
    gain = effect.excluded_gain
    if effect.verdict != "no difference seen" or gain is None:
        return effect.verdict
    said = f"{effect.verdict}; a gain above {gain:.2f} points is ruled out"
    return said if effect.largest_gain is None else f"{said}, of {effect.largest_gain:.2f} possible"


def effects_table(results: Results, effects: Sequence[Effect]) -> str:
    """A row for each comparison."""
    titles = results.titles(effect.design for effect in effects)
    head = (
        "experiment", "difference", "seeds", f"seen in {POWER:.0%}", "points (95% interval)",
        "% of the error", "p (Holm)", "verdict",
    )  # fmt: skip
    rows = []
    for effect in effects:
        found = effect.found
        seen = "" if math.isinf(found.detectable) else f"{found.detectable:.2f}"
        p_value = "" if math.isnan(effect.p_value) else f"{effect.p_value:.2g}"
        rows.append(
            (
                titles[effect.design], f"{effect.arm} minus {effect.against}", found.seeds_text,
                seen, points(effect), f"{effect.relative:+.1f}", p_value, verdict_said(effect),
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


def chosen(
    results: Results, pairs: Iterable[Pair], wanted: Callable[[Effect], bool]
) -> list[Effect]:
    """The wanted comparisons of these arms, where single runs are kept."""
    return [e for pair in pairs for e in results.kept_effects(*pair) if wanted(e)]


def is_plain(effect: Effect) -> bool:
    """Whether the data are as they are, and images come from a generator."""
    return effect.design.condition is None and effect.design.generator != ORACLE


def is_oracle(effect: Effect) -> bool:
    """Whether real images stand in for generated ones."""
    return effect.design.condition is None and effect.design.generator == ORACLE


def is_hard(effect: Effect) -> bool:
    """Whether the data were made harder."""
    return effect.design.condition is not None


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
    for title, experiment in results.titled():
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
                )
            )  # fmt: skip
    head = (
        "experiment", "arm", "searches", "regret, points (mean ± SD)", "rank (median, range)",
        "among the ten best cells (copies of a network count)", "parameters (mean)",
    )  # fmt: skip
    return folded("Every arm of every experiment", table(head, rows))


def trained_arms(results: Results) -> str:
    """Errors, sizes and times of searches whose networks were trained, and size as a confounder."""
    rows = []
    for title, experiment in results.trained():
        first = experiment.runs(experiment.arms[0])
        for arm in experiment.arms:
            runs = experiment.runs(arm)
            related = _size_and_error(first, runs)
            rows.append(
                (
                    title, arm, len(runs),
                    _spread([row.test_error_percent for row in runs], ".2f"),
                    _spread([row.parameters for row in runs], ",.0f"),
                    "" if related is None else f"{related:+.2f}",
                    _minutes([row.search_seconds for row in runs]),
                    _minutes([row.training_seconds for row in runs]),
                )
            )  # fmt: skip
    head = (
        "experiment", "arm", "runs", "test error, % (mean ± SD)", "parameters (mean ± SD)",
        "size and error", "search, minutes", "training, minutes",
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


def _size_and_error(first: Sequence[Row], second: Sequence[Row]) -> float | None:
    """The rank correlation, over pairs of runs, of differences in parameters and in error.

    None with fewer than ten pairs, if parameters are not known, or if all pairs are alike.
    """
    others = {row.seed: row for row in first}
    pairs = [(row, others[row.seed]) for row in second if row.seed in others]
    sizes = [
        row.parameters - other.parameters
        for row, other in pairs
        if row.parameters is not None and other.parameters is not None
    ]
    errors = [row.test_error_percent - other.test_error_percent for row, other in pairs]
    if len(sizes) < max(10, len(pairs)) or len(set(sizes)) == 1 or len(set(errors)) == 1:
        return None
    return float(spearmanr(sizes, errors).statistic)


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


# ------------------------------ power


def power(results: Results) -> str:
    """What experiments of these sizes can see, before what they saw."""
    tests = len(contrasts("ablation"))
    head = ("seeds", "one comparison", f"{tests} comparisons (`ablation`)")
    counts = (5, 6, 10, 20, 40)
    rows = [(pairs, *_spreads(pairs, (1, tests))) for pairs in counts]
    general = table(head, rows)
    effects = results.kept_effects(METHOD, BASELINE)
    titles = results.titles(effect.design for effect in effects)
    claimed = paper_errors(results)
    rows = []
    for effect in effects:
        spread, planned = effect.found.deviation, len(contrasts(effect.design.table))
        if math.isnan(spread) or spread == 0 or claimed is None:
            continue
        seen, largest = effect.found.detectable, effect.largest_gain
        gain = claimed[1] - claimed[0]
        share = gain / claimed[1] * effect.error_against
        needed = [
            seeds_needed(wanted, spread, planned)
            if largest is None or wanted <= largest else "not possible here"
            for wanted in (share, gain)
        ]  # fmt: skip
        rows.append(
            (
                titles[effect.design], f"{effect.error_against:.2f}", f"{spread:.2f}",
                effect.found.seeds_text,
                "none" if math.isinf(seen) else f"{seen:.2f}",
                "" if largest is None else f"{largest:.2f}",
                f"{share:.2f}: {needed[0]}", needed[1],
            )
        )  # fmt: skip
    there = "" if claimed is None else f" {claimed[0] - claimed[1]:+.2f} points"
    change = "" if claimed is None else f" {100 * (claimed[0] / claimed[1] - 1):+.0f}%"
    head = (
        "experiment", "error of plain search, %", "SD of the paired differences", "seeds",
        f"seen in {POWER:.0%}, points", "largest possible gain, points",
        f"the paper's{change}, in points here: seeds to see it",
        f"seeds to see the paper's{there}",
    )  # fmt: skip
    return f"{general}\n\n{table(head, rows)}\n\n{families(results)}"


def families(results: Results) -> str:
    """How many families of tests there are: nothing is corrected over them."""
    count = len(results.experiments)
    by_rank = sum(bool(experiment.findings_by_rank) for experiment in results.experiments)
    if count == 0:
        return "Families of tests: 0. Each experiment whose single runs are kept is one."
    ranked = f", and {by_rank} of them by rank too" if by_rank else ""
    expected = LEVEL * (count + by_rank)
    return (
        f"Families of tests: {count + by_rank}. They are {count} experiments by points{ranked}. "
        "Holm's correction is within a family, not over them. If no arm differed from any other, "
        f"up to {expected:.2g} of these families would contain a false *better* or *worse* on "
        "average."
    )


def _spreads(pairs: int, tests: Sequence[int]) -> list[str]:
    found = [detectable_in_spreads(pairs, of) for of in tests]
    return ["none" if math.isinf(spreads) else f"{spreads:.2f} SD" for spreads in found]


def seeds_needed(difference: float, spread: float, tests: int) -> int:
    """The least number of seeds with which a difference is seen, given the pairs' spread."""
    pairs = least_pairs(tests)
    while detectable_in_spreads(pairs, tests) * spread > difference:
        pairs += 1
    return pairs


def paper_errors(results: Results) -> tuple[float, float] | None:
    """The paper's errors of DARTS in first order on CIFAR-10 with LFM-CW and without it, %."""
    rows = [
        row for row in results.paper
        if (row.item, row.data, row.space, row.order) == ("Table 2", "cifar10", "darts", "first")
    ]  # fmt: skip
    return _errors(rows, METHOD, BASELINE)


def _errors(rows: Sequence[PaperRow], arm: str, against: str) -> tuple[float, float] | None:
    errors = {row.arm: row.error for row in rows}
    return (errors[arm], errors[against]) if {arm, against} <= set(errors) else None


# ------------------------------ the table of status


SEARCHES = {
    ("darts", "first"): "DARTS-1st", ("darts", "second"): "DARTS-2nd", ("pdarts", None): "P-DARTS",
    ("pcdarts", None): "PC-DARTS",
}  # fmt: skip
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}
STATUS_PAIRS: dict[str, list[Pair]] = {
    "Table 2": [(METHOD, BASELINE)],
    "Table 3": [(METHOD, BASELINE)],
    "Table 4": [(BOTH, SYNTHETIC)],
    "Table 5": contrasts("table5"),
    "Figure 3": [("λ = 1", "λ = 0"), ("λ = 1", "λ = 0.5"), ("λ = 3", "λ = 0")],
}
VARIED = {
    "Table 4": ": W2 on generated images only → on real ones too",
    "Table 5": ": DCGAN → WGAN-GP → BigGAN",
    "Figure 3": ": λ",
}
"""Item → what its figures compare; elsewhere search without and with LFM-CW."""

FIGURE_3 = "only drawn: least error at λ = 1"

FURTHER_ITEMS = (
    ("Figure 4", "cells found on CIFAR-100", "drawings", "every run draws its cells"),
    ("Figures 5 and 6", "images of BigGAN", "pictures", "every run draws its images"),
    (
        "Tables 6 and 7", "settings", "lists",
        "the recipes `paper` have them: `tests/unit/lfmcw_app/test_recipe.py`",
    ),
    ("Table 1, Figures 1 and 2", "notation, illustrations", "", "nothing to run"),
)  # fmt: skip


def status(results: Results) -> str:
    """A row for every table and figure of the paper."""
    rows = [
        _status_row(results, list(group))
        for _, group in groupby(
            results.paper, key=lambda row: (row.item, row.data, row.space, row.order)
        )
    ]
    for data, space, order in (("cifar10", "darts", "first"), ("cifar100", "pdarts", None)):
        drawn = PaperRow(
            item="Figure 3", data=data, space=space, order=order, searched_on=data, arm="",
            error=math.nan, printed="",
        )  # fmt: skip
        rows.append(_status_row(results, [drawn]))
    for item, what, figure, verdict in FURTHER_ITEMS:
        rows.append((f"{item}, {what}", figure, "", "", "", "", verdict))
    head = (
        "in the paper", "its figure, test error in %", "run here?", "at what size", "seeds",
        "our figure, points (95% interval)", "verdict",
    )  # fmt: skip
    return table(head, rows)


def _status_row(results: Results, group: list[PaperRow]) -> tuple[object, ...]:
    first = group[0]
    what = f"{SEARCHES[first.space, first.order]}, {DATA[first.data]}"
    if first.searched_on != first.data:
        what += f", searched on {DATA[first.searched_on]}"
    what += VARIED.get(first.item, "")
    figures = " → ".join(row.printed for row in group) if first.arm else FIGURE_3
    if (errors := _errors(group, *STATUS_PAIRS[first.item][0])) is not None and len(group) == 2:
        figures += f" ({100 * (errors[0] / errors[1] - 1):+.0f}%)"
    effects = [
        effect
        for pair in STATUS_PAIRS[first.item]
        for effect in _nearest(results.effects(*pair), first)
    ]
    where = f"{first.item}, {what}"
    if not effects:
        return (where, figures, NOT_RUN, "", "", "", "open")
    at_size = all(_at_the_papers_size(effect, first) for effect in effects)
    return (
        where,
        figures,
        "yes" if at_size else "small",
        _stacked(_size(effect) for effect in effects),
        _stacked(effect.found.seeds_text for effect in effects),
        "<br>".join(_named(effect, len(group) > 2 or not first.arm) for effect in effects),
        _stacked(status_verdict(e, group) for e in effects),
    )


def _size(effect: Effect) -> str:
    """Data, preset and generator; the row says the rest."""
    design = effect.design
    parts = [DATASETS.get(design.dataset, design.dataset), design.preset]
    if design.generator and design.table != "table5":
        parts.append(GENERATORS.get(design.generator, design.generator))
    return ", ".join(parts)


def _stacked(texts: Iterable[str]) -> str:
    """Texts one under the other; once where all are the same."""
    listed = list(texts)
    return listed[0] if len(set(listed)) == 1 else "<br>".join(listed)


def _named(effect: Effect, with_arms: bool) -> str:
    return f"{effect.arm} − {effect.against}: {points(effect)}" if with_arms else points(effect)


def _at_the_papers_size(effect: Effect, row: PaperRow) -> bool:
    return effect.design.preset == "paper" and effect.design.dataset == row.data


def _nearest(effects: Sequence[Effect], row: PaperRow) -> list[Effect]:
    """The comparisons that are nearest to a row of the paper: same search, then same data.

    None where the paper searched on other data: no table trains on one data set what was found on
    another.
    """
    if row.searched_on != row.data:
        return []
    same = [
        effect
        for effect in effects
        if is_plain(effect) and not effect.design.looked_up
        and effect.design.space == row.space
        and row.order in (None, effect.design.order)
    ]  # fmt: skip
    levels = (
        [e for e in same if _at_the_papers_size(e, row)],
        [e for e in same if e.design.dataset.partition("-")[0] == row.data],
        # Of the data sets with ten classes, another one stands in.
        [e for e in same if row.data == "cifar10" and e.design.dataset not in DATA],
    )
    return next((level for level in levels if level), [])


def status_verdict(effect: Effect, group: Sequence[PaperRow]) -> str:
    """The verdict, and whether the paper's change is in the interval.

    An error that is many times the paper's could change by as many points as the paper's does, or
    by the same share: nobody knows which. So both are compared.
    """
    claimed = _errors(group, effect.arm, effect.against)
    if claimed is None or effect.verdict in (TOO_FEW, TOO_FEW_DIFFER):
        return effect.verdict
    points_there = claimed[0] - claimed[1]
    share = points_there / claimed[1]
    here = share * effect.error_against
    low, high = effect.ends
    where = {True: "inside", False: "outside"}
    return (
        f"{effect.verdict}; the paper's {points_there:+.2f} points are "
        f"{where[low <= points_there <= high]} the interval, and its {100 * share:+.0f}% (here "
        f"{here:+.2f} points) {where[low <= here <= high]} it"
    )


# ------------------------------ the answer


def answer(results: Results) -> str:
    """How often LFM-CW was better than plain search, and a row for each question of the page.

    A row answers by one comparison, and some rows compare LFM-CW with itself. So the sentence
    says how many of the comparisons that it counts the table shows. First and second order have
    rows of their own.
    """
    head = (
        "LFM-CW compared with", "experiment", "points (95% interval)", "seeds", "conclusion",
    )  # fmt: skip
    answers = [*_answers_on_plain_data(results), *_answers_on_other_data(results)]
    titles = results.titles(e.design for _, e in answers if e is not None)
    rows = [_answer_row(question, effect, titles) for question, effect in answers]
    rows.append(("plain search, at the paper's sizes", "", "", "", _at_the_papers_sizes(results)))
    shown = {_identity(effect) for _, effect in answers if effect is not None}
    effects = results.kept_effects(METHOD, BASELINE)
    told = sum(_identity(effect) in shown for effect in effects)
    said = [_counted(effects, told), *results_ends.dead_said(results)]
    return f"{' '.join(said)}\n\n{table(head, rows)}"


def in_common(results: Results) -> str:
    """What shortened titles leave out, and how many runs the looked-up experiments have."""
    found = [experiment for _, experiment in results.looked_up()]
    if not found:
        return NOTHING
    rows = [row for experiment in found for row in experiment.rows]
    runs = len({row.run for row in rows})
    said = f"{len(found)} experiments with {len(rows)} rows, which are {runs} different runs"
    return f"{said}: *{results.in_common or found[0].design.title}*."


def _identity(effect: Effect) -> tuple[Design, str, str]:
    """What tells comparisons apart: the experiment, and the arms."""
    return effect.design, effect.arm, effect.against


def leading(effects: Sequence[Effect]) -> Effect | None:
    """The comparison that the answer is of, by a rule that does not look at differences.

    Generators that learn before the search come first, then most seeds, first order before second,
    the title. Only where no seed tells arms apart, so that nothing was compared, others lead.
    """
    return min(
        effects,
        key=lambda e: (
            e.found.identical, not e.design.begins_warm, -e.found.pairs,
            e.design.order == "second", e.design.title, e.design.source,
        ),
        default=None,
    )  # fmt: skip


Answer = tuple[str, Effect | None]
"""A question, and the comparison that answers it."""


def _counted(effects: Sequence[Effect], told: int) -> str:
    """How often each verdict was reached on LFM-CW and plain search.

    Args:
        effects: all these comparisons.
        told: how many of them the table below has.
    """
    if not effects:
        return "LFM-CW has not been compared with plain search here."
    verdicts = [effect.verdict for effect in effects]
    others = [verdict for verdict in dict.fromkeys(verdicts) if verdict not in ("better", "worse")]
    counts = ", ".join(f"{verdicts.count(said)} *{said}*" for said in ("better", "worse", *others))
    if len(effects) == 1:
        return f"Verdict of the only comparison of LFM-CW with plain search: {counts}."
    said = f"Verdicts of all {len(effects)} comparisons of LFM-CW with plain search: {counts}."
    if told == len(effects):
        return f"{said} The table has all of them."
    return (
        f"{said} The table answers each question by one comparison per order. So it has {told} of "
        f"these {len(effects)}; the others are in the sections below."
    )


def _answers_on_plain_data(results: Results) -> list[Answer]:
    """Beside plain search, and beside LFM-CW without what is its own."""
    asked = (
        ("plain search", BASELINE),
        ("itself with uniform class weights", UNIFORM),
        ("itself with λ = 0 (no generated images)", NO_WEIGHT),
    )
    answers: list[Answer] = []
    for question, against in asked:
        effects = chosen(results, [(METHOD, against)], is_plain)
        trained = [effect for effect in effects if not effect.design.looked_up]
        others = [effect for effect in effects if effect.design.looked_up]
        if against != BASELINE or not trained or not others:
            answers += _by_order(question, effects)
            continue
        answers += _by_order(question, others)
        answers += _by_order(f"{question}, where each network is trained", trained)
    return answers


def _by_order(question: str, effects: Sequence[Effect]) -> list[Answer]:
    """The comparison that answers a question and, if there are both orders, one of the second."""
    second = [effect for effect in effects if effect.design.order == "second"]
    others = [effect for effect in effects if effect not in second]
    if not second or not others:
        return [(question, leading(effects))]
    return [(question, leading(others)), (f"{question}, in second order", leading(second))]


def _answers_on_other_data(results: Results) -> list[Answer]:
    """Beside plain search, with real images in the generator's place and on harder data."""
    pairs = [(METHOD, BASELINE)]
    real, alike = (chosen(results, [(METHOD, a)], is_oracle) for a in (BASELINE, UNIFORM))
    rows = _by_order("plain search, with real images in place of generated ones", real)
    if alike:
        rows += _by_order("itself with uniform class weights, with real images", alike)
    harder = chosen(results, pairs, is_hard)
    for condition in dict.fromkeys(effect.design.condition for effect in harder):
        for with_real, images in ((False, ""), (True, " and real images")):
            found = leading(
                [
                    effect for effect in harder
                    if effect.design.condition == condition
                    and (effect.design.generator == ORACLE) == with_real
                ]
            )  # fmt: skip
            if found is not None:
                said = condition_said(condition or "")
                rows.append((f"plain search, with {said}{images}", found))
    if not harder:
        rows.append(("plain search, on harder data", None))
    return rows


def _answer_row(
    question: str, effect: Effect | None, titles: Mapping[Design, str]
) -> tuple[str, str, str, str, str]:
    if effect is None:
        return (question, "", "", "", NOT_RUN)
    difference = "0" if effect.found.identical else points(effect)
    row = (question, titles[effect.design], difference, effect.found.seeds_text)
    return (*row, _concluded(effect))


def _concluded(effect: Effect) -> str:
    """What follows, by the verdict."""
    return {
        "better": "lower error, by more than chance explains",
        "worse": "higher error, by more than chance explains",
        "identical": "the same error for every seed",
        TOO_FEW: f"open: {effect.found.pairs} seeds are too few",
        TOO_FEW_DIFFER: "open: too few seeds differ",
    }.get(effect.verdict, verdict_said(effect))


def _at_the_papers_sizes(results: Results) -> str:
    count = sum(effect.design.preset == "paper" for effect in results.effects(METHOD, BASELINE))
    return f"{count} comparison{'s' if count > 1 else ''}, listed below" if count else NOT_RUN


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
    "status": status,
    "forest": forest,
    "answer": answer,
    "power": power,
    "plain search": plain_search,
    "class weights": class_weights_question,
    "oracle": oracle,
    "hard": hard,
    "random cells": random_cells,
    "in common": in_common,
    "significant": results_ends.significant,
    "equal searches": results_further.equal_searches,
    "images of W2": results_further.images_of_w2,
    "pooled": results_further.pooled,
    "dead cells": results_ends.dead_cells,
    "dead tests": results_ends.dead_tests,
    "living": results_ends.living,
    "beside random": results_ends.beside_random,
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
