"""The page of results is what the committed files give, and says what has not been run."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from made_results import ABLATION, made_cells, made_looked_up_runs, made_row, made_runs
from results_answer import leading
from results_blocks import BLOCKS
from results_cells import (
    cell_lines,
    networks,
    noise_between_seeds,
    rank_correlation,
    regret_of_the_chosen,
)  # fmt: skip
from results_data import BASELINE, METHOD, UNIFORM, condition_said, is_dead, read_all
from results_ends import random_p
from results_figures import FIGURES, wanted
from results_markdown import NOTHING
from results_page import BLOCK, DOCS, main, pages, render
from results_power import families

from lfmcw_app.cell_table_file import read_cell_table
from lfmcw_app.errors import InputError
from lfmcw_app.results_file import read_results, write_results

HARD = 'data.wrong_labels=[{"as":["dog"],"in":"train","of":"cat","share":0.5}]'


@pytest.fixture
def data(tmp_path):
    """A folder of results that has the paper's figures only."""
    shutil.copy(DOCS / "data" / "paper.csv", tmp_path)
    return tmp_path


def block(name, data):
    return BLOCKS[name](read_all(data))


def answer_row(data, question="plain search"):
    found = [
        line for line in block("answer", data).splitlines() if line.startswith(f"| {question} |")
    ]
    assert len(found) == 1
    return found[0]


def status_row(data, *words):
    found = [
        line for line in block("status", data).splitlines() if all(word in line for word in words)
    ]
    assert len(found) == 1
    return found[0]


# ------------------------------ the committed page


def test_the_committed_pages_are_what_the_committed_files_give():
    results = read_all(DOCS / "data")
    found = list(pages(DOCS))
    assert DOCS / "results.md" in found
    for path in found:
        text = path.read_text("utf-8")
        assert render(text, results) == text, f"make results changes {path.name}"


def test_the_committed_figures_show_the_committed_files():
    results = read_all(DOCS / "data")
    for name in wanted(results):
        text = (DOCS / name).read_text("utf-8")
        assert f">{FIGURES[name][0](results)}<" in text, f"make results changes {name}"
        assert len(text) < 150_000


def test_every_block_stands_on_a_page_once():
    named = [name for path in pages(DOCS) for name, _ in BLOCK.findall(path.read_text("utf-8"))]
    assert sorted(named) == sorted(BLOCKS)


def test_no_figure_stands_in_the_prose_of_the_results():
    """Figures of results: decimals and percentages. What an interval and a power are may stand."""
    texts = [(DOCS / name).read_text("utf-8") for name in ("results.md", "results-details.md")]
    text = BLOCK.sub("", "".join(texts))
    text = re.sub(r"```.*?```|\]\(.*?\)|`.*?`", "", text, flags=re.DOTALL)
    text = re.sub("95%|80%|a hundred", "", text)
    assert re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])|\d+ ?%|±", text) == []


def test_committed_files_are_small():
    for path in (DOCS / "data").rglob("*.csv"):
        assert path.stat().st_size < 1_000_000, path


# ------------------------------ what has not been run


def test_without_results_every_block_says_so(tmp_path):
    for name, make in BLOCKS.items():
        text = make(read_all(tmp_path))
        if name not in ("power", "forest", "status"):
            assert re.search(r"(?i)not (been )?(run|measured|compared)", text), (name, text)
            assert not re.search(r"\d\.\d", text), (name, text)


def test_the_status_says_what_was_not_run(data):
    text = block("status", data)
    items = (*(f"Table {n}" for n in range(2, 6)), "Tables 6 and 7", "Figure 3", "Figure 4")
    for item in (*items, "Figures 5 and 6"):
        assert f"| {item}, " in text
    assert text.count("| not run here |") == 11 + 2 + 2 + 2  # rows of Tables 2 to 5, and Figure 3
    assert "±" not in "".join(line.split("|")[6] for line in text.splitlines())  # our figures


# ------------------------------ verdicts in words


@pytest.mark.parametrize(
    ("offset", "seeds", "words"),
    [
        (-0.8, 12, "| lower error, by more than chance explains |"),
        (0.8, 12, "| higher error, by more than chance explains |"),
        (0.0, 12, "| no difference seen; a gain above 0."),
        (-0.8, 4, "| open: 4 seeds are too few |"),
    ],
)
def test_the_answer_follows_the_verdict(data, offset, seeds, words):
    made_runs(data / "runs" / "a.csv", offsets={**ABLATION, METHOD: offset}, seeds=seeds)
    assert words in answer_row(data)


def test_arms_that_no_seed_tells_apart_are_said_to_be_so(data):
    same = dict.fromkeys(ABLATION, 0.0)
    made_runs(data / "runs" / "a.csv", offsets=same, spread=0.0)
    assert "| 0 | 12, 0 differ | the same error for every seed |" in answer_row(data)


def test_the_answer_has_a_row_for_each_question_in_every_state(data):
    questions = (
        "plain search", "itself with uniform class weights",
        "itself with λ = 0 (no generated images)",
        "plain search, with real images in place of generated ones",
        "plain search, at the paper's sizes",
    )  # fmt: skip
    for question in (*questions, "plain search, on harder data"):
        assert answer_row(data, question).endswith("|  |  |  | not run here |")
    made_runs(data / "runs" / "a.csv")
    made_runs(data / "runs" / "b.csv", generator="real")
    made_runs(data / "runs" / "c.csv", condition=HARD)
    for question in (*questions[:-1], "plain search, with 50% of cat labelled dog"):
        assert "not run here" not in answer_row(data, question)
    assert answer_row(data, questions[-1]).endswith("|  |  |  | not run here |")
    assert "on harder data" not in block("answer", data)


