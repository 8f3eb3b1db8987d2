"""`python -m mlo`: says which commands the library has."""

from __future__ import annotations

import argparse

import mlo

TEXT = """\
The library is imported: `import mlo`, or `from mlo import Problem, MultilevelOptimizer`.

What can be run:
  python -m mlo.info    prints versions, devices and engines, for a bug report or a first look
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m mlo",
        description=f"mlo {mlo.__version__}: multi-level optimization on PyTorch.",
        epilog=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
