"""What a person's data can be used for, told by its first rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.data import files, hub
from pipeline.data.contracts import Contract, Row
from pipeline.data.dialogues import Unreadable
from pipeline.data.formats import find_format, read_rows
from pipeline.errors import UserError
from pipeline.stages import STAGES
from pipeline.terminal.console import counted

LOOKED_AT = 200
"""Rows of a file; what is wrong further down, `onebase check` finds."""
ANSWERED = {"prompt": "completion", "question": "answer", "instruction": "output"}
CLOSE = ("answer", "response", "reply", "output", "completion")
NEEDED = (
    "Needed are: for sft prompt and completion (or question and answer, instruction and output, messages); for reward "
    "and dpo prompt, chosen and rejected; for pretrain text; for classify text and label; for ppo prompt. All formats: "
    "docs/data.md, Formats"
)
MOST = 0.5
"""The share of its rows that must be fit for a file to be of use: the others may be mended or left out."""


@dataclass(frozen=True)
class File:
    path: str
    layouts: str
    """The formats that its rows are in, by their keys."""
    fits: frozenset[str]
    """The kinds of stages that can use it."""
    columns: str = ""
    """Those of its rows, and which to rename."""


def look_at(path: str, encoding: str = "utf-8") -> list[File]:
    """The files at a path: itself, or those of a folder, each by itself. Raises UserError if none is of use."""
    files_there, problems = [], []
    for each in list_parts(path):
        try:
            files_there.append(_look_at_one(each, encoding))
        except UserError as error:
            problems.append(str(error))
    useful = [file for file in files_there if file.fits]
    if not useful:
        if problems:
            raise UserError(problems[0])
        raise UserError(f"{files_there[0].path} has the columns {files_there[0].columns}. {NEEDED}")
    return useful


def list_parts(path: str) -> list[str]:
    """The files of a folder; what is one data set is one."""
    folder = Path(path)
    if not os.path.isdir(folder) or hub.saved_by_datasets(folder):
        return [path]
    listed = files.list_files(folder)
    if any(files.SPLIT.match(file.name) for file in listed):
        return [path]  # train-0001.parquet, test.jsonl: the folder is one data set
    return [str(file) for file in listed]


def _look_at_one(path: str, encoding: str) -> File:
    placed = list(islice(files.read_placed(path, "train", False, encoding), LOOKED_AT))
    rows = [row for _, row in placed]
    if not rows:
        raise UserError(f"{path} is empty")
    unread = [f"{place} {row}" for place, row in placed if isinstance(row, Unreadable)]
    if len(unread) > MOST * len(rows):
        raise UserError(f"most rows of {path} cannot be read. {unread[0]} (onebase init: --encoding)")
    layouts = Counter("unfit" if isinstance(row, Unreadable) else find_format(row) or "unknown" for row in rows)
    fits = {name for name, stage in STAGES.items() if _share(rows, stage.contract) >= MOST}
    if "classify" in fits:
        fits -= {"pretrain"}  # texts that have labels are no corpus
    return File(path, _tell_layouts(layouts), frozenset(fits), _tell_columns(rows))


def _tell_layouts(layouts: Counter[str]) -> str:
    known = [name for name, _ in layouts.most_common() if name not in ("unknown", "unfit")]
    others = [("unknown", "of no known format"), ("unfit", "that cannot be read")]
    told = [f"{counted(layouts[name], 'row')} {what}" for name, what in others if layouts[name]]
    return ", ".join(known) + (f" ({', '.join(told)})" if known else ", ".join(told)) if told else ", ".join(known)


def _tell_columns(rows: list[Row | Unreadable]) -> str:
    """The columns of the first row, and a name that is nearly right."""
    columns = next((list(row) for row in rows if not isinstance(row, Unreadable)), [])
    told = ", ".join(columns)
    for asks, answers in ANSWERED.items():
        close = [column for column in columns if column.lower() in CLOSE]
        if asks in columns and answers not in columns and close:
            told += f"; rename '{close[0]}' to '{answers}', which goes with '{asks}'"
    return told


def _share(rows: list[Row | Unreadable], contract: Contract) -> float:
    return sum(_is_fit(row, contract) for row in rows) / len(rows)


def _is_fit(row: Row | Unreadable, contract: Contract) -> bool:
    if isinstance(row, Unreadable):
        return False
    if find_format(row) == "kto" and contract.kind == "preference":
        return True  # answers with labels become comparisons once all of a prompt's are seen
    try:
        shaped = list(_shape(row, contract))
    except Unreadable:
        return False
    return all(contract.check(each) is None for each in shaped)


def _shape(row: Row, contract: Contract) -> Iterator[Row]:
    return read_rows(row, "auto", contract.kind)
