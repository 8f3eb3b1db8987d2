"""Groups of processes with a GPU each, by NCCL; tests/integration/test_device_processes.py does the
same with gloo.
"""

from __future__ import annotations

import pytest
import torch
from device_processes import check_group


@pytest.mark.parametrize("size", [1, 2])
def test_a_group_on_gpus_equals_one_process(device, size, tmp_path):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    check_group(size, device.type, tmp_path)
