"""Where commands print, and tables that fit: never a broken row, never a cut number."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from pipeline.language.say import say, spoken, translated

UNLIMITED = 10_000
PROSE = 24
"""Columns of the terminal that running text takes at least."""
LABEL = 26
"""Those that the labels of a matrix take at most."""


@dataclass(frozen=True)
class Row:
    """Of a matrix: a label and a cell for each column, which may have several lines."""

    label: str
    cells: Sequence[str | Text]
    style: str = ""


def make_console() -> Console:
    """As wide as the terminal. No escape codes where NO_COLOR is set (https://no-color.org), in a dumb terminal, or in
    a pipe."""
    console = Console(color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)
    if console.is_dumb_terminal:  # rich takes these to be 80 columns wide
        console.size = shutil.get_terminal_size()
    console.push_render_hook(_Trim())
    return console


class _Trimmed:
    """What is printed, without the blanks with which rich fills a line up."""

    def __init__(self, shown: ConsoleRenderable) -> None:
        self.shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        held: list[Segment] = []
        for segment in console.render(self.shown, options):
            first, *others = segment.text.split("\n")
            held.append(segment._replace(text=first))
            for text in others:
                yield from _trim(held)
                yield Segment.line()
                held = [segment._replace(text=text)]
        yield from held


def _trim(line: list[Segment]) -> list[Segment]:
    while line and not line[-1].text.strip(" "):
        line.pop()
    return [*line[:-1], line[-1]._replace(text=line[-1].text.rstrip(" "))] if line else []


class _Trim(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Trimmed(shown) for shown in renderables]


def print_rows(table: Table, console: Console, names: int = 1) -> None:
    """A table whose rows stay whole. Where it is too wide, each cell stands on a line of its own.

    A column without no_wrap holds running text, which may go on in the next line. names: the first columns, which say
    what a row is about; the cells below them are told with their headings."""
    title, table.title = table.title, None
    if title:
        console.print(title, style="italic")
    for column in table.columns:
        _hold(column, console)
    if _least(table, console) <= console.width:
        console.print(table)
        return
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for index, (column, cell) in enumerate(zip(table.columns, cells, strict=True)):
            if cell:
                text = cell if isinstance(cell, Text) else Text.from_markup(str(cell), style=column.style)
                heading = say("{heading}: ", heading=column.header) if column.header and index >= names else ""
                console.print(Padding(Text(heading, style="dim") + text, (0, 0, 0, 2 * min(index, names))))


def print_matrix(corner: str, names: Sequence[str], rows: Sequence[Row], console: Console) -> None:
    """A column for each name. Where they are too many, they stand in several tables, one below the other."""
    left = list(range(len(names)))
    while left:
        for count in range(len(left), 0, -1):
            table = _matrix(corner, names, rows, left[:count], console)
            if _least(table, console) <= console.width:
                break
        console.print(table)
        left = left[count:]
        if left:
            console.print()


def counted(number: int, what: str) -> str:
    """1 row, 2 rows."""
    return f"1 {what}" if number == 1 and spoken() == "en" else translated(f"{{n}} {what}s").format(n=number)


def _matrix(corner: str, names: Sequence[str], rows: Sequence[Row], chosen: list[int], console: Console) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(corner, max_width=min(LABEL, console.width // 2 - 2))
    for index in chosen:
        table.add_column(names[index].replace(", ", ",\n"), justify="right", no_wrap=True)
    for row in rows:
        if any(row.cells[index] for index in chosen):
            table.add_row(row.label, *(row.cells[index] for index in chosen), style=row.style)
    for column in table.columns:
        _hold(column, console)
    return table


def _hold(column: Column, console: Console) -> None:
    """Have rich give a column the width that its cells need, and break running text where it has no spaces, as Chinese
    does: rich would cut it."""
    if not column.no_wrap:
        column.overflow = "fold"
    widest = max(_measure(cell, console).maximum for cell in (column.header, *column.cells))
    least = widest if column.no_wrap else min(PROSE, widest)
    column.min_width = least if column.max_width is None else min(least, column.max_width)


def _least(table: Table, console: Console) -> int:
    return _measure(table, console).minimum


def _measure(shown: RenderableType, console: Console) -> Measurement:
    return Measurement.get(console, console.options.update(max_width=UNLIMITED), shown)
