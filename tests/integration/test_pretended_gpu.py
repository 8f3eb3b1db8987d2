"""The tests of a pretended GPU, and those of tests/gpu on it, in a process of their own.

They change what PyTorch's tensors say of themselves. So no other test runs in that process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

ON_THE_PRETENDED_GPU = (
    "pretended_gpu",
    "gpu/test_engines_on_the_device.py",
    "gpu/test_search_on_the_device.py",
    "gpu/test_runs_on_the_device.py",
)
"""Without Triton's kernels, NCCL, and the search that is killed in a process of its own."""

LEFT_OUT = "not killed and not trilevel and not layered"
"""The two problems take most of the time, and show what the others of their kind show."""


@pytest.mark.slow
def test_all_of_this_holds_on_a_pretended_gpu():
    """Nothing is skipped: a GPU is there as far as the tests can tell."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        + [str(TESTS / place) for place in ON_THE_PRETENDED_GPU]
        + ["-k", LEFT_OUT],
        env={**os.environ, "PRETENDED_GPU": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert "skipped" not in last
    assert int(re.search(r"(\d+) passed", last)[1]) > 90
