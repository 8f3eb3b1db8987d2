"""Tables as a notebook shows them: plain HTML in the page's own colours."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table_html"]


def table_html(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table as HTML; whatever is in it is shown as text.

    Args:
        title: stands over the table.
        headings: one per column; empty where each row begins with its own.
        rows: their cells; None is an empty one.
    """
    from html import escape  # slow to import, for its table of entities

    def cells(row: Sequence[object], tag: str) -> str:
        texts = ["" if cell is None else escape(str(cell)) for cell in row]
        return "".join([f'<{tag} style="text-align:left">{text}</{tag}>' for text in texts])

    lines = [f"<tr>{cells(headings, 'th')}</tr>"] if headings else []
    lines += [f"<tr>{cells(row, 'td')}</tr>" for row in rows]
    return f"<table><caption>{escape(title)}</caption>{''.join(lines)}</table>"
