"""`python -m lfmcw_app COMMAND`: all commands; each is a module of its own too."""

from lfmcw_app.commands.interrupts import answered_interrupts

with answered_interrupts():
    from lfmcw_app.commands.draw import draw
    from lfmcw_app.commands.evaluate import evaluate
    from lfmcw_app.commands.execution import main_of
    from lfmcw_app.commands.export import export
    from lfmcw_app.commands.predict import predict
    from lfmcw_app.commands.report import report
    from lfmcw_app.commands.run import run
    from lfmcw_app.commands.sample import sample
    from lfmcw_app.commands.table import table

COMMANDS = (run, evaluate, predict, export, sample, report, draw, table)


def main() -> None:
    """Entry point."""
    main_of(*COMMANDS, help="LFM-CW: search for the cell of a network, and use what was found.")


if __name__ == "__main__":
    main()
