"""Arms of an experiment with given errors."""

from __future__ import annotations

from lfmcw_app.comparison import Summary

__all__ = ["arm"]


def arm(label: str, *errors: float) -> Summary:
    """An arm with these errors of the seeds 0, 1, ..."""
    return Summary(
        label=label,
        errors=dict(enumerate(errors)),
        parameters=dict.fromkeys(range(len(errors)), 1000),
    )
