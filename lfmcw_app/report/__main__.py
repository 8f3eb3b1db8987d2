"""`python -m lfmcw_app.report RUN_DIR`: see commands/report.py."""

from lfmcw_app.commands.report import main

if __name__ == "__main__":
    main()
