"""`python -m lfmcw_app.export RUN --to FORMAT`: see commands/export.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.export import export, main

__all__ = ["export", "main"]

if __name__ == "__main__":
    main()
