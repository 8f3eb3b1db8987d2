"""`python -m lfmcw_app.worker`: makes one run after another, for `--launcher workers`.

Each line of the input is a command and its log file, as JSON: the command is what follows `python`,
`-m MODULE ARGUMENTS…`. It runs as in a separate process, but imported modules and the last data set
are kept. Each line of the output is the exit code of a command.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence

import torch

from lfmcw_app.kept_data import keeping_data
from lfmcw_app.parent_pipe import end_with_parent

__all__ = ["exit_code", "main"]


def exit_code(command: Sequence[str]) -> int:
    """Runs `-m MODULE ARGUMENTS…` in this process; returns the exit code of a separate process."""
    flag, module, *arguments = command
    if flag != "-m":
        raise ValueError(f"a worker runs `-m MODULE …`, got {flag!r}")
    before = sys.argv
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return _code(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:  # noqa: BLE001 - it ends the run, not those that follow
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
    return 0


def _code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)  # as the interpreter does
    return 1


def main() -> None:
    """Carries out the commands of the input, until it ends."""
    end_with_parent()

    # A run's output goes into its log, including what libraries write directly to the descriptors.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(nowhere, 0)
    own_errors = os.dup(2)

    # Ctrl-C reaches this process too. A run handles it; between runs the process that started this
    # one does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # Every run begins with the random numbers of a separate process.
    fresh = torch.get_rng_state()
    with keeping_data():
        for line in lines:
            command, log = json.loads(line)
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            torch.set_rng_state(fresh)
            code = exit_code(command)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(nowhere, 1)
            os.dup2(own_errors, 2)
            answers.write(f"{code}\n")


if __name__ == "__main__":
    main()
