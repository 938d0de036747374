"""What every section of the page is written with: paragraphs and tables as HTML, their texts escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def text(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: frozenset[int]) -> str:
    """A table; columns in `numbers` are set to the right."""

    def cells(tag: str, row: Sequence[object]) -> str:
        parts = (
            f"<{tag}{' class=n' if i in numbers else ''}>{escape(str(cell))}</{tag}>"
            for i, cell in enumerate(row)
        )
        return "<tr>" + "".join(parts) + "</tr>"

    return "<table>" + cells("th", head) + "\n".join(cells("td", row) for row in rows) + "</table>"
