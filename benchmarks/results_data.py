"""Reads the committed results (docs/data) and compares arms: what docs/results.md is made of.

    docs/data/runs/*.csv   one row per run, in the schema of `lfmcw_app.results_file`; a file is the
                           runs.csv of one `lfmcw_app.table`, so one experiment
    docs/data/summaries.csv    means and intervals of tables whose single runs are not kept
    docs/data/paper.csv        what the paper reports
    docs/data/nasbench201_3_nodes_cifar10.csv    every cell of a small space, trained
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from scipy.stats import t as student

from lfmcw_app.cell_table import CellTable
from lfmcw_app.cell_table_file import read_cell_table
from lfmcw_app.comparison import Comparison, Summary, compare
from lfmcw_app.errors import InputError
from lfmcw_app.results_file import Row, read_results

METHOD, BASELINE = "LFM-CW", "no LFM-CW"
UNIFORM, NO_WEIGHT, RANDOM = "uniform class weights", "λ = 0", "random cells"
LONGER = "no LFM-CW, 4 times the rounds"
SYNTHETIC, BOTH = "generated images only", "generated and real images"
ORACLE = "real"
"""`search.generator.name` of the oracle, which draws training images instead of making some."""

CELLS = "nasbench201_3_nodes_cifar10.csv"

DATASETS = {
    "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG)",
    "cifar100": "CIFAR-100", "imagenet": "ImageNet",
}  # fmt: skip
SPACES = {
    "darts": "DARTS", "pdarts": "P-DARTS", "pcdarts": "PC-DARTS", "nasbench201": "NAS-Bench-201",
}  # fmt: skip
GENERATORS = {
    "dcgan": "DCGAN", "wgan_gp": "WGAN-GP", "biggan": "BigGAN", ORACLE: "real images drawn",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Design:
    """What the arms of an experiment have in common; None where they differ or have none.

    Attributes:
        table: name of the table of `lfmcw_app.table`.
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
    looked_up: bool
    device: str
    date: str
    source: str

    @property
    def title(self) -> str:
        """Names the experiment; `distinct_titles` adds what tells it from others."""
        parts = [DATASETS.get(self.dataset, self.dataset), SPACES.get(self.space, self.space)]
        parts += ["look-up"] if self.looked_up else [self.preset]
        parts += [f"{self.order} order"] if self.order else []
        parts += [GENERATORS.get(self.generator, self.generator)] if self.generator else []
        parts += [self.condition] if self.condition else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """An arm minus another one, in one experiment.

    Attributes:
        design: of the experiment.
        arm: its label.
        against: label of the arm that it is compared with.
        found: difference of the test errors, percentage points; negative: the arm is better.
        error: mean test error of the arm over its runs, %.
        error_against: that of the other one.
    """

    design: Design
    arm: str
    against: str
    found: Comparison
    error: float
    error_against: float

    @property
    def relative(self) -> float:
        """The difference as a share of the other arm's error, %."""
        return 100 * self.found.difference / self.error_against

    @property
    def excluded_gain(self) -> float:
        """A gain above this, percentage points, is outside the 95% interval; at least 0."""
        return max(0.0, self.found.interval - self.found.difference)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The runs of one table.

    Attributes:
        design: what they have in common.
        arms: label → its runs, by seed.
    """

    design: Design
    arms: Mapping[str, Mapping[int, Row]]

    def summary(self, label: str) -> Summary:
        """The errors and parameters of an arm."""
        runs = self.arms[label]
        parameters = {s: row.parameters for s, row in runs.items() if row.parameters is not None}
        errors = {seed: row.test_error_percent for seed, row in runs.items()}
        return Summary(label=label, errors=errors, parameters=parameters)

    def effect(self, arm: str, against: str) -> Effect | None:
        """An arm against another one, paired by seed; None where no seed has both."""
        if arm not in self.arms or against not in self.arms:
            return None
        first, second = self.summary(arm), self.summary(against)
        found = compare(first, second)
        if not found.pairs:
            return None
        shared = set(first.errors) & set(second.errors)
        means = [
            sum(summary.errors[seed] for seed in shared) / len(shared)
            for summary in (first, second)
        ]
        return Effect(
            design=self.design,
            arm=arm,
            against=against,
            found=found,
            error=means[0],
            error_against=means[1],
        )


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
    """A figure of the paper: an error in %, its standard deviation where one is given."""

    item: str
    data: str
    space: str
    order: str | None
    searched_on: str
    arm: str
    error: float
    deviation: float | None


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
    cells: CellTable | None = field(default=None, compare=False)

    def effects(self, arm: str, against: str) -> list[Effect]:
        """All comparisons of two arms, in the order of the files."""
        found = [experiment.effect(arm, against) for experiment in self.experiments]
        known = [effect for effect in found if effect is not None]
        return [*known, *self._reported_effects(arm, against)]

    def _reported_effects(self, arm: str, against: str) -> Iterator[Effect]:
        # A table reports differences from its first arm only. One of them may be the arm itself.
        for line in self.reported:
            if line.found is None or {line.arm, line.against} != {arm, against}:
                continue
            first = next(
                other
                for other in self.reported
                if other.arm == line.against and other.design.table == line.design.table
                and other.found is None
            )  # fmt: skip
            turned = line.arm != arm
            found = line.found
            if turned:
                found = replace(found, difference=-found.difference)
            method = line if line.arm == METHOD else first
            errors = (first.error, line.error) if turned else (line.error, first.error)
            yield Effect(
                design=replace(line.design, generator=method.design.generator),
                arm=arm,
                against=against,
                found=found,
                error=errors[0],
                error_against=errors[1],
            )

    @cached_property
    def titles(self) -> dict[Design, str]:
        """Design → a title that no other one has."""
        designs = [experiment.design for experiment in self.experiments]
        for arm, against in self._reported_pairs:
            designs += [effect.design for effect in self._reported_effects(arm, against)]
        return distinct_titles(designs)

    @property
    def _reported_pairs(self) -> set[tuple[str, str]]:
        return {(line.arm, line.against) for line in self.reported if line.found is not None}

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of a small file of the folder."""
        return _read(self.folder / name)


