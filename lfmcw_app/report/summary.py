"""What a run came to, in plain sentences: what was searched, how far it is, and what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfmcw_app.collapse import what_is_known
from lfmcw_app.data import short_name
from lfmcw_app.proportions import difference_by_chance
from lfmcw_app.report.images import class_names, last_class_weights
from lfmcw_app.report.quality import last_measured
from lfmcw_app.report.reading import LostNumbers, Phase, RunData
from lfmcw_app.result_file import (
    LEVEL,
    clearly_harder,
    counted_errors,
    how_sure,
    worst_classes,
    wrong_images,
)
from lfmcw_app.run_files import RESULT
from lfmcw_app.spaces import space_named
from lfmcw_app.stages import TRAINING, WARMUP, phases_of, search_stages

__all__ = ["comparison_summary", "mean_at_the_end", "searched_rounds", "summary"]

MOST_NAMED = 3
"""Classes that are named."""

PROBLEMS = {
    "w1": "W1",
    "gan": "the generator's game",
    "w2": "W2",
    "arch": "the architecture",
    "network": "the derived network",
}
GIVEN = "There was no search: the cells were given."
DRAWN = "There was no search: the cells were drawn at random."
OPEN = "The run is not complete: it is still running, or it was stopped."


def summary(run: RunData) -> str:
    """The sentences at the head of a run's page."""
    sentences = []
    if run.recipe.trial:
        sentences.append("This is a trial of a few rounds: its numbers say nothing.")
    sentences.append(_search(run))
    sentences.append(_state(run))
    sentences.append(_generator(run))
    sentences.append(_own_network(run))
    sentences.append(_hardest(run))
    sentences.append(_heaviest(run))
    return " ".join(sentence for sentence in sentences if sentence)


def searched_rounds(run: RunData) -> int:
    """The rounds of all stages of the search so far."""
    return sum(_last_round(stage) for stage in run.searched)


# ------------------------------ the search


def _search(run: RunData) -> str:
    """What was searched, and for how long."""
    if run.evaluated:
        return GIVEN
    how, data = run.recipe.search, short_name(run.recipe.dataset)
    if how.method == "random":
        return DRAWN
    who = "LFM-CW" if how.method == "lfmcw" else "The baseline without LFM-CW"
    if how.draws_real:
        who += ", with real images in the place of generated ones,"
    what = f"the {space_named(how.space).title} space on {data}"
    stages = search_stages(how)
    parts = f", in {len(stages)} stages" if len(stages) > 1 else ""
    done = searched_rounds(run)
    if not done:
        return f"{who} has completed no round of a search of {what}."
    if _search_ended(run):
        return f"{who} searched {what} for {_count(done, 'round')}{parts}."
    planned = None if how.steps is None else how.steps * len(stages)
    of = _count(done, "round") if planned is None else f"{done:,} of {_count(planned, 'round')}"
    return f"{who} has searched {what} for {of}{parts}."


def _search_ended(run: RunData) -> bool:
    return run.genotype is not None or run.result is not None or bool(run.training.entries)


# ------------------------------ how far it is


def _state(run: RunData) -> str:
    """The test error, or why there is none."""
    if run.result is not None:
        return _test_error(run.result)
    if any(entry.startswith(RESULT) for entry in run.unreadable):
        return "Its result cannot be read."
    ended = _ended_by(run)
    if ended is not None:
        lost, phase = ended
        where = "the warm-up" if phase == WARMUP else f"the {phase}"
        return (
            f"It stopped in round {lost.round:,} of {where}: a loss or gradient of "
            f"{PROBLEMS.get(lost.problem, lost.problem)} was not a finite number. There is no test "
            "error."
        )
    if run.training.entries:
        how = run.recipe.evaluation
        of = "" if how.steps is None else f" of {how.steps:,}"
        at = f"The training of the derived network has come to round {_last_round(run.training):,}"
        return f"{at}{of}. {OPEN} There is no test error yet."
    if _search_ended(run):
        return "Its cells are found, but their network is not trained, so there is no test error."
    if run.warmup.entries and not run.searched:
        planned = run.recipe.search.generator.warmup_rounds
        return (
            f"The warm-up of the generator has come to round {_last_round(run.warmup):,} of "
            f"{planned:,}. {OPEN}"
        )
    return f"{OPEN} There are no cells and no test error yet."


