"""Reads the committed results (docs/data) and compares arms, for the pages of results.

- `runs/*.csv`: one row per run, in the schema of `lfmcw_app.results_file`. A file is the runs.csv
  of one `lfmcw_app.table`, so it is one experiment.
- `summaries.csv`: means and intervals of tables whose single runs are not kept.
- `paper.csv`: what the paper reports.
- `nasbench201_3_nodes_cifar10.csv`: every cell of a small space, trained.

Others are small files that the page shows as tables.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path

from scipy.stats import t as student

from lfmcw_app.arms import TABLES, contrasts
from lfmcw_app.cell_table import CellTable
from lfmcw_app.cell_table_file import read_cell_table
from lfmcw_app.comparison import (
    TOO_FEW,
    Comparison,
    Finding,
    by_rank,
    findings,
    looked_up,
    summaries,
)
from lfmcw_app.errors import InputError
from lfmcw_app.names import PRESETS
from lfmcw_app.paired_tests import least_pairs
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.result_rows import describe_setting
from lfmcw_app.results_file import Row, read_results

METHOD, BASELINE = "LFM-CW", "no LFM-CW"
UNIFORM, NO_WEIGHT, RANDOM = "uniform class weights", "λ = 0", "random cells"
LONGER = "no LFM-CW, 4 times the rounds"
SYNTHETIC_ONLY = "synthetic only"
SYNTHETIC, BOTH = "generated images only", "generated and real images"
ORACLE = "real"
"""`search.generator.name` of the oracle, which draws training images instead of making some."""

OPPOSITE = {"better": "worse", "worse": "better"}
"""Verdict on two arms → that on the same in the other order."""

CHANCE = 90.0
"""Test error of guessing among ten classes, %."""

DEAD = CHANCE - 1.0
"""Test error, %, from which a looked-up cell counts as dead."""

PUBLISHED = ("cifar10", "cifar100", "ImageNet16-120")
"""Data sets of the published table of NAS-Bench-201's cells."""

CELLS = "nasbench201_3_nodes_cifar10.csv"

