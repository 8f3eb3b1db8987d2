"""LFM-CW: learning from mistakes by class weighting, for differentiable architecture search."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfmcw_app.classifier import load_network

__all__ = ["load_network"]


def __getattr__(name: str) -> Any:
    """Imports what is used, when it is: the package alone imports no torch."""
    if name == "load_network":
        from lfmcw_app.classifier import load_network

        return load_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
