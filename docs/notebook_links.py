"""Makes the links of notebooks lead to pages of the site, which mkdocs does for Markdown only."""

import re
from typing import Any


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page; a notebook's links to `.md` become `.html`."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'(href="(?![a-z]+:)[^"#]+)\.(?:md|ipynb)(?=["#])', r"\1.html", html)
