"""Votes brought from other tools, and given to them: Label Studio, Argilla and TRL's rows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from pipeline.data import files, formats
from pipeline.data.contracts import PREFERENCE, Row, RowKind
from pipeline.data.dialogues import Unreadable
from pipeline.data.labelled import ALONE, LabelledRows
from pipeline.data.voted import is_of_votes, rows_of
from pipeline.data.votes import Vote, files_in, read_files, standing
from pipeline.disk.atomic import write_text, written_whole
from pipeline.errors import UserError
from pipeline.label import argilla, label_studio
from pipeline.label.foreign import Reading, Said
from pipeline.language.say import say

Shape = Literal["votes", "label-studio", "argilla", "trl", "kto"]
KINDS: dict[Shape, RowKind] = {"trl": "preference", "kto": "rated"}
WRITERS: dict[Shape, Callable[[list[Vote]], dict[str, str]]] = {
    "label-studio": label_studio.write,
    "argilla": argilla.write,
}


def exchange(source: str, to: Path, shape: Shape) -> list[str]:
    """Write the votes of a file or folder in another shape; what there is to tell of it.

    Raises UserError for a file that is in no known shape or damaged, and where `to` is there already.
    """
    if to.exists():
        raise UserError(f"{to} is there already; choose another name")
    if shape in KINDS and to.suffix != ".jsonl":
        raise UserError(f"{to}: --as {shape} writes one file of rows; name one that ends in .jsonl")
    reading = read(source)
    votes = list(reading.votes.values())
    if not votes:
        raise UserError(f"{source} holds no votes{_in_short(reading.left)}")
    if shape in KINDS:
        rows = [row for vote in votes for row in _rows(vote, KINDS[shape], reading)]
        if not rows:
            raise UserError(f"{source} gives no rows of this shape{_in_short(reading.left)}")
        write_text(to, (f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        wrote = say("{n} rows are in {to}", n=len(rows), to=to)
    else:
        texts = WRITERS[shape](votes) if shape in WRITERS else _by_person(votes)
        with written_whole(to) as folder:
            for name, text in texts.items():
                write_text(folder / name, text)
        people = len({vote.annotator for vote in votes})
        wrote = say("{n} votes by {people} people are in {to}", n=len(votes), people=people, to=to)
    renamed = [(name, given) for name, (given, _) in reading.people.items() if name != given]
    return [
        wrote,
        *(say("not in it: {n} {what}", n=count, what=what) for what, count in (+reading.left).items()),
        *(say("{given} is {name} here", given=f"{given!r:.60}", name=name) for name, given in renamed),
    ]


def read(source: str) -> Reading:
    """The votes of a file or folder, whose shape is told by its rows. Raises UserError naming file and row."""
    reading = Reading()
    folders = [Path(source), *sorted(Path(source).glob("round-*"))]  # with rounds, each has a folder of its own
    if any(is_of_votes(str(folder)) for folder in folders):
        for file, (placed, cut) in read_files(file for folder in folders for file in files_in(folder)).items():
            lines = [vote for _, vote in placed]
            kept = standing(lines)
            reading.left[say("lines that take a vote back or were taken back")] += len(lines) - len(kept)
            reading.left[say("lines that were cut short")] += bool(cut)
            reading.votes |= {f"{file} {vote.id}": vote for vote in kept}
        return reading
    rated: dict[str, LabelledRows] = defaultdict(LabelledRows)
    for place, row in files.read_placed(source, "train", lines=False):
        if isinstance(row, Unreadable):
            raise UserError(f"{place}: {row}")
        if label_studio.is_task(row):
            label_studio.read(place, row, reading)
        elif argilla.is_record(row):
            argilla.read(place, row, reading)
        elif "label" in row and "chosen" not in row:
            rated[_person(row)].add(place, row)
        else:
            _add_comparisons(place, row, reading)
    for rows in rated.values():
        for place, pair, reason in rows.pair():
            if reason == ALONE:
                reading.left[say("answers with thumbs that have no counterpart")] += 1
            elif reason:
                raise UserError(f"{place}: {reason}")
            else:
                _add_comparisons(place, pair, reading)
    return reading


def _add_comparisons(place: str, row: Row, reading: Reading) -> None:
    try:
        for shaped in formats.read_rows(row, "auto", "preference"):
            if reason := PREFERENCE.check(shaped):
                raise Unreadable(reason)
            answers = {name: _text_of(shaped, name) for name in ("chosen", "rejected")}
            said = Said(_person(row), better="chosen")
            reading.add(place, shaped["prompt"], answers, {"prompt": shaped["prompt"]}, said)
    except Unreadable as error:
        raise UserError(
            f"{place}: {error}. What is read: votes, Label Studio's export as JSON (not JSON-MIN), Argilla's records, "
            "rows of comparisons, rows of answers with a label"
        ) from None


def _person(row: Row) -> str:
    return str(row.get("annotator") or "imported")


def _text_of(row: Row, name: str) -> str:
    """An answer of one turn as text."""
    answer = row[name]
    if isinstance(answer, str):
        return answer
    if len(answer) > 1 or answer[0].get("tool_calls"):
        raise Unreadable(f"field '{name}' has several turns or calls a tool, and a vote compares texts")
    return str(answer[0]["content"])


def _rows(vote: Vote, kind: RowKind, reading: Reading) -> list[Row]:
    rows = [] if vote.gold is not None else list(rows_of(vote, kind))
    if not rows:
        what = say("votes on known answers") if vote.gold is not None else say("votes that give no such row")
        reading.left[what] += 1
    return rows


def _by_person(votes: Iterable[Vote]) -> dict[str, str]:
    texts: dict[str, str] = defaultdict(str)
    for vote in votes:
        texts[f"{vote.annotator}.jsonl"] += vote.model_dump_json() + "\n"
    return texts


def _in_short(left: Counter[str]) -> str:
    """What had no place, in brackets."""
    return f" ({', '.join(f'{count} {what}' for what, count in (+left).items())})" if +left else ""
