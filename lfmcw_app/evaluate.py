"""`python -m lfmcw_app.evaluate GENOTYPE DATASET`: see commands/evaluate.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.evaluate import evaluate, main

__all__ = ["evaluate", "main"]

if __name__ == "__main__":
    main()