def _test_error(result: dict[str, Any]) -> str:
    error = f"{result['test_error_percent']:.2f}%"
    if "lookup" not in result:
        sure = how_sure(result, noun="image")
        of = f" ({sure})" if sure else ""
        return f"The test error of the derived network is {error}{of}."
    found = result["lookup"]
    return (
        f"The test error of the found cell is {error}. It was not trained here, but looked up in "
        f"{found['file']} ({_trainings(len(found['seeds']))}). The cell has rank "
        f"{found['rank']:,} of {found['cells']:,}, {found['regret_percent']:.2f} percentage points "
        "behind the best."
    )


def _trainings(number: int) -> str:
    return "one training" if number == 1 else f"mean of {number:,} trainings"


def _ended_by(run: RunData) -> tuple[LostNumbers, str] | None:
    """The lost numbers that ended a run, and their phase: those of the round that was next."""
    phases = (TRAINING,) if run.evaluated else phases_of(run.recipe)
    begun = [phase for phase in (run.warmup, *run.searched, run.training) if phase.entries]
    following = phases[:1]
    expected = []
    if begun:
        last = begun[-1]
        expected.append((last.name, _last_round(last) + 1))
        following = phases[phases.index(last.name) + 1 :][:1] if last.name in phases else ()
    expected += [(name, 1) for name in following]
    for lost in run.lost:
        for name, number in expected:
            if lost.round == number and (lost.problem == "network") == (name == TRAINING):
                return lost, name
    return None


# ------------------------------ what it found


