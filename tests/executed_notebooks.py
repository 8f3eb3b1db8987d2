"""The notebooks of docs/notebooks: executed in a folder of their own, and compared.

    make notebooks    # executes them anew, and writes what they show

A cell with the tag "varies" shows times, or what a training on another machine may end at. Of such
a cell only the kinds of its outputs are compared.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def execute(notebook, folder):
    """Executes all cells of a notebook in a folder; an error in a cell is raised.

    Args:
        notebook: of nbformat; its outputs are replaced.
        folder: where its files go.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = joined(cell["outputs"])


def joined(outputs):
    """The outputs with the pieces of a stream joined: where it was cut is chance."""
    found = []
    for output in outputs:
        is_stream = output["output_type"] == "stream"
        if is_stream and found and found[-1].get("name") == output["name"]:
            found[-1]["text"] += output["text"]
        else:
            found.append(output)
    return found


def environment():
    """What a notebook sees: this checkout, this Python for `!python`, one thread."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    binaries = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    changed = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join(binaries),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "90",
        "TERM": "dumb",  # what commands print has no colours
    }
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return kept | changed


def varies(cell):
    """Whether what a cell shows depends on the machine."""
    return "varies" in cell["metadata"].get("tags", ())


def shown(cell):
    """What a cell shows: pairs of a kind and a text, the text of a picture empty."""
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found.append((output["name"], "".join(output["text"])))
            continue
        for kind, data in sorted(output["data"].items()):
            found.append((kind, "".join(data) if kind.startswith("text/") else ""))
    return found


def split_numbers(text):
    """A text with its numbers taken out, and the numbers."""
    numbers = [float(number) for number in re.findall(NUMBER, text)]
    return " ".join(re.sub(NUMBER, "#", text).split()), numbers


def main():
    """Executes the notebooks anew."""
    import nbformat

    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        with TemporaryDirectory() as folder:
            execute(notebook, folder)
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