def test_the_largest_experiment_leads_and_all_are_counted(data):
    assert block("answer", data).startswith("LFM-CW has not been compared with plain search here.")
    made_runs(data / "runs" / "few.csv", seeds=10, order="second", offsets={**ABLATION, METHOD: 2})
    made_runs(data / "runs" / "many.csv")
    assert "first order" in answer_row(data) and "lower error" in answer_row(data)
    first = block("answer", data).splitlines()[0]
    assert "all 2 comparisons of LFM-CW with plain search: 1 *better*, 1 *worse*." in first


def test_the_answer_says_how_many_of_those_counted_it_shows(data):
    """The verdicts are of all comparisons with plain search; the table has one for each question.

    Rows of LFM-CW beside itself are none of them, though their figures may be the same.
    """
    same = dict.fromkeys(ABLATION, 0.0)
    made_runs(data / "runs" / "a.csv", offsets=same, spread=0.0)
    assert "Verdict of the only comparison" in block("answer", data)
    made_runs(data / "runs" / "b.csv", generator="real")
    assert "all 2 comparisons" in block("answer", data)
    assert "The table has all of them." in block("answer", data)
    made_runs(data / "runs" / "c.csv", seeds=10, order="second")
    made_runs(data / "runs" / "d.csv", seeds=11, order="second")
    said = block("answer", data)
    assert "all 4 comparisons" in said
    assert "So it has 3 of these 4; the others are in the sections below." in said
    rows = [line for line in said.splitlines() if line.startswith("| plain search")]
    assert sum("not run here" not in row for row in rows) == 3
    assert "second order" in answer_row(data, "plain search, in second order")


def test_the_leading_experiment_is_chosen_before_its_result(data):
    """A generator that learns first, then seeds, the order, the name: whatever is found."""
    cold = "search.generator.warmup_rounds=0"
    for name, more in {
        "a": {"seeds": 20, "settings": cold},
        "b": {"seeds": 12, "order": "second"},
        "c": {"seeds": 12, "space": "pdarts"},
        "d": {"seeds": 12, "spread": 0.01},
    }.items():
        made_runs(data / "runs" / f"{name}.csv", **more)
    for expected in ("d.csv", "c.csv", "b.csv", "a.csv"):
        lead = leading(read_all(data).effects(METHOD, BASELINE))
        assert lead.design.source == expected
        (data / "runs" / expected).unlink()


def test_an_experiment_whose_arms_are_alike_leads_last(data):
    same = dict.fromkeys(ABLATION, 0.0)
    made_runs(data / "runs" / "a.csv", offsets=same, spread=0.0, seeds=40)
    assert answer_row(data).endswith("| 0 | 40, 0 differ | the same error for every seed |")
    made_runs(data / "runs" / "b.csv")
    assert "lower error" in answer_row(data)
    assert "1 *better*, 0 *worse*, 1 *identical*." in block("answer", data).splitlines()[0]


def test_a_difference_that_rounds_to_zero_has_no_direction(data):
    made_runs(data / "runs" / "a.csv", table="table2", offsets={BASELINE: 0.0, METHOD: 0.0})
    path = data / "runs" / "a.csv"
    rows = read_results(path)
    signs = [0.3 if row.seed % 2 else -0.3 for row in rows]
    errors = [
        50.0 if row.arm == BASELINE else 49.999 + sign
        for row, sign in zip(rows, signs, strict=True)
    ]
    write_results(
        path,
        [
            row.model_copy(update={"test_error_percent": error})
            for row, error in zip(rows, errors, strict=True)
        ],
    )
    assert "| 0.00 (-0." in answer_row(data)


def test_seeds_that_tie_are_said(data):
    ranks = {BASELINE: [5] * 20, METHOD: [5] * 15 + [7] * 5}
    made_looked_up_runs(data / "runs" / "a.csv", ranks, table="table2")
    for name in ("plain search", "rank differences"):
        assert "| 20, 5 differ |  |" in block(name, data)
        assert "| too few seeds differ |" in block(name, data)
    assert answer_row(data).endswith("| 20, 5 differ | open: too few seeds differ |")


def test_comparisons_in_the_other_order_turn_sign_and_verdict(data):
    """`controls` reports the search without LFM-CW minus LFM-CW."""
    offsets = {METHOD: -0.8, "random cells": 1.0, BASELINE: 0.0}
    path = made_runs(data / "runs" / "a.csv", offsets=offsets, table="controls")
    (turned,) = read_all(data).effects(METHOD, BASELINE)
    (straight,) = read_all(data).effects(BASELINE, METHOD)
    assert turned.found.difference == -straight.found.difference < -0.5
    assert turned.found.low == -straight.found.high < turned.found.difference
    assert turned.found.high == -straight.found.low < 0
    assert (turned.verdict, straight.verdict) == ("better", "worse")
    assert turned.error == straight.error_against < turned.error_against
    assert turned.design.source == path.name


def test_comparisons_that_no_table_plans_are_not_made(data):
    made_runs(data / "runs" / "a.csv")
    assert read_all(data).effects("λ = 0", "random cells") == []


# ------------------------------ each result in its place


def test_oracles_and_conditions_stand_in_their_own_sections(data):
    made_runs(data / "runs" / "a.csv")
    made_runs(data / "runs" / "b.csv", generator="real")
    made_runs(data / "runs" / "c.csv", condition=HARD)
    counts = {
        name: block(name, data).count(f"| {METHOD} minus {BASELINE} |")
        for name in ("plain search", "oracle", "hard")
    }
    assert counts == {"plain search": 1, "oracle": 1, "hard": 1}
    assert "first order, real images" in block("oracle", data)
    assert "50% of cat labelled dog" in block("hard", data)
    assert "50% of cat" not in block("status", data)


