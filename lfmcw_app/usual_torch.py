"""Torch's own defaults, for what the application computes inside a program that has set others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["usual_torch"]


@contextmanager
def usual_torch() -> Iterator[None]:
    """Runs the body with torch's own defaults, and restores the calling program's after it.

    These are float32 as the default dtype, the CPU as the default device, no autocast, and
    gradients. Networks and statistics are made with the first two, and mlo chooses the precision of
    each loss itself. A program that has set others would get other numbers, or errors that do not
    say why. The random states are left alone, since another thread may draw from them meanwhile.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        # The default dtype belongs to the whole process, the others to this thread.
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield
