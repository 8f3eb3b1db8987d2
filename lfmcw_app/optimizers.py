"""Which implementation of its step an optimizer uses: the one with the fewest kernels."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["step_options"]


def step_options(device: torch.device | str) -> dict[str, Any]:
    """Keyword arguments of a `torch.optim` optimizer of parameters on a device.

    A fused step takes all parameters in few kernels. On a CPU it rounds differently from the plain
    step, so there the one that does not is taken: operators on lists of tensors.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return {"fused": True}
    return {"foreach": True} if kind == "cpu" else {}