def test_a_run_at_the_papers_size_takes_the_row_from_a_small_one(data):
    made_runs(data / "runs" / "small.csv")
    small = status_row(data, "Table 2", "DARTS-1st, CIFAR-10 |")
    assert "| small | CIFAR-10 (JPEG), small, DCGAN |" in small
    made_runs(
        data / "runs" / "full.csv", table="table2", offsets={BASELINE: 0.0, METHOD: -0.45},
        seeds=10, spread=0.05, base=3.0, dataset="cifar10", preset="paper", generator="biggan",
    )  # fmt: skip
    full = status_row(data, "Table 2", "DARTS-1st, CIFAR-10 |")
    assert "| yes | CIFAR-10, paper, BigGAN |" in full
    words = "better; the paper's -0.45 points are inside the interval, and its -15% (here -0.45 "
    assert f"{words}points) inside it" in full
    assert "| 1 comparison, listed below |" in answer_row(
        data, "plain search, at the paper's sizes"
    )


def test_a_change_outside_the_interval_is_said_to_be_outside(data):
    offsets = {**ABLATION, METHOD: 0.0, "synthetic only": -9.0}
    made_runs(data / "runs" / "a.csv", offsets=offsets, spread=1.0)
    row = status_row(data, "Table 2", "DARTS-1st, CIFAR-10 |")
    assert "no difference seen; the paper's -0.45 points are inside the interval, and its" in row
    assert re.search(r"its -15% \(here -7\.\d\d points\) outside it", row)


def test_a_share_that_no_network_reached_is_not_called_refuted(data):
    """The best of all networks errs by 2 points less than plain search, and 15% would be 7.5."""
    offsets = {**ABLATION, METHOD: 0.0, "synthetic only": -2.0}
    made_runs(data / "runs" / "a.csv", offsets=offsets, spread=0.3)
    row = status_row(data, "Table 2", "DARTS-1st, CIFAR-10 |")
    assert re.search(
        r"; no network here was good enough for its -15% \(here -7\.\d\d points\) ", row
    )
    assert "no network here is that good" in block("power", data)


def test_controls_answer_the_question_of_figure_3(data):
    """LFM-CW and λ = 0 of `controls` are the searches with λ = 1 and λ = 0."""
    made_runs(data / "runs" / "a.csv", table="controls")
    row = status_row(data, "Figure 3", "DARTS-1st, CIFAR-10")
    assert "λ = 1 − λ = 0: -0.4" in row or "λ = 1 − λ = 0: -0.5" in row


def test_other_classes_do_not_stand_in_for_cifar100_or_imagenet(data):
    made_runs(data / "runs" / "a.csv", space="pcdarts")
    assert "| small |" in status_row(data, "Table 2", "PC-DARTS, CIFAR-10 |")
    assert "| not run here |" in status_row(data, "Table 2", "PC-DARTS, CIFAR-100 |")
    assert "| not run here |" in status_row(data, "Table 3", "PC-DARTS, ImageNet |")


def test_runs_that_two_tables_share_are_compared_once(data):
    offsets = {BASELINE: 0.0, METHOD: -0.5}
    made_runs(data / "runs" / "a.csv", table="controls", offsets=offsets)
    rows = read_results(data / "runs" / "a.csv")
    write_results(
        data / "runs" / "b.csv", [row.model_copy(update={"table": "table2"}) for row in rows]
    )
    (kept,) = read_all(data).effects(METHOD, BASELINE)
    assert kept.design.table == "controls"
    made_runs(data / "runs" / "c.csv", table="table2", offsets=offsets)  # other runs
    assert len(read_all(data).effects(METHOD, BASELINE)) == 2


def test_a_table_that_has_begun_repeats_no_part_of_another(data):
    """Its first seeds are runs of another table; they would be a second, smaller experiment."""
    offsets = {BASELINE: 0.0, METHOD: -0.5}
    made_runs(data / "runs" / "b.csv", table="table2", offsets=offsets)
    rows = [
        row.model_copy(update={"table": "controls"})
        for row in read_results(data / "runs" / "b.csv")
    ]
    for name in ("a.csv", "c.csv"):  # before and after it by name
        write_results(data / "runs" / name, [row for row in rows if row.seed < 5])
    (kept,) = read_all(data).effects(METHOD, BASELINE)
    assert (kept.design.table, kept.found.pairs) == ("table2", 12)


def test_a_small_table_takes_no_correction_of_a_large_one_away(data):
    """Holm's correction for the eight comparisons of `ablation` stays, where table2 has one."""
    made_runs(data / "runs" / "ablation.csv", offsets={**ABLATION, METHOD: -0.35})
    (before,) = read_all(data).effects(METHOD, BASELINE)
    rows = read_results(data / "runs" / "ablation.csv")
    small = [
        row.model_copy(update={"table": "table2"}) for row in rows if row.arm in (METHOD, BASELINE)
    ]
    for name in ("a.csv", "table2.csv"):  # before and after it by name
        write_results(data / "runs" / name, small)
    results = read_all(data)
    (after,) = results.effects(METHOD, BASELINE)
    alone = results.experiments[-1].findings[0]
    assert after == before and alone.p_value < before.p_value
    assert "Families of tests: 1." in block("power", data)  # the others have none of their own runs


