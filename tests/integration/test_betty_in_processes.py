"""Betty's `strategy="distributed"` on two processes, against one process on the whole batches."""

from __future__ import annotations

import betty_in_processes
import pytest
import torch
from several_processes import launch

from mlo.testing import relative_error


# Its weights are of detached losses, as in Meta-Weight-Net, and Neumann's series solves.
@pytest.mark.filterwarnings("ignore:Problem 'low'.* is not that of its value:mlo.SolveWarning")
@pytest.mark.slow
def test_two_processes_end_where_one_does_on_the_whole_batches(tmp_path):
    launch(2, tmp_path, betty_in_processes.__file__)
    alone, steps = betty_in_processes.program(2, strategy="cpu")
    found = [torch.load(tmp_path / f"betty{rank}.pt") for rank in (0, 1)]
    assert torch.equal(found[0][0], found[1][0])
    assert relative_error(found[0][0], alone) < 1e-12
    # The first process validates, and the others stop with it.
    assert [each[1] for each in found] == [steps, steps] == [8, 8]
