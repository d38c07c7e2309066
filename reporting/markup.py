"""HTML from text: whatever comes from a file is escaped here."""

import base64
import html
from typing import Any

from reporting.runs import is_number, text


class Markup(str):
    """HTML that is escaped already."""


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of text, in a CSS class."""
    return f'<p class="{kind}">{html.escape(words)}</p>'


def cell(value: Any, words: str | None = None) -> Markup:
    """A cell of a table: a number is shown to four digits, or as `words`, and sorted by its value."""
    if isinstance(value, Markup):
        return value
    if not is_number(value):
        short = ' class="short"' if len(text(value)) <= 30 else ""
        return Markup(f"<td{short}>{html.escape(text(value))}</td>")
    exact = repr(value).replace("inf", "Infinity")
    return Markup(
        f'<td class="number" data-value="{exact}" title="{exact}">{html.escape(words or text(value))}</td>'
    )


def table(header: list[str], rows: list[list[Any]], best: int | None = None) -> str:
    """A table that a click on its head sorts; the row `best` is bold."""
    head = "".join(f"<th>{html.escape(text(name))}</th>" for name in header)
    body = "".join(
        f"<tr{' class=best' * (i == best)}>{''.join(map(cell, row))}</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, content: str, opened: bool = False) -> str:
    """Markup that a click on its summary shows or hides."""
    return (
        f"<details{' open' * opened}><summary>{html.escape(summary)}</summary>{content}</details>"
    )


def picture(png: bytes, kind: str) -> str:
    """A PNG file as part of the page, in a CSS class."""
    return (
        f'<img class="{kind}" alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 example, 2 examples."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
