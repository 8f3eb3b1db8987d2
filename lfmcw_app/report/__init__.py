"""The report of a run as one self-contained page: `python -m lfmcw_app.report RUN_DIR`."""

from lfmcw_app.report.page import comparison_page, run_page, write_page, write_report
from lfmcw_app.report.reading import RunData, read_run

__all__ = ["RunData", "comparison_page", "read_run", "run_page", "write_page", "write_report"]