def test_an_arm_with_a_run_to_begin_with_per_seed_is_one(data):
    """Earlier rows name the run that a generator comes from, later ones only that it does."""
    steps = "search.steps={} search.generator.warmup_rounds=0 lookup.file={}.csv "
    for name, length, device in (("a", 300, "one"), ("b", 3000, "two"), ("c", 300, "three")):
        path = data / "runs" / f"{name}.csv"
        told = steps.format(length, name)
        made_runs(path, device=device)
        if name == "c":
            started = [f"{told}search.generator.init=run"] * 12
        else:
            started = [f"{told}search.generator.init.run={seed}" for seed in range(12)]
        rows = [
            row.model_copy(update={"settings": started[row.seed] if row.generator else None})
            for row in read_results(path)
        ]
        write_results(path, rows)
    short, long, later = (experiment.design for experiment in read_all(data).experiments)
    assert short.settings == later.settings
    assert short.begins_warm and "search.generator.init=run" in short.settings
    assert "search.steps=3000" in long.settings and "search.steps=300 " in short.settings
    lines = [line for line in block("machines", data).splitlines() if f"minus {BASELINE}" in line]
    assert ["one" in line or "three" in line for line in lines] == [True, True]


def test_settings_that_all_arms_have_are_those_of_the_experiment(data):
    path = data / "runs" / "a.csv"
    made_runs(path, table="fig3", offsets={"λ = 0": 0.0, "λ = 2": 0.0})
    own = {"λ = 0": "search.lambda=0.0 search.steps=300", "λ = 2": "search.steps=300"}
    rows = [row.model_copy(update={"settings": own[row.arm]}) for row in read_results(path)]
    write_results(path, rows)
    (experiment,) = read_all(data).experiments
    assert experiment.design.settings == "search.steps=300"


def test_what_conditions_would_apply_to_is_no_condition(data):
    made_runs(data / "runs" / "a.csv", condition="data.conditions_apply_to=search")
    assert f"| {METHOD} minus {BASELINE} |" in block("plain search", data)
    assert "Not run here" in block("hard", data)
    made_runs(data / "runs" / "a.csv", condition=f"{HARD} data.conditions_apply_to=search")
    assert "data.conditions_apply_to=search" in block("hard", data)
    condition = f"{HARD} data.conditions_apply_to=search"
    made_looked_up_runs(
        data / "runs" / "a.csv", {BASELINE: [1, 3], METHOD: [2, 4]}, table="table2",
        condition=condition,
    )  # fmt: skip
    assert "apply_to" not in block("hard", data) and "50% of cat" in block("hard", data)


def test_a_gain_that_is_not_possible_is_not_ruled_out(data):
    """Plain search has a mean regret of 0.2 points, and of twelve differences between -0.1 and 0.1
    the interval is narrower. With losses and gains of many ranks it is wider than what is possible.
    """
    for losing, words in ((4, "; a gain above 0.0"), (33, "| no difference seen |")):
        ranks = {BASELINE: [3] * 12, METHOD: [losing if seed % 2 else 2 for seed in range(12)]}
        ranks[BASELINE] = [3 if losing == 4 else 31 - 28 * (seed % 2) for seed in range(12)]
        made_looked_up_runs(data / "runs" / "a.csv", ranks, table="table2")
        (effect,) = read_all(data).effects(METHOD, BASELINE)
        assert effect.largest_gain == pytest.approx(0.2 if losing == 4 else 1.6)
        assert (effect.excluded_gain is None) == (-effect.found.low >= effect.largest_gain)
        assert words in answer_row(data) and effect.verdict == "no difference seen"
        answered = answer_row(data)
        assert ("of about 0.20 possible" in answered) == (losing == 4)


def test_nothing_is_ruled_out_where_searches_end_at_dead_cells(data):
    """One search in twelve is enough: the interval assumes symmetric differences."""
    for dead in (False, True):
        ranks = {BASELINE: [31] * 12, METHOD: [30, 32] * 6}
        ranks[METHOD][3] = 50 if dead else 32
        made_looked_up_runs(data / "runs" / "a.csv", ranks, table="table2", step=1.0)
        (effect,) = read_all(data).effects(METHOD, BASELINE)
        assert effect.with_dead == dead and effect.verdict == "no difference seen"
        assert ("is ruled out" in answer_row(data)) != dead


def test_two_machines_stand_together_and_signs_are_compared(data):
    made_runs(data / "runs" / "a.csv", device="one")
    made_runs(data / "runs" / "b.csv", device="two", offsets={**ABLATION, METHOD: 0.5})
    lines = [line for line in block("machines", data).splitlines() if f"minus {BASELINE}" in line]
    assert [("one" in line, "two" in line) for line in lines] == [(True, False), (False, True)]
    assert all("**the sign differs**" in line for line in lines)
    made_runs(data / "runs" / "b.csv", device="two")
    assert "the sign agrees" in block("machines", data)


def test_alike_experiments_are_told_apart_by_what_differs(data):
    common = "search.nodes=3 lookup.file=cells.csv"
    made_runs(data / "runs" / "a.csv", settings=common)
    rows = read_results(made_runs(data / "runs" / "b.csv", settings=common))
    warm = f"{common} search.generator.warmup_rounds=500"  # of arms with a generator
    rows = [row.model_copy(update={"settings": warm}) if row.generator else row for row in rows]
    write_results(data / "runs" / "b.csv", rows)
    text = block("plain search", data)
    assert text.count("search.generator.warmup_rounds=500") == 1
    assert "search.nodes" not in text and "lookup.file" not in text


