"""`python -m mlo.info`: versions, devices and engines, for a bug report or a first look.

Each engine is listed with the first line of its docstring, and with its products where these are
not exact.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import mlo

__all__ = ["describe", "main"]

OPTIONAL = ("betty-ml", "triton", "numpy")


def describe() -> str:
    """Returns what `python -m mlo.info` prints."""
    rows = [
        ("mlo", mlo.__version__),
        ("python", sys.version.split()[0]),
        ("torch", torch.__version__),
        *((package, _version(package)) for package in OPTIONAL),
        ("platform", platform.platform()),
        ("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        *_accelerators(),
    ]
    lines = [f"{name:<10} {value}" for name, value in rows]
    lines += ["", "engines (hypergradient=NAME):"]
    lines += [f"  {name:<14} {_engine(name)}" for name in mlo.available_engines()]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("cuda", f"none (torch is built for {torch.version.cuda or 'the CPU only'})")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(
            (
                f"cuda:{index}",
                f"{properties.name}, {memory}, compute {properties.major}.{properties.minor}",
            )
        )
    return found


def _engine(name: str) -> str:
    """What an engine is; or, for a registered one that cannot be made without options, why."""
    try:
        engine = mlo.engine_from(name)
    except mlo.EngineError as error:
        return " ".join(str(error).split()).partition(". ")[0]
    first = (inspect.getdoc(type(engine)) or "").partition("\n\n")[0]
    products = ""
    if isinstance(engine, mlo.Engine) and not isinstance(engine.products, mlo.Autograd):
        products = f" [{engine.products.name}]"
    return " ".join(first.split()) + products


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m mlo.info",
        description="Prints versions, devices, and each engine with what it does.",
        epilog="It takes no arguments. Put what it prints into a bug report.",
    )
    parser.parse_args()
    print(describe())


if __name__ == "__main__":
    main()
