"""`python -m lfmcw_app.predict RUN IMAGE...`: see commands/predict.py."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.predict import main, predict

__all__ = ["main", "predict"]

if __name__ == "__main__":
    main()