def test_trained_arms_stand_with_their_sizes(data):
    """Size is a confounder: arms that find larger networks have lower errors."""
    assert block("trained arms", data) == NOTHING
    rows = [
        made_row(
            arm=arm,
            seed=seed,
            error=49.5 + 0.5 * larger - seed * larger,
            parameters=1000 + 100 * seed * larger,
        )
        for arm, larger in ((BASELINE, 1), (METHOD, 2))
        for seed in range(10)
    ]
    rows.append(made_row("random cells", 0, 60.0, parameters=900, search_seconds=None))
    (data / "runs").mkdir()
    write_results(data / "runs" / "a.csv", rows)
    text = block("trained arms", data)
    assert "| no LFM-CW | 10 | 45.50 ± 3.03 | 1,450 ± 303 | -1.00 |  |" in text
    assert "| LFM-CW | 10 | 41.50 ± 6.06 | 1,900 ± 606 | -1.00 | -1.00 | +0.50 ± 0.00 |" in text
    assert "| random cells | 1 | 60.00 | 900 |  |  |  |  |" in text  # without a search
    write_results(data / "runs" / "a.csv", rows[:-2])  # nine pairs
    assert "| -1.00 | -1.00 |" not in block("trained arms", data)


def test_runs_that_are_all_in_another_table_are_listed_once(data):
    made_runs(data / "runs" / "controls.csv", table="controls")
    names = ("trained arms", "significant")
    whole = [*(block(name, data) for name in names), families(read_all(data))]
    rows = read_results(data / "runs" / "controls.csv")
    part = [row.model_copy(update={"table": "table2"}) for row in rows]
    write_results(
        data / "runs" / "table2.csv", [row for row in part if row.arm in (METHOD, BASELINE)]
    )
    assert [*(block(name, data) for name in names), families(read_all(data))] == whole


def test_quality_of_generators_is_shown_for_each_arm(data):
    made_runs(data / "runs" / "a.csv", gan_test_percent=87.25, gan_train_percent=12.5, variety=0.04)
    assert "| LFM-CW | 12 | 87.2 | 12.5 | 0.04 |" in block("quality", data)


def test_conditions_are_said_in_words_or_as_they_are():
    assert condition_said(HARD) == "50% of cat labelled dog"
    assert condition_said("data.imbalance=0.1") == "classes of unequal size (1 to 0.1)"
    assert condition_said("data.other=7") == "data.other=7"


# ------------------------------ look-ups


def test_ranks_of_looked_up_searches_are_counted(data):
    ranks = {BASELINE: [1, 3, 30], METHOD: [2, 4, 11]}
    made_looked_up_runs(data / "runs" / "a.csv", ranks, table="table2")
    text = block("ranks", data)
    assert "| no LFM-CW | 3 | 1.03 ± 1.62 | 3 (1 to 30) | 2 of 3 |" in text
    assert "cells of our own table" in text
    assert "copies of a network count" in text


def test_a_file_with_some_looked_up_runs_counts_as_trained(data):
    path = data / "runs" / "a.csv"
    made_looked_up_runs(path, {BASELINE: [1, 3], METHOD: [2, 4]}, table="table2")
    rows = read_results(path)
    trained = {"rank": None, "regret_percent": None}
    rows = [row.model_copy(update=trained) if row.arm == METHOD else row for row in rows]
    write_results(path, rows)
    (experiment,) = read_all(data).experiments
    assert not experiment.design.looked_up
    assert "Not run here" in block("ranks", data)


def test_cells_that_differ_in_unused_parameters_are_one_network(tmp_path):
    for seeds, count in ((2, 40), (1, 80)):  # one training could be alike by chance
        path = made_cells(tmp_path / f"{seeds}.csv", count=40, seeds=seeds, noise=0.4)
        once = read_cell_table(path)
        twin = {
            f"{notation} again": replace(cell, parameters=cell.parameters + 1000)
            for notation, cell in once.cells.items()
        }
        assert len(networks(replace(once, cells={**once.cells, **twin}))) == count


def test_the_table_of_cells_is_summed_up(data):
    made_cells(data / "nasbench201_3_nodes_cifar10.csv", noise=0.0)
    text = block("cells", data)
    assert "| best | `\\|cell0~0\\|` | 1 | 40.00 | 40.00, 40.00 | 10,000 |" in text
    assert "| median | `\\|cell62~0\\|` | 1 | 46.20 |" in text
    assert "| worst | `\\|cell124~0\\|` | 1 | 52.40 |" in text
    assert "| a random cell's regret |  | 125 | 6.20 |" in text
    assert "| regret of the network that looks best |  |  | 0.00 |" in text


def test_cells_of_one_network_count_once_in_the_noise(tmp_path):
    once = read_cell_table(made_cells(tmp_path / "once.csv", count=40, noise=0.4))
    twin = {f"{notation} again": cell for notation, cell in once.cells.items()}
    twice = replace(once, cells={**once.cells, **twin})
    assert len(networks(twice)) == 40 and {count for *_, count in networks(twice)} == {2}
    assert noise_between_seeds(twice) == noise_between_seeds(once)
    assert [*cell_lines(twice)][-3:] == [*cell_lines(once)][-3:]


def test_noise_between_seeds_is_that_of_the_trainings(tmp_path):
    table = read_cell_table(made_cells(tmp_path / "cells.csv", seeds=20, noise=0.3))
    assert noise_between_seeds(table) == pytest.approx(0.3, rel=0.1)
    assert rank_correlation(table) > 0.98


def test_one_training_per_cell_tells_nothing_of_noise(data):
    made_cells(data / "nasbench201_3_nodes_cifar10.csv", seeds=1)
    text = block("cells", data)
    assert "worst" in text and "between seeds" not in text


