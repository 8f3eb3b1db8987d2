"""Chooses the implementation of an optimizer's step that has the fewest kernels."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["step_options"]


def step_options(device: torch.device | str) -> dict[str, Any]:
    """Keyword arguments of a `torch.optim` optimizer for parameters on a device.

    A fused step updates all parameters in few kernels. On a CPU it rounds differently from the
    plain step, so operators on lists of tensors are used there, which round like the plain step.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return {"fused": True}
    return {"foreach": True} if kind == "cpu" else {}
