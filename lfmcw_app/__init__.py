"""LFM-CW: learning from mistakes by class weighting, for differentiable architecture search."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfmcw_app.classifier import load_network
    from lfmcw_app.errors import InputError
    from lfmcw_app.from_python import run_search
    from lfmcw_app.own_datasets import register_dataset
    from lfmcw_app.runs import Run

__all__ = ["InputError", "Run", "load_network", "register_dataset", "run_search"]

PLACES = {
    "InputError": "lfmcw_app.errors",
    "Run": "lfmcw_app.runs",
    "load_network": "lfmcw_app.classifier",
    "register_dataset": "lfmcw_app.own_datasets",
    "run_search": "lfmcw_app.from_python",
}
"""Public name → its module."""


def __getattr__(name: str) -> Any:
    """Imports what is used, when it is: the package alone imports no torch."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
