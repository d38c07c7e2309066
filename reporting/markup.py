"""HTML from text: everything that comes from a file is escaped here."""

import html
from typing import Any

from reporting.journal import is_number
from reporting.runs import Table, format_value


def paragraph(content: str, css_class: str = "") -> str:
    """A paragraph of text."""
    return f'<p class="{css_class}">{html.escape(content)}</p>'


def cell(value: Any) -> str:
    """A table cell. A number is sorted by its value."""
    content = html.escape(format_value(value))
    if is_number(value):
        exact = repr(value).replace("inf", "Infinity")
        return f'<td class="number" data-value="{exact}" title="{exact}">{content}</td>'
    return f"<td>{content}</td>"


def table(rows: Table) -> str:
    """A table that a click on a column head sorts."""
    header, *rows = rows
    head = "".join(f"<th tabindex=0>{html.escape(format_value(name))}</th>" for name in header)
    body = ""
    for row in rows:
        body += f"<tr>{''.join(map(cell, row))}</tr>"
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{content}</table></div>'