DATASETS = {
    "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG)",
    "cifar100": "CIFAR-100", "imagenet": "ImageNet",
}  # fmt: skip
SPACES = {
    "darts": "DARTS", "pdarts": "P-DARTS", "pcdarts": "PC-DARTS", "nasbench201": "NAS-Bench-201",
}  # fmt: skip
GENERATORS = {
    "dcgan": "DCGAN", "resnet": "residual GAN", "wgan_gp": "WGAN-GP", "biggan": "BigGAN",
    ORACLE: "real images",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Design:
    """What the arms of an experiment have in common; None if they differ or have none.

    Attributes:
        table: name of the table of `lfmcw_app.table`.
        settings: of the LFM-CW arm, or those that all arms have: `key=value`, in one text.
        begins_warm: whether the generator learns before the search.
        looked_up: whether errors are read from a table of trained cells.
        device: of the runs.
        date: of the last run.
        source: file that the figures come from.
    """

    table: str
    dataset: str
    preset: str
    space: str
    order: str | None
    generator: str | None
    condition: str | None
    settings: str | None
    begins_warm: bool
    looked_up: bool
    device: str
    date: str
    source: str

    @property
    def title(self) -> str:
        """Names the experiment; `distinct_titles` adds what distinguishes it from others."""
        parts = [DATASETS.get(self.dataset, self.dataset)]
        parts += [f"{self.image_size}×{self.image_size}"] if self.image_size else []
        if self.looked_up:
            parts.append(self._table_said)
        else:
            parts += [SPACES.get(self.space, self.space), self.preset]
        parts += [f"{self.order} order"] if self.order else []
        parts += [GENERATORS.get(self.generator, self.generator)] if self.generator else []
        parts += [condition_said(self.condition)] if self.condition else []
        return ", ".join(parts)

    @property
    def image_size(self) -> int | None:
        """Side of the images in pixels, where the preset reduces them."""
        if told := self._told("data.image_size"):
            return int(told)
        usual = _usual(self.preset, self.space, self.dataset)
        return usual.data.image_size if usual else None

    @property
    def _table_said(self) -> str:
        """Which table errors are read from. The published one has no other data sets."""
        nodes = self._told("search.nodes")
        count = f"{5 ** math.comb(int(nodes), 2)} " if nodes else ""
        public = self.dataset in PUBLISHED
        return f"a table of {count}cells" if public else f"{count}cells of our own table"

    def _told(self, key: str) -> str | None:
        """The value of a setting; None where the experiment does not set it."""
        told = dict(setting.partition("=")[::2] for setting in self.distinguishing)
        return told.get(key)

    @property
    def distinguishing(self) -> list[str]:
        """The settings that may tell two experiments apart: not the place of a file."""
        found = (self.settings or "").split()
        return [setting for setting in found if not setting.startswith("lookup.")]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """An arm minus another one, in one experiment.

    Attributes:
        design: of the experiment.
        arm: its label.
        against: label of the arm that it is compared with.
        found: difference of the test errors, percentage points; negative: the arm is better.
        p_value: adjusted over the planned comparisons of the table (Holm); NaN if it is not known.
        verdict: by the one rule of `lfmcw_app.comparison`.
        error: mean test error of the arm over its runs, %.
        error_against: that of the other one.
        largest_gain: the mean regret of the other one, percentage points, which no arm can gain
            more than; None where errors are not looked up.
        lowest: the least test error of any run of the experiment, %; None where runs are not kept.
        with_dead: whether a search of either arm ended at a dead cell.
    """

    design: Design
    arm: str
    against: str
    found: Comparison
    p_value: float
    verdict: str
    error: float
    error_against: float
    largest_gain: float | None = None
    lowest: float | None = None
    with_dead: bool = False

    @property
    def relative(self) -> float:
        """The difference as a share of the other arm's error, %."""
        return 100 * self.found.difference / self.error_against

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of the interval: of all comparisons at once, or Student's t where seeds are few."""
        found = self.found
        if found.bounded:
            return found.low, found.high
        return found.difference - found.interval, found.difference + found.interval

    @property
    def excluded_gain(self) -> float | None:
        """A gain above this, percentage points, is outside the interval of all comparisons.

        None if that excludes nothing: no arm could have gained more. Nor is anything excluded if a
        search has ended at a dead cell: the interval assumes symmetric differences, and a few large
        ones on one side put an end of it too near.
        """
        if self.with_dead:
            return None
        gain = max(0.0, -self.found.low)
        largest = math.inf if self.largest_gain is None else self.largest_gain
        return gain if gain < largest else None

    @property
    def reachable_gain(self) -> float | None:
        """What the best network of the experiment is better than the other arm's mean, points.

        Where errors are looked up, the best network is that of the table.
        """
        if self.largest_gain is not None or self.lowest is None:
            return self.largest_gain
        return self.error_against - self.lowest


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The runs of one table.

    Attributes:
        design: what they have in common.
        rows: of the runs.
    """

    design: Design
    rows: Sequence[Row]

    def runs(self, arm: str) -> list[Row]:
        """The runs of an arm."""
        return [row for row in self.rows if row.arm == arm]

    @property
    def arms(self) -> list[str]:
        """The labels of the arms that have runs."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    @cached_property
    def findings(self) -> list[Finding]:
        """All planned comparisons of the table: one family of tests."""
        return findings(summaries(self.rows), contrasts(self.design.table))

    @cached_property
    def findings_of_living(self) -> list[Finding]:
        """The same comparisons over the seeds with which neither arm ends at a dead cell."""
        living = [row for row in self.rows if not is_dead(row)]
        return findings(summaries(living), contrasts(self.design.table))

    @cached_property
    def findings_by_rank(self) -> list[Finding]:
        """The same comparisons by the ranks of the cells; empty where they were not looked up."""
        return findings(by_rank(summaries(self.rows)), contrasts(self.design.table))

    def effect(self, arm: str, against: str) -> Effect | None:
        """An arm against another one; None where the table does not plan this, or has no pair."""
        for finding in self.findings:
            pair = (finding.arm, finding.against)
            if finding.comparison.pairs and pair in ((arm, against), (against, arm)):
                turned = pair != (arm, against)
                return Effect(
                    design=self.design,
                    arm=arm,
                    against=against,
                    found=_turned(finding.comparison) if turned else finding.comparison,
                    p_value=finding.p_value,
                    verdict=OPPOSITE.get(finding.verdict, finding.verdict)
                    if turned
                    else finding.verdict,
                    error=mean(row.test_error_percent for row in self.runs(arm)),
                    error_against=mean(row.test_error_percent for row in self.runs(against)),
                    largest_gain=mean(row.regret_percent for row in self.runs(against))
                    if self.design.looked_up
                    else None,
                    lowest=min(row.test_error_percent for row in self.rows),
                    with_dead=any(map(is_dead, [*self.runs(arm), *self.runs(against)])),
                )
        return None


@dataclass(frozen=True, kw_only=True)
class ReportedArm:
    """A line of a table whose single runs are not kept."""

    design: Design
    arm: str
    against: str
    error: float
    deviation: float
    runs: int
    found: Comparison | None
    parameters: int
    commit: str


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A figure of the paper: an error in %, and as it is printed there with its deviation."""

    item: str
    data: str
    space: str
    order: str | None
    searched_on: str
    arm: str
    error: float
    printed: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results.

    Attributes:
        folder: of the files.
        experiments: those whose runs are kept.
        reported: lines of the tables whose runs are not kept.
        paper: what the paper reports.
        cells: the table of all cells of a small space; None where it is not there.
    """

    folder: Path
    experiments: Sequence[Experiment] = ()
    reported: Sequence[ReportedArm] = ()
    paper: Sequence[PaperRow] = ()
    cells: CellTable | None = None

    def effects(self, arm: str, against: str) -> list[Effect]:
        """All comparisons of two arms, in the order of the experiments.

        Tables share runs. A comparison of the same runs comes once, from the table that plans the
        most comparisons: a small table beside a large one takes no correction away. One whose runs
        are a part of another's, as in a table that has only begun, does not come at all.
        """
        found: dict[frozenset[str], Effect] = {}
        for experiment in self.experiments:
            effect = experiment.effect(arm, against)
            if effect is None:
                continue
            runs = frozenset(row.run for label in (arm, against) for row in experiment.runs(label))
            known = found.setdefault(runs, effect)
            if len(contrasts(effect.design.table)) > len(contrasts(known.design.table)):
                found[runs] = effect
        whole = [effect for runs, effect in found.items() if not any(runs < more for more in found)]
        return [*whole, *self._reported_effects(arm, against)]

    def kept_effects(self, arm: str, against: str) -> list[Effect]:
        """The comparisons of two arms whose single runs are kept; see `effects`."""
        return [e for e in self.effects(arm, against) if not math.isnan(e.p_value)]

    def titles(self, designs: Iterable[Design]) -> dict[Design, str]:
        """Design → its title, which leaves out what `in_common` says of looked-up experiments."""
        common = f"{self.in_common}, "
        return {
            design: title.removeprefix(common) if design.looked_up else title
            for design, title in distinct_titles(designs).items()
        }

    def titled(
        self, experiments: Sequence[Experiment] | None = None
    ) -> list[tuple[str, Experiment]]:
        """Experiments, or all whose runs are kept, with their titles."""
        chosen = self.experiments if experiments is None else experiments
        titles = self.titles(experiment.design for experiment in chosen)
        return [(titles[experiment.design], experiment) for experiment in chosen]

    def looked_up(self) -> list[tuple[str, Experiment]]:
        """The experiments whose errors come from a table of cells, with their titles."""
        return [(title, e) for title, e in self.titled() if e.design.looked_up]

    def trained(self) -> list[tuple[str, Experiment]]:
        """The experiments whose networks were trained, with their titles."""
        return self.titled([e for e in self.families if not e.design.looked_up])

    @cached_property
    def families(self) -> list[Experiment]:
        """The experiments, each a family of tests.

        One whose runs are all in another, as `table2` beside `controls`, is left out.
        """
        runs = [{row.run for row in experiment.rows} for experiment in self.experiments]
        whole = zip(self.experiments, runs, strict=True)
        return [of for of, own in whole if not any(own < more for more in runs)]

    @cached_property
    def in_common(self) -> str:
        """What the titles of all looked-up experiments begin with, if there are several."""
        designs = [e.design for e in self.experiments if e.design.looked_up]
        return ", ".join(_shared_parts([*distinct_titles(designs).values()]))

    def _reported_effects(self, arm: str, against: str) -> Iterator[Effect]:
        # A table reports differences from its first arm, which either of the two may be.
        firsts = {line.design.table: line for line in self.reported if line.found is None}
        for line in self.reported:
            if line.found is None or {line.arm, line.against} != {arm, against}:
                continue
            first, turned = firsts[line.design.table], line.arm != arm
            method = line if line.design.generator else first
            errors = (first.error, line.error) if turned else (line.error, first.error)
            yield Effect(
                design=replace(
                    line.design, generator=method.design.generator, order=method.design.order
                ),
                arm=arm,
                against=against,
                found=_turned(line.found) if turned else line.found,
                p_value=math.nan,
                verdict=TOO_FEW,
                error=errors[0],
                error_against=errors[1],
            )

    def rows_of(self, name: str) -> list[dict[str, str]]:
        """The rows of a small file of the folder."""
        return _read(self.folder / name)


def is_dead(row: Row) -> bool:
    """Whether a run was looked up, and its cell's network guesses."""
    error = row.test_error_percent
    return row.rank is not None and error is not None and error >= DEAD


def images_said(experiment: Experiment) -> str:
    """Whether W2's further images are real or generated."""
    return "real images" if experiment.design.generator == ORACLE else "generated images"


def by_images(results: Results) -> list[tuple[str, list[Experiment]]]:
    """The experiments with generated images, and those with real ones."""
    found = sorted((e for _, e in results.looked_up()), key=images_said)
    return [(images, list(same)) for images, same in groupby(found, key=images_said)]


def _turned(found: Comparison) -> Comparison:
    """The comparison of the second arm with the first."""
    return replace(found, difference=-found.difference, low=-found.high, high=-found.low)


def distinct_titles(designs: Iterable[Design]) -> dict[Design, str]:
    """Design → its title, with settings, device, table or file where others would have the same."""
    titles = {design: design.title for design in designs}
    for same in _groups(titles):
        known = [set(design.distinguishing) for design in same]
        common = set.intersection(*known)
        for design in same:
            own = [setting for setting in design.distinguishing if setting not in common]
            titles[design] = ", ".join([titles[design], *own])
    for detail in ("device", "table", "source"):
        for same in _groups(titles):
            if len({getattr(design, detail) for design in same}) > 1:
                for design in same:
                    titles[design] += f", {getattr(design, detail)}"
    return titles


def _shared_parts(titles: Sequence[str]) -> list[str]:
    """What several titles begin with, without the last part of any; nothing of one title."""
    if len(titles) < 2:
        return []
    parts = [title.split(", ")[:-1] for title in titles]
    shared = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return shared


def _groups(titles: Mapping[Design, str]) -> list[list[Design]]:
    """The designs that share a title with others."""
    by_title: dict[str, list[Design]] = {}
    for design, title in titles.items():
        by_title.setdefault(title, []).append(design)
    return [same for same in by_title.values() if len(same) > 1]


def condition_said(condition: str) -> str:
    """What was made wrong with the data, in words; as it is where it is of another kind."""
    said = []
    for part in condition.split():
        key, _, value = part.partition("=")
        if key == "data.wrong_labels":
            said += [
                f"{wrong['share']:.0%} of {wrong['of']} labelled {' or '.join(wrong['as'])}"
                for wrong in json.loads(value)
            ]
        elif key == "data.imbalance":
            said.append(f"classes of unequal size (1 to {float(value):g})")
        else:
            said.append(part)
    return ", ".join(said)


def read_all(folder: Path) -> Results:
    """Reads docs/data, or another folder of the same shape; what is not there is left out.

    Raises:
        InputError: if a file is damaged.
    """
    return Results(
        folder=folder,
        experiments=_experiments(folder / "runs"),
        reported=[*_reported(folder / "summaries.csv")],
        paper=[*_paper(folder / "paper.csv")],
        cells=read_cell_table(folder / CELLS) if (folder / CELLS).exists() else None,
    )


def _experiments(folder: Path) -> list[Experiment]:
    """The experiments of a folder: trained networks, then look-ups with harder data last."""
    found = [read_experiment(path) for path in sorted(folder.glob("*.csv"))]
    found.sort(
        key=lambda e: (
            e.design.looked_up, e.design.condition or "", e.design.generator == ORACLE,
        )
    )  # fmt: skip
    return found


def read_experiment(path: Path) -> Experiment:
    """Reads the results file of one table.

    Raises:
        InputError: if it is damaged, or is not of one experiment.
    """
    rows = [_comparable(row) for row in read_results(path)]
    if not rows:
        raise InputError(f"{path} has no runs. Remove it, or copy the table's runs.csv again.")
    known = {(row.arm, row.seed) for row in rows}
    if len(known) < len(rows):
        raise InputError(
            f"{path} has two runs of one arm and seed. Each table and machine needs a file of its "
            "own."
        )
    for column in ("table", "dataset", "preset", "space", "condition"):
        values = {getattr(row, column) for row in rows}
        if len(values) > 1:
            raise InputError(
                f"{path} mixes experiments: {column} is {' and '.join(map(repr, values))}. Each "
                "table needs a file of its own."
            )
    _check_arms(path, rows)
    if rows[0].table not in TABLES:
        raise InputError(
            f"{path} is of the table {rows[0].table!r}, which this version does not know. It knows "
            f"{', '.join(TABLES)}."
        )
    return Experiment(design=_design(path, rows), rows=rows)


def _check_arms(path: Path, rows: Sequence[Row]) -> None:
    """Refuses an arm whose runs are not of one search."""
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    for arm, runs in by_arm.items():
        for column in ("method", "order", "generator", "settings"):
            values = list(dict.fromkeys(getattr(row, column) for row in runs))
            if len(values) > 1:
                raise InputError(
                    f"{path} mixes experiments: {column} of the arm {arm!r} is "
                    f"{' and '.join(map(repr, values))}. The seeds of an arm need one recipe, and "
                    "each table a file of its own."
                )


def _comparable(row: Row) -> Row:
    """The row without what says nothing of the experiment; earlier versions wrote it."""
    known = (setting.partition("=") for setting in (row.settings or "").split())
    settings = filter(None, (describe_setting(key, value) for key, _, value in known))
    condition = (row.condition or "").split()
    others = [part for part in condition if not part.startswith("data.conditions_apply_to=")]
    if row.rank is not None or not others:
        condition = others
    said = {"settings": " ".join(settings) or None, "condition": " ".join(condition) or None}
    return row.model_copy(update=said)


def _common_settings(rows: Sequence[Row]) -> list[str]:
    """The settings that all rows have, in their order."""
    known = [set((row.settings or "").split()) for row in rows]
    common = set.intersection(*known)
    return [setting for setting in (rows[0].settings or "").split() if setting in common]


def _begins_warm(row: Row, settings: Iterable[str]) -> bool:
    told = {key: value for key, _, value in (setting.partition("=") for setting in settings)}
    if "search.generator.init" in told:
        return True
    if (rounds := told.get("search.generator.warmup_rounds")) is not None:
        return float(rounds) > 0
    usual = _usual(row.preset, row.space, row.dataset)
    return usual is not None and usual.search.generator.begins_warm


@lru_cache
def _usual(preset: str, space: str, dataset: str) -> Recipe | None:
    """What a preset gives for a space and a data set; None if there is no such preset."""
    if preset not in PRESETS:
        return None
    return load_recipe(preset, space=space, overrides={"dataset": dataset})


def _design(path: Path, rows: Sequence[Row]) -> Design:
    first = rows[0]
    # Arms vary some of the settings, and some arms have no search or no generator.
    settings = _common_settings([row for row in rows if row.arm == METHOD] or rows)
    return Design(
        table=first.table,
        dataset=first.dataset,
        preset=first.preset,
        space=first.space,
        order=_one(row.order for row in rows),
        generator=_one(row.generator for row in rows),
        condition=first.condition,
        settings=" ".join(settings) or None,
        begins_warm=_begins_warm(first, settings),
        looked_up=looked_up(rows),
        device=", ".join(sorted({row.device for row in rows})),
        date=max(row.date for row in rows),
        source=path.name,
    )


def _one(values: Iterable[str | None]) -> str | None:
    """The value that all have which have one; None if there are several."""
    found = {value for value in values if value is not None}
    return found.pop() if len(found) == 1 else None


def _reported(path: Path) -> Iterator[ReportedArm]:
    for cells in _read(path):
        design = Design(
            table=cells["table"],
            dataset=cells["dataset"],
            preset=cells["preset"],
            space=cells["space"],
            order=cells["order"] or None,
            generator=cells["generator"] or None,
            condition=cells["condition"] or None,
            settings=cells["settings"] or None,
            begins_warm=False,  # they are of a version without a warm-up
            looked_up=False,
            device=cells["device"],
            date=cells["date"],
            source=path.name,
        )
        runs = int(cells["runs"])
        found = None
        if cells["against"]:
            found = _reported_comparison(path, cells, runs)
        yield ReportedArm(
            design=design,
            arm=cells["arm"],
            against=cells["against"],
            error=float(cells["error_mean_percent"]),
            deviation=float(cells["error_deviation"]),
            runs=runs,
            found=found,
            parameters=int(cells["parameters_mean"]),
            commit=cells["commit"],
        )


def _reported_comparison(path: Path, cells: Mapping[str, str], pairs: int) -> Comparison:
    if pairs >= least_pairs(1):
        raise InputError(
            f"{path}: a table of {pairs} seeds needs its single runs, as a file of their own in "
            "runs/."
        )
    # The interval is t's quantile times the standard error, which gives the deviation back.
    interval = float(cells["interval"])
    error = interval / float(student.ppf(0.975, pairs - 1))
    return Comparison(
        difference=float(cells["difference"]),
        deviation=error * math.sqrt(pairs),
        interval=interval,
        pairs=pairs,
    )


def _paper(path: Path) -> Iterator[PaperRow]:
    for cells in _read(path):
        yield PaperRow(
            item=cells["item"],
            data=cells["data"],
            space=cells["space"],
            order=cells["order"] or None,
            searched_on=cells["searched_on"],
            arm=cells["arm"],
            error=float(cells["test_error_percent"]),
            printed=" ± ".join(filter(None, (cells["test_error_percent"], cells["deviation"]))),
        )


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def mean(values: Iterable[float | None]) -> float:
    """The mean of what is there; NaN of nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
