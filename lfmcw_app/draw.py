"""`python -m lfmcw_app.draw GENOTYPE --out FILE`: see commands/draw.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.draw import draw, main

__all__ = ["draw", "main"]

if __name__ == "__main__":
    main()
