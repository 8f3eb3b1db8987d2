"""The answer: how often LFM-CW was better, and a row for each question of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import results_ends
from results_data import (
    BASELINE,
    METHOD,
    NO_WEIGHT,
    ORACLE,
    SPACES,
    UNIFORM,
    Design,
    Effect,
    Results,
    condition_said,
)  # fmt: skip
from results_effects import chosen, is_hard, is_oracle, is_plain, points, verdict_said
from results_markdown import NOT_RUN, NOTHING, table

from lfmcw_app.comparison import TOO_FEW, TOO_FEW_DIFFER


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
        spaces = list(dict.fromkeys(effect.design.space for effect in trained))
        for space in spaces:
            where = f" ({SPACES.get(space, space)})" if len(spaces) > 1 else ""
            same = [effect for effect in trained if effect.design.space == space]
            answers += _by_order(f"{question}, where each network is trained{where}", same)
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
