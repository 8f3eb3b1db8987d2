"""The one device of the GPU tests: skipped in a visible line where there is none, a failure under
REQUIRE_GPU=1.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    message = "NO GPU: kernels not verified on hardware"
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail(message)
    pytest.skip(message)
