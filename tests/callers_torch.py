"""States of torch that a program may be in when it calls the application."""

from __future__ import annotations

from contextlib import contextmanager

import torch


@contextmanager
def _float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _meta():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


CALLERS = {
    "default dtype float64": _float64,
    "default device meta": _meta,
    "in torch.device": lambda: torch.device("meta"),
    "in autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "in no_grad": torch.no_grad,
    "in inference_mode": torch.inference_mode,
}
"""Name of a state → makes a context that is in it."""


def caller(name):
    """The context of a name in `CALLERS`."""
    return CALLERS[name]()
