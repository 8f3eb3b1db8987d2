"""A table of all cells of a search space with their test errors, for regret and rank.

If every cell has been trained, a search need not train the cell that it finds: the error is read
from the table. All searches are measured by the same trainings, which have noise. The mean error of
a cell is over a few seeds. The best cell is the one with the lowest of these means, which is
somewhat too low. (Ying et al., NAS-Bench-101, 2019)
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lfmcw_app.errors import InputError, shown
from lfmcw_app.search_space.genotype import Cells

__all__ = ["CellTable", "TrainedCell"]


@dataclass(frozen=True, kw_only=True)
class TrainedCell:
    """What is known of the networks of a cell.

    Attributes:
        errors: seed of a training → test error in %.
        parameters: trainable parameters.
        multiply_adds: millions for one image.
    """

    errors: Mapping[int, float]
    parameters: int
    multiply_adds: float

    @property
    def mean(self) -> float:
        """Mean test error over the seeds, %."""
        return statistics.fmean(self.errors.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class CellTable:
    """The trained cells of a space.

    Attributes:
        name: of the file.
        space: name of the search space.
        nodes: of a cell, as `search.nodes` counts them.
        dataset: the data set that the networks were trained and tested on.
        expected: how many cells the space has, as the file says; `lookup.table_of` checks it.
        seeds: trainings that each cell has at least, once the table is complete.
        cells: notation → what is known of it.
        about: where the table comes from: key → value, for people.
    """

    name: str
    space: str
    nodes: int
    dataset: str
    expected: int
    seeds: int
    cells: Mapping[str, TrainedCell]
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether as many cells are there as are expected, with all their trainings."""
        return self.trainings == self.expected * self.seeds

    @property
    def trainings(self) -> int:
        """How many are there of those that make the table complete."""
        return sum(min(len(cell.errors), self.seeds) for cell in self.cells.values())

    def trained(self, cells: Cells) -> TrainedCell:
        """What is known of some cells.

        Raises:
            InputError: if the table does not hold them.
        """
        notation = cells.notation()
        if notation not in self.cells:
            raise InputError(
                f"{self.name} does not hold the cell {shown(notation)}, only "
                f"{len(self.cells):,} others of the space {self.space} with {self.nodes} nodes. "
                "Name one of its cells, or train this one without --lookup."
            )
        return self.cells[notation]

    def error(self, cells: Cells) -> float:
        """Test error in %, the mean over the seeds."""
        return self.trained(cells).mean

    def regret(self, cells: Cells) -> float:
        """The error minus that of the best cell, in percentage points; 0 for the best."""
        return self.error(cells) - self.cells[self.best].mean

    def rank(self, cells: Cells) -> int:
        """1 for the best cell; cells with equal errors share the best of their ranks."""
        error = self.error(cells)
        return 1 + sum(other < error for other in self._means.values())

    @cached_property
    def best(self) -> str:
        """The notation of the cell with the lowest mean error in the table."""
        return min(self._means, key=self._means.__getitem__)

    @cached_property
    def _means(self) -> dict[str, float]:
        return {notation: cell.mean for notation, cell in self.cells.items()}