def mean_at_the_end(run: RunData) -> tuple[float, int] | None:
    """W2's error on validation batches in %, the mean of the last tenth of the rounds.

    Returns:
        The mean, and of how many rounds; None where there is none.
    """
    accuracies = [
        entry["metrics"]["arch"]["accuracy"]
        for stage in run.searched
        for entry in stage.entries
        if "accuracy" in entry["metrics"].get("arch", {})
    ]
    if not accuracies:
        return None
    last = accuracies[-max(1, len(accuracies) // 10) :]
    return 100.0 * (1.0 - sum(last) / len(last)), len(last)


def _generator(run: RunData) -> str:
    """What is known of the generated images; empty where none were generated."""
    how = run.recipe.search
    if run.evaluated or how.method != "lfmcw":
        return ""
    last = last_measured(run)
    if last is not None and (last[-1] or not how.draws_real):
        *_, quality, doubts = last
        return what_is_known(quality, doubts)
    if how.draws_real or not _search_ended(run):
        return ""
    return "Whether the generated images show their classes was not measured."


def _own_network(run: RunData) -> str:
    found = mean_at_the_end(run)
    if found is None:
        return ""
    error, rounds = found
    batch = run.recipe.search.batch_size
    which = f"batch of the last round ({_count(batch, 'image')})"
    if rounds > 1:
        which = f"batches of the last {rounds:,} rounds ({_count(batch, 'image')} each)"
    if run.stride > 1:  # of which some were read
        which = f"batches of the last rounds ({_count(batch, 'image')} each)"
    return f"The search's own network, W2, had an error of {error:.1f}% on the validation {which}."


def _hardest(run: RunData) -> str:
    """The classes that are clearly harder than the others, or that there are none."""
    entries = (run.result or {}).get("classes") or []
    known = [entry for entry in entries if entry["error_percent"] is not None]
    if not known:
        return ""
    worst = worst_classes(known)
    if not worst:
        return "No test image of any class is wrong."
    harder = clearly_harder(known)
    if harder:
        named = list(map(_wrong, harder))
        return f"The hardest {_are('class', named)} {_listed(named)}."
    return (
        f"No class is clearly harder than the others. {_quoted(str(worst[0]['name']))} has the "
        f"largest error ({_wrong_of(worst[0])}), but chance alone can explain that."
    )


def _wrong(entry: Mapping[str, Any]) -> str:
    return f"{_quoted(str(entry['name']))} ({_wrong_of(entry)})"


def _wrong_of(entry: Mapping[str, Any]) -> str:
    """How much is wrong of a class: of so many images that everyone sees how little it may say."""
    return f"{wrong_images(entry):,} of {_count(entry['images'], 'test image')} wrong"


def _heaviest(run: RunData) -> str:
    """The classes that weigh most at the end of the search."""
    weights = last_class_weights(run)
    if weights is None or len(weights) <= MOST_NAMED:
        return ""
    names = class_names(run, len(weights))
    order = sorted(range(len(weights)), key=lambda label: -weights[label])[:MOST_NAMED]
    named = [f"{_quoted(names[label])} ({weights[label]:.2f})" for label in order]
    return f"The classes with the largest weights at the end of the search are {_listed(named)}."


# ------------------------------ several runs


def comparison_summary(labels: Sequence[str], runs: Sequence[RunData]) -> str:
    """The sentences at the head of a comparison."""
    sentences = [_ranking(labels, runs)]
    unfinished = [label for label, run in zip(labels, runs, strict=True) if run.result is None]
    if unfinished:
        verb = "is" if len(unfinished) == 1 else "are"
        sentences.append(f"{_listed(unfinished)} {verb} without a result.")
    sentences.append(_lengths(labels, runs))
    return " ".join(sentence for sentence in sentences if sentence)


def _ranking(labels: Sequence[str], runs: Sequence[RunData]) -> str:
    """The test errors, the lowest first, where they are of one kind."""
    found = [
        (run.result["test_error_percent"], label, run)
        for label, run in zip(labels, runs, strict=True)
        if run.result is not None and not run.recipe.trial
    ]
    if not found:
        return ""
    if len({_kind_of_error(run) for *_, run in found}) > 1:
        return "The test errors are of different data sets or tables, so they cannot be compared."
    found.sort(key=lambda one: one[0])
    sure = {label: how_sure(run.result or {}, noun="image") for _, label, run in found}
    named = [
        f"{error:.2f}% ({label}{': ' if sure[label] else ''}{sure[label]})"
        for error, label, _ in found
    ]
    if len(named) == 1:
        return f"The only test error is {named[0]}."
    ranked = f"The test errors, the lowest first: {_listed(named)}."
    counted = {label: counted_errors(run.result or {}) for _, label, run in found}
    known = {label: counts for label, counts in counted.items() if counts is not None}
    return f"{ranked} {_told_apart(known)}" if len(known) == len(counted) else ranked


def _told_apart(counted: Mapping[str, tuple[int, int]]) -> str:
    """Whether chance explains that the lowest test error is below each other one.

    Each pair is tested (Fisher, exact), corrected for the number of all pairs (Bonferroni).

    Args:
        counted: label → wrong answers and number of images, the lowest error first.
    """
    first, *others = counted
    pairs = len(counted) * (len(counted) - 1) // 2
    chances = {
        label: min(1.0, pairs * difference_by_chance(counted[first], counted[label]))
        for label in others
    }
    clear = [label for label, chance in chances.items() if chance < LEVEL]
    p = f"Fisher's exact test, p = {_p(min(chances.values()))}"
    p += ", corrected for all pairs" if pairs > 1 else ""
    if not clear:
        what = "difference" if pairs == 1 else "differences"
        return f"Chance alone can explain the {what} ({p})."
    behind = f"Chance hardly explains that {first} is lower than {_listed(clear)} ({p})"
    rest = [label for label in others if label not in clear]
    behind += f", but it can explain that {first} is lower than {_listed(rest)}" if rest else ""
    seeds = "Each is one training: another seed gives another error."
    return f"{behind}. {seeds}"


def _p(value: float) -> str:
    """A share of chance, for people."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.2g}"


def _kind_of_error(run: RunData) -> tuple[str, str | None]:
    """What test errors must have in common to be compared: the data set, and any table."""
    return run.recipe.dataset, run.recipe.lookup.digest


def _lengths(labels: Sequence[str], runs: Sequence[RunData]) -> str:
    """Which runs have a shorter search than the longest."""
    rounds = {label: searched_rounds(run) for label, run in zip(labels, runs, strict=True)}
    searched = {label: count for label, count in rounds.items() if count}
    longest = max(searched.values(), default=0)
    shorter = [
        f"{label} ({_count(count, 'round')})"
        for label, count in searched.items()
        if count < longest
    ]
    if not shorter:
        return ""
    one = len(shorter) == 1
    verb, whose = ("has a shorter search", "its") if one else ("have shorter searches", "their")
    return (
        f"{_listed(shorter)} {verb} than the longest, which has {_count(longest, 'round')}: "
        f"{whose} curves end earlier."
    )


# ------------------------------ words


def _last_round(phase: Phase) -> int:
    return int(phase.entries[-1]["round"]) if phase.entries else 0


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _are(noun: str, named: Sequence[str]) -> str:
    return f"{noun} is" if len(named) == 1 else f"{noun}es are"


def _quoted(name: str) -> str:
    return f"“{name}”"


def _listed(named: Sequence[str]) -> str:
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
