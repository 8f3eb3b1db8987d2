"""Makes a page of each notebook in docs/notebooks, with what its cells show, for the site.

The page is Markdown like any other: code can be copied, links are checked, colours follow the page.
Nothing is executed (`make notebooks` does that) and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

__all__ = ["on_files", "on_page_markdown", "page_of"]

TO_A_NOTEBOOK = re.compile(r"\]\(((?:notebooks/)?\w+)\.ipynb\)")
"""A link to a notebook, which leads to its page here."""

DOWNLOAD = "[Download this notebook]"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages; the notebooks stay beside them, to be downloaded."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            page = page_of(json.loads(file.content_string), file.name)
            uri = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, uri, content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leads links to notebooks, which lead to the files in a checkout, to their pages."""
    return markdown if DOWNLOAD in markdown else TO_A_NOTEBOOK.sub(r"](\1.md)", markdown)


def page_of(notebook: dict[str, Any], name: str) -> str:
    """Returns a notebook as Markdown.

    Args:
        notebook: the content of the file, format 4.
        name: of the file, without its ending.
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(TO_A_NOTEBOOK.sub(r"](\1.md)", source))
            continue
        parts.append(_fenced("python", source))
        parts += [_shown(output) for output in cell["outputs"]]
    parts.append(f"{DOWNLOAD}({name}.ipynb)")
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    """What a cell shows: a picture, else HTML, else text."""
    if output["output_type"] == "stream":
        return _fenced("text", "".join(output["text"]))
    data = {kind: "".join(content) for kind, content in output["data"].items()}
    if "image/png" in data:
        source = f"data:image/png;base64,{''.join(data['image/png'].split())}"
        return f'<img class="shown" alt="Picture by the code above" src="{source}">'
    if "text/html" in data:  # on one line: a blank one would end it
        return f'<div class="shown">{" ".join(data["text/html"].split())}</div>'
    return _fenced("text", data["text/plain"])


def _fenced(language: str, text: str) -> str:
    """A block of code; its fence is longer than any in it."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