def test_regret_of_the_chosen_cell_is_its_expectation():
    means, noise = [40.0, 40.1, 40.3, 41.0, 45.0], 0.25
    seen = np.random.default_rng(0).normal(means, noise, (200_000, len(means)))
    simulated = np.take(means, seen.argmin(1)).mean() - 40.0
    assert regret_of_the_chosen(means, noise) == pytest.approx(simulated, rel=0.02)
    assert regret_of_the_chosen(means, 0.0) == 0.0


# ------------------------------ dead cells, random cells, class weights


def test_dead_cells_are_counted_tested_and_left_out(data):
    """Of twelve searches six end at cells that err by 89% and more. McNemar: 2 / 2⁶."""
    ranks = {BASELINE: [3] * 12, METHOD: [50, 2] * 6}
    for name, more in (("a", {}), ("b", {"condition": HARD}), ("c", {"generator": "real"})):
        made_looked_up_runs(data / "runs" / f"{name}.csv", ranks, table="table2", step=1.0, **more)
    counted = block("dead cells", data)
    assert "| DCGAN | 0 of 12 | 6 of 12 |" in counted
    assert "| all 2, generated images | 0 of 24 | 12 of 24 |" in counted
    assert "all 1" not in counted
    said = "6 of 12 of LFM-CW with real images, 0 of 12 of plain search beside it."
    assert said in block("answer", data).splitlines()[0]
    tested = block("dead tests", data)
    # A seed counts once, in however many experiments its cells are dead.
    for images in ("real", "generated"):
        assert f"| {images} images | {METHOD} | 12 | 6 | 0 | {2 / 2**6:.2g} |" in tested
    assert f"| {METHOD} minus {BASELINE} | 6 | -1.00 (-1.00 to -1.00) |" in block("living", data)


def test_dead_cells_of_all_arms_with_images_are_counted(data):
    """Of six seeds, five have a dead cell in one of the two arms, and one in plain search too."""
    ranks = {arm: [3] * 6 for arm in ABLATION}
    ranks |= {METHOD: [50, 50, 50, 3, 3, 3], UNIFORM: [50, 3, 3, 50, 50, 3]}
    ranks[BASELINE] = [50, 3, 3, 3, 3, 3]
    made_looked_up_runs(data / "runs" / "a.csv", ranks, step=1.0)
    text = block("dead tests", data)
    assert "With generated images, 6 of 18 searches of the arms that use them" in text
    assert "and 1 of 12 of the others (no LFM-CW, λ = 0)" in text
    assert "does so with 4 seeds with which neither no LFM-CW nor λ = 0 does" in text
    assert f"holds for 0 (p = {2 / 2**4:.2g})" in text


# ------------------------------ comparisons that no table plans


def test_two_equal_searches_stand_with_their_correlation(data):
    ranks = {BASELINE: [1, 2, 3, 4, 5, 6], "λ = 0": [11, 12, 13, 14, 15, 17]}
    made_looked_up_runs(data / "runs" / "a.csv", ranks)
    row = block("equal searches", data).splitlines()[-1]
    assert "| 6 | +1.02 (± 0.04) | 0.04 | +0.99 |" in row


def test_generated_images_alone_are_compared_over_experiments(data):
    """Of two experiments one has no difference; Holm's correction is over the two."""
    for name, offset, more in (("a", 2, {}), ("b", 0, {"generator": "real"})):
        ranks = {METHOD: [5 + offset] * 6, "synthetic only": [5] * 6, BASELINE: [9] * 6}
        made_looked_up_runs(data / "runs" / f"{name}.csv", ranks, **more)
    text = block("images of W2", data)
    assert f"| 6 | +0.20 (+0.20 to +0.20) | {2 / 2**6:.2g} | {4 / 2**6:.2g} |" in text
    assert "| real images | 6, 0 differ | 0.00 (0.00 to 0.00) | 1 | 1 |" in text
    assert "p (Holm, of 2)" in text


def test_experiments_are_pooled_seed_by_seed(data):
    """The means over two experiments differ by (2 + 4) / 2 ranks, of 0.1 points each."""
    for name, offset, more in (
        ("a", 2, {}), ("b", 4, {"condition": HARD}), ("c", 60, {"generator": "real"}),
    ):  # fmt: skip
        ranks = {METHOD: [5 + offset] * 6, BASELINE: [5] * 6}
        made_looked_up_runs(data / "runs" / f"{name}.csv", ranks, table="table2", **more)
    text = block("pooled", data)
    for measure, found in (("points", "+0.30 (+0.30"), ("rank", "+3.0 (+3.0")):
        said = f"| all 2, generated images | LFM-CW minus no LFM-CW | {measure} | 6 | {found}"
        assert said in text
    assert len(text.splitlines()) == 4 and "p (Holm, of 2)" in text


def test_trained_networks_have_their_own_answer(data):
    made_looked_up_runs(data / "runs" / "a.csv", {BASELINE: [3] * 12, METHOD: [4, 2] * 6})
    made_runs(data / "runs" / "b.csv")
    assert "cells of our own table" in answer_row(data)
    assert "DARTS, small" in answer_row(data, "plain search, where each network is trained")


def test_each_space_of_trained_networks_has_its_answer(data):
    made_looked_up_runs(data / "runs" / "a.csv", {BASELINE: [3] * 12, METHOD: [4, 2] * 6})
    for space in ("darts", "pcdarts"):
        made_runs(data / "runs" / f"{space}.csv", table="table2", space=space)
    for space in ("DARTS", "PC-DARTS"):
        row = answer_row(data, f"plain search, where each network is trained ({space})")
        assert f", {space}, small" in row
    assert "The table has all of them." in block("answer", data)


