"""`python -m lfmcw_app.report RUN_DIR`: see commands/report.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.report import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
