"""Tables, and how they look in the terminal and in Markdown."""

import io
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is a name, the others are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def to_markdown(tables: Sequence[Table]) -> str:
    """GitHub's tables under headings."""
    lines = []
    for table in tables:
        lines += [f"## {table.title}", ""]
        lines += ["| " + " | ".join(table.columns) + " |"]
        lines += ["|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        lines += ["", *(note + "\n" for note in table.notes)]
    return "\n".join(lines)


def to_text(tables: Sequence[Table], width: int = 118) -> str:
    """For the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    for table in tables:
        drawn = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for i, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        for note in table.notes:
            console.print(note)
    return out.getvalue()