def test_tables_without_single_runs_are_details_only(data):
    shutil.copy(DOCS / "data" / "summaries.csv", data)
    for name in ("plain search", "class weights", "answer", "power"):
        assert "Fashion-MNIST" not in block(name, data)
    assert "Fashion-MNIST" in status_row(data, "Table 4, DARTS-1st")
    assert "| fig3 | λ = 3 |" in block("reported", data)


def test_a_search_on_other_data_is_not_what_a_table_runs(data):
    """No table trains on ImageNet what it found on CIFAR-10."""
    made_runs(
        data / "runs" / "a.csv", table="table2", dataset="imagenet", preset="paper", order="second"
    )
    row = status_row(data, "Table 3, DARTS-2nd, ImageNet, searched on CIFAR-10")
    assert "| not run here |" in row


def test_a_commit_with_edited_files_is_named_so(data):
    made_runs(data / "runs" / "a.csv", commit="0123456789abcdef-dirty")
    assert "| 0123456-dirty |" in block("sources", data)


def test_trained_networks_at_chance_are_no_dead_cells(data):
    made_runs(data / "runs" / "a.csv", base=90.0)
    assert not any(is_dead(row) for row in read_all(data).experiments[0].rows)
    assert "Not run here" in block("dead cells", data)


def test_an_arm_is_compared_with_all_random_cells(data):
    """Three cells of regret 0, where half of the cells have 1: an eighth of the draws."""
    lower, p_value = random_p(np.array([0.0, 1.0]), [0.0, 0.0, 0.0])
    assert (lower, p_value) == (pytest.approx(1 / 8, abs=0.004), pytest.approx(1 / 4, abs=0.008))
    assert random_p(np.array([0.0, 1.0]), [1.0, 0.0]) == (pytest.approx(0.75, abs=0.005), 1.0)
    made_cells(data / "nasbench201_3_nodes_cifar10.csv", noise=0.0)
    ranks = {BASELINE: [1] * 12, METHOD: [63] * 12, "random cells": [40] * 12}
    made_looked_up_runs(data / "runs" / "a.csv", ranks)
    assert "a random cell is 6.20 points, and of a random living one 6.20." in block(
        "beside random", data
    )
    text = block("beside random by experiment", data)
    assert f"| no LFM-CW | 12 | 0.00 |{' below 0.0001 |' * 4}" in text
    assert "| LFM-CW | 12 | 6.20 | 0.5" in text and "| random cells |" not in text


def test_random_living_cells_are_told_from_all_random_cells(data):
    """The errors of 125 cells rise from 45 by 0.4 points, and 15 of them reach 89%."""
    made_cells(data / "nasbench201_3_nodes_cifar10.csv", noise=0.0, least=45.0, step=0.4)
    ranks = {BASELINE: [84] * 12, METHOD: [1] * 12}
    made_looked_up_runs(data / "runs" / "a.csv", ranks, least=45.0, step=0.4)
    assert "a random cell is 24.80 points, and of a random living one 21.80." in block(
        "beside random", data
    )
    text = block("beside random by experiment", data)
    cells = text.partition("| no LFM-CW | 12 | 33.20 |")[2].split("|")
    p_of_all, p_of_living = float(cells[2]), float(cells[3])
    assert 0.02 < p_of_all < 0.1 and p_of_living < p_of_all / 3


def test_every_significant_comparison_is_named(data):
    """By points and by rank; comparisons that two experiments share are counted once."""
    ranks = {arm: [20 + seed for seed in range(12)] for arm in ABLATION}
    ranks[UNIFORM] = [10 + seed for seed in range(12)]
    path = data / "runs" / "a.csv"
    made_looked_up_runs(path, ranks)
    once = block("significant", data)
    assert once.startswith("Of 16 planned comparisons (8 by points, 8 by rank; 16 have different")
    assert once.count(f"| {UNIFORM} minus {BASELINE} | points | -1.00 (") == 1
    assert once.count(f"| {METHOD} minus {UNIFORM} | rank | +10.0 (") == 1
    assert "4 are statistically significant" in once
    assert "2 of the 16 compare LFM-CW with itself with uniform class weights; 2 of these" in once
    shutil.copy(path, data / "runs" / "b.csv")
    assert "Of 32 planned comparisons (16 by points, 16 by rank; 16 have" in block(
        "significant", data
    )


def test_power_says_which_gains_are_possible(data):
    """Plain search has a mean regret of 0.2 points; 15% of its error are 6 points."""
    ranks = {BASELINE: [3] * 12, METHOD: [4, 2] * 6}
    made_looked_up_runs(data / "runs" / "a.csv", ranks, table="table2")
    row = block("power", data).splitlines()[-3]
    assert row.endswith("| 0.20 | 6.03 | not possible here | not possible here |")
    made_runs(data / "runs" / "a.csv", offsets={**ABLATION, "synthetic only": -9.0})
    row = block("power", data).splitlines()[-3]
    assert re.search(r"\|  \| 7\.\d\d \| \d+ \| \d+ \|$", row)


def test_our_own_table_of_cells_is_not_called_the_public_one(data):
    ranks, settings = {BASELINE: [3] * 6, METHOD: [4] * 6}, "search.nodes=4 lookup.file=cells.csv"
    path = data / "runs" / "a.csv"
    for dataset, preset, words in (
        ("cifar10-jpeg", "small", "CIFAR-10 (JPEG), 16×16, 15625 cells of our own table, first"),
        ("cifar10", "paper", "CIFAR-10, a table of 15625 cells, first order"),
    ):
        made_looked_up_runs(
            path, ranks, table="table2", dataset=dataset, preset=preset, settings=settings
        )
        (experiment,) = read_all(data).experiments
        assert experiment.design.title.startswith(words)


