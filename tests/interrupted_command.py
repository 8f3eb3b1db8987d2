"""`lfmcw_app.run` in a process that sends itself a signal after so many lines of metrics.

    python interrupted_command.py SIGSTOP 3 digits --preset smoke …

So a run is killed, or held still, at the same place however busy the machine is, and one that is
asked to stop is not given up. The judge of generated images has few steps, as in `tiny_runs`, since
it would take most of the time.
"""

from __future__ import annotations

import os
import signal
import sys

JUDGE_STEPS = 10


def command(number, lines, *arguments):
    """The command of such a run.

    Args:
        number: of the signal.
        lines: of metrics, after which it is sent.
        arguments: of `lfmcw_app.run`.
    """
    return [sys.executable, __file__, signal.Signals(number).name, lines, *arguments]


def is_held(process):
    """Whether a process has been stopped by SIGSTOP."""
    how = os.WSTOPPED | os.WNOWAIT | os.WNOHANG
    return os.waitid(os.P_PID, process.pid, how) is not None


def main():
    from started_processes import PATIENCE

    from lfmcw_app import generator_quality, stopping
    from lfmcw_app.commands.run import main as run
    from lfmcw_app.run_folder import RunFolder

    name, lines, *arguments = sys.argv[1:]
    log, left = RunFolder.log, int(lines)

    def logging(self, entry):
        nonlocal left
        log(self, entry)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), getattr(signal, name))

    RunFolder.log = logging
    generator_quality.STEPS = JUDGE_STEPS
    stopping.GRACE = PATIENCE
    sys.argv = [sys.argv[0], *arguments]
    run()


if __name__ == "__main__":
    main()
