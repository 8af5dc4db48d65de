"""Tables of text (.csv, .tsv) as rows."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.contracts import Row
from pipeline.data.dialogues import Unreadable
from pipeline.errors import UserError

Placed = tuple[str, Row | Unreadable]
STRAY = re.compile("[\udc80-\udcff]")
NESTED = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools", "history")
"""Columns of a table whose text may be a JSON list of messages."""
KNOWN_COLUMNS = {
    *NESTED, "conversation", "chosen_messages", "rejected_messages", "kto_tag", "text", "label", "labels",
    "instruction", "input", "output", "response", "context", "question", "answer", "answers", "system",
}  # fmt: skip
"""Names that some format or stage reads."""


def read_table(file: Path, lines: Iterator[str], tabs: bool) -> Iterator[Placed]:
    """Rows by the names of the header, each with the place of its first line. Raises UserError, or csv.Error."""
    csv.field_size_limit(sys.maxsize)
    header = next(lines, "")
    # Spreadsheets write semicolons where the comma is the decimal mark.
    other = next((mark for mark in ";\t" if mark in header), ",")
    delimiter = "\t" if tabs else "," if "," in header else other
    reader = csv.DictReader(chain([header], lines) if header else lines, delimiter=delimiter, strict=True)
    columns = _in_our_capitals(list(reader.fieldnames or []))
    reader.fieldnames = columns
    if STRAY.search("".join(columns)):
        raise UserError(f"{file}:1: the header {not_utf8('in a name')}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{file}:1: two columns have the same name: {', '.join(columns)}")
    last = 1
    try:
        for row in reader:
            # A quoted field runs over several lines; the row is named by its first.
            place, last = f"{file}:{last + 1}", reader.line_num
            if torn := next((column for column, text in row.items() if STRAY.search(str(text))), None):
                yield place, not_utf8(f"column '{torn}'")
            elif None in row:
                yield place, Unreadable("has more fields than the header")
            elif None in row.values():
                yield place, Unreadable("has fewer fields than the header")
            else:
                yield place, {column: _parse_cell(column, text) for column, text in row.items()}
    except csv.Error as error:
        raise UserError(
            f"{file}:{last + 1}: a quote opens here and is not closed as CSV requires ({error}). "
            "Double the quotes inside a field, or use .jsonl"
        ) from error


def _in_our_capitals(columns: list[str]) -> list[str]:
    """A column's name as OneBase writes it, where only the capitals differ and no other column has that name."""
    lower = [column.strip().lower() for column in columns]
    return [
        ours if ours in KNOWN_COLUMNS and lower.count(ours) == 1 else column
        for column, ours in zip(columns, lower, strict=True)
    ]


def _parse_cell(column: str, text: str) -> Any:
    """A table holds text; messages are read out of it, and so is a label that is true or false."""
    if column in ("label", "kto_tag") and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if column in NESTED and text.startswith("[{"):
        try:
            return json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            return text
    return text


def not_utf8(where: str) -> Unreadable:
    return Unreadable(
        f"holds bytes that are not UTF-8 ({where}): name their encoding as data.encoding, for example latin-1"
    )


def refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
