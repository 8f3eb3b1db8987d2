"""Runs an `mlo` graph on Betty's `Engine`; its methods are engines here too."""

from mlo.betty.run import describe, run

__all__ = ["describe", "run"]