def distinct_titles(designs: Iterable[Design]) -> dict[Design, str]:
    """Design → its title, with settings, device or file where others would have the same."""
    titles = {design: design.title for design in designs}
    for detail in ("settings", "device", "table", "source"):
        shown = list(titles.values())
        for design, title in titles.items():
            more = getattr(design, detail)
            if shown.count(title) > 1 and more:
                titles[design] = f"{title}, {more}"
    return titles


def read_all(folder: Path) -> Results:
    """Reads docs/data, or another folder of the same shape; what is not there is left out.

    Raises:
        InputError: if a file is damaged.
    """
    return Results(
        folder=folder,
        experiments=[read_experiment(path) for path in sorted((folder / "runs").glob("*.csv"))],
        reported=[*_reported(folder / "summaries.csv")],
        paper=[*_paper(folder / "paper.csv")],
        cells=read_cell_table(folder / CELLS) if (folder / CELLS).exists() else None,
    )


def read_experiment(path: Path) -> Experiment:
    """Reads the results file of one table.

    Raises:
        InputError: if it is damaged, or is not of one experiment.
    """
    rows = read_results(path)
    if not rows:
        raise InputError(f"{path} has no runs. Remove it, or copy the table's runs.csv again.")
    arms: dict[str, dict[int, Row]] = {}
    for row in rows:
        seeds = arms.setdefault(row.arm, {})
        if row.seed in seeds:
            raise InputError(
                f"{path} has two runs of the arm {row.arm!r} with seed {row.seed}. Each table and "
                "machine needs a file of its own."
            )
        seeds[row.seed] = row
    for column in ("table", "dataset", "preset", "space", "condition"):
        values = {getattr(row, column) for row in rows}
        if len(values) > 1:
            raise InputError(
                f"{path} mixes experiments: {column} is {' and '.join(map(repr, values))}. Each "
                "table needs a file of its own."
            )
    return Experiment(design=_design(path, rows), arms=arms)


def _design(path: Path, rows: Sequence[Row]) -> Design:
    first = rows[0]
    # Arms vary some of the settings, and some arms have no search or no generator.
    common = [row for row in rows if row.arm in (METHOD, BASELINE)] or rows
    return Design(
        table=first.table,
        dataset=first.dataset,
        preset=first.preset,
        space=first.space,
        order=_one(row.order for row in rows),
        generator=_one(row.generator for row in rows),
        condition=first.condition,
        settings=_one(row.settings for row in common),
        looked_up=any(row.rank is not None for row in rows),
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
            looked_up=False,
            device=cells["device"],
            date=cells["date"],
            source=path.name,
        )
        runs = int(cells["runs"])
        found = None
        if cells["against"]:
            found = _reported_comparison(
                float(cells["difference"]), float(cells["interval"]), float(cells["detectable"]),
                runs,
            )  # fmt: skip
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


def _reported_comparison(
    difference: float, interval: float, detectable: float, pairs: int
) -> Comparison:
    # The interval is t's quantile times the standard error, which gives the p-value back.
    freedom = pairs - 1
    error = interval / float(student.ppf(0.975, freedom))
    return Comparison(
        difference=difference,
        interval=interval,
        p_value=2 * float(student.sf(abs(difference) / error, freedom)),
        detectable=detectable,
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
            deviation=float(cells["deviation"]) if cells["deviation"] else None,
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
