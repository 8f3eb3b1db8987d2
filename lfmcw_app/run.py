"""`python -m lfmcw_app.run DATASET`: see commands/run.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.run import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    main()
