"""The report of a run as one self-contained page: `python -m lfmcw_app.report RUN_DIR`."""
