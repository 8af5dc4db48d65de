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

LOOKED_AT = 200
"""Rows of a file; what is wrong further down, `onebase check` finds."""
MOST = 0.5
"""The share of its rows that must be fit for a file to be of use: the others may be mended or left out."""


@dataclass(frozen=True)
class File:
    path: str
    layouts: str
    """The formats that its rows are in, by their keys."""
    fits: frozenset[str]
    """The kinds of stages that can use it."""


def look_at(path: str) -> list[File]:
    """The files at a path: itself, or those of a folder, each by itself. Raises UserError if none is of use."""
    files_there, problems = [], []
    for each in list_parts(path):
        try:
            files_there.append(_look_at_one(each))
        except UserError as error:
            problems.append(str(error))
    useful = [file for file in files_there if file.fits]
    if not useful:
        problems = problems or [f"{path}: none of its rows is in a format that is known here (README.md, Your data)"]
        raise UserError(problems[0])
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


def _look_at_one(path: str) -> File:
    rows = [row for _, row in islice(files.read_placed(path, "train", False), LOOKED_AT)]
    if not rows:
        raise UserError(f"{path} is empty")
    layouts = Counter("unfit" if isinstance(row, Unreadable) else find_format(row) or "unknown" for row in rows)
    fits = {name for name, stage in STAGES.items() if _share(rows, stage.contract) >= MOST}
    if "classify" in fits:
        fits -= {"pretrain"}  # texts that have labels are no corpus
    return File(path, ", ".join(name for name, _ in layouts.most_common()), frozenset(fits))


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
