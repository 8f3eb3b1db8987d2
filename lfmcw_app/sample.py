"""`python -m lfmcw_app.sample RUN`: see commands/sample.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.sample import main, sample

__all__ = ["main", "sample"]

if __name__ == "__main__":
    main()
