"""What tests/gpu/test_nccl.py does on GPUs, on the CPU with gloo."""

from __future__ import annotations

import pytest
from device_processes import check_group


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_group_on_the_cpu_equals_one_process(size, tmp_path):
    check_group(size, "cpu", tmp_path)
