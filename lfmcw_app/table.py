"""`python -m lfmcw_app.table NAME`: see commands/table.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.table import main, table

__all__ = ["main", "table"]

if __name__ == "__main__":
    main()