def test_what_all_looked_up_titles_begin_with_is_said_once(data):
    ranks = {BASELINE: [3] * 12, METHOD: [4, 2] * 6}
    made_looked_up_runs(data / "runs" / "a.csv", ranks, table="table2")
    made_looked_up_runs(data / "runs" / "b.csv", ranks, table="table2", generator="real")
    made_runs(data / "runs" / "c.csv")
    common = "CIFAR-10 (JPEG), 16×16, cells of our own table, first order"
    assert block("in common", data) == (
        f"2 experiments with 48 rows, which are 48 different runs: *{common}*."
    )
    assert "| real images | LFM-CW minus" in block("oracle", data)
    assert "| CIFAR-10 (JPEG), 16×16, DARTS, small," in block("plain search", data)
    assert common not in block("plain search", data) + block("ranks", data)


def test_class_weights_stand_beside_the_errors_of_w1(data):
    head = "data,labels,rounds,seed,class,weight,wrong_percent\n"
    rows = ["0,cat,2.0,80.0", "0,dog,1.0,20.0", "0,ship,1.5,50.0",
            "1,cat,1.0,90.0", "1,dog,2.0,10.0", "1,ship,1.5,50.0"]  # fmt: skip
    text = head + "".join(f"pictures,right,300,{row}\n" for row in rows)
    (data / "class_weights_seeds.csv").write_text(text, "utf-8")
    found = block("weights and errors", data)
    assert "| cat | 1.50 | 85.0 |" in found and "mean of 2 seeds" in found
    assert "classes: +1.00, -1.00 (seeds 0, 1), mean +0.00." in found


# ------------------------------ files and pages


def test_figures_are_the_same_bytes_each_time(data, tmp_path):
    made_runs(data / "runs" / "a.csv")
    made_cells(data / "nasbench201_3_nodes_cifar10.csv")
    made_looked_up_runs(data / "runs" / "b.csv", {BASELINE: [1, 3], METHOD: [2, 4]}, table="table2")
    results = read_all(data)
    assert list(wanted(read_all(DOCS / "data"))) == list(FIGURES)
    for name in wanted(results):
        digest, draw = FIGURES[name]
        draw(results, tmp_path / name)
        first = (tmp_path / name).read_bytes()
        draw(results, tmp_path / name)
        assert (tmp_path / name).read_bytes() == first
        assert digest(results).encode() in first


def test_another_result_is_another_figure(data):
    made_runs(data / "runs" / "a.csv")
    before = FIGURES["results.svg"][0](read_all(data))
    made_runs(data / "runs" / "a.csv", offsets={**ABLATION, METHOD: -0.4})
    assert FIGURES["results.svg"][0](read_all(data)) != before


def test_the_command_fills_pages_and_draws(data, tmp_path, capsys):
    docs = tmp_path / "docs"
    made_runs(docs / "data" / "runs" / "a.csv")
    (docs / "a.md").write_text(
        "By hand.\n\n<!-- begin: answer -->\nearlier\n<!-- end: answer -->\n"
    )
    (docs / "b.md").write_text("No block.\n")
    main(docs)
    text = (docs / "a.md").read_text("utf-8")
    assert text.startswith("By hand.\n\n<!-- begin: answer -->\n\nVerdict of the only comp")
    assert "earlier" not in text
    assert (docs / "results.svg").exists() and not (docs / "results_cells.svg").exists()
    main(docs)
    assert (docs / "a.md").read_text("utf-8") == text
    assert "b.md" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "<!-- begin: answer -->\n",
        "<!-- end: answer -->\n",
        "<!-- begin: answer -->\n<!-- end: status -->\n",
        "<!-- begin: nothing -->\n<!-- end: nothing -->\n",
    ],
)
def test_blocks_of_other_names_or_without_an_end_are_refused(text, data):
    with pytest.raises(InputError, match="block"):
        render(text, read_all(data))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "has no runs"),
        ([made_row(METHOD, 0, 50.0), made_row(METHOD, 0, 51.0)], "two runs of one arm and seed"),
        ([made_row(METHOD, 0, 50.0), made_row(METHOD, 1, 51.0, space="pdarts")], "mixes"),
        (
            [made_row(METHOD, seed, 50.0, settings=f"search.steps={seed}") for seed in (3, 4)],
            "settings of the arm 'LFM-CW' is 'search.steps=3' and 'search.steps=4'",
        ),
        (
            [made_row(METHOD, 0, 50.0), made_row(METHOD, 1, 50.0, order="second")],
            "order of the arm 'LFM-CW' is 'first' and 'second'",
        ),
        ([made_row(METHOD, 0, 50.0, table="table9")], "'table9', which this version"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(rows, words, data):
    (data / "runs").mkdir()
    write_results(data / "runs" / "a.csv", rows)
    with pytest.raises(InputError, match=words):
        read_all(data)


def test_a_summary_of_many_seeds_needs_its_single_runs(data):
    text = (DOCS / "data" / "summaries.csv").read_text("utf-8").replace(",0.50,3,", ",0.50,20,")
    (data / "summaries.csv").write_text(text, "utf-8")
    with pytest.raises(InputError, match="20 seeds needs its single runs"):
        read_all(data)


def test_isolating_arms_are_compared_with_the_method(data):
    made_runs(data / "runs" / "a.csv")
    text = block("class weights", data)
    assert f"{METHOD} minus {UNIFORM}" in text and f"{METHOD} minus λ = 0" in text
