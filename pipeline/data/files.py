"""Files, folders and Hub data sets as rows, each with the place a person finds it at. Nothing is held in memory whole.

.jsonl .ndjson        one JSON object a line
.json                 a list of objects, held in memory whole (or one a line, as some .json files are)
.csv .tsv .parquet    a row a row; a .csv may have semicolons or tabs
.txt .md .rst         documents: a file is one, unless form feeds or lines of a lone % part it; `format: lines` makes
                      every line one
... .gz .zst          any of these, compressed
a folder              all such files in it, by name (those of `split` where they are named by splits; no texts beside
                      tables or rows, no hidden files); or what `datasets` saved there
owner/name            a data set on the Hub

Text in another encoding than UTF-8 is read where the recipe names it; else a byte that is no UTF-8 makes its row unfit.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import string
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data import hub
from pipeline.data.contracts import Row
from pipeline.data.dialogues import Unreadable
from pipeline.data.tables import KNOWN_COLUMNS, STRAY, Placed, not_utf8, read_table, refuse_constant
from pipeline.disk.atomic import sha256_of_file
from pipeline.errors import UserError

LINES, LISTS, TABLES, TEXTS = {".jsonl", ".ndjson"}, {".json"}, {".csv", ".tsv"}, {".txt", ".md", ".rst", ".text"}
PACKED = {".gz", ".zst"}
ENDINGS = LINES | LISTS | TABLES | TEXTS | {".parquet"}
PARTS = re.compile(r"\f|^%[ \t]*\r?$", re.MULTILINE)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SPLIT = re.compile(r"(train|test|validation|valid|dev|eval)([-_.]|$)", re.IGNORECASE)
LONGEST_DOCUMENT = 1 << 27
"""Characters of one document; more is a file of many that nothing parts."""


def read_placed(path: str, split: str, lines: bool, encoding: str = "utf-8") -> Iterator[Placed]:
    """Every row with its place; what is no row at all comes as the reason.

    Raises UserError if the file is absent, of an unknown kind, damaged, or cannot be loaded.
    """
    local = Path(path)
    if is_hub_id(path):
        yield from _number(path, hub.read_hub(path, split))
    elif os.path.isdir(local) and hub.saved_by_datasets(local):
        yield from _number(path, hub.read_saved(local, split))
    elif os.path.isdir(local):
        for file in _list_split(local, split):
            yield from _read_file(file, lines, encoding)
    elif os.path.isfile(local):
        if split != "train":
            raise UserError(f"{path}: data.split is '{split}', but a single file has no splits; name the file instead")
        yield from _read_file(local, lines, encoding)
    else:
        raise UserError(no_such_file(path))


def no_such_file(path: str) -> str:
    return f"{path}: no such file (looked in {Path.cwd()})"


def hash_content(path: str) -> str:
    """What lies there, for fingerprints: sha256 of a file or of a folder's files, or the commit of a Hub data set."""
    local = Path(path)
    if os.path.isfile(local):
        return sha256_of_file(local)
    if os.path.isdir(local):
        listed = sorted(local.rglob("*")) if hub.saved_by_datasets(local) else list_files(local)
        names = "".join(f"{at.relative_to(local)} {sha256_of_file(at)}\n" for at in listed if at.is_file())
        return hashlib.sha256(names.encode()).hexdigest()
    if not is_hub_id(path):
        raise UserError(no_such_file(path))
    return f"hub:{hub.find_commit(path)}"


def is_hub_id(path: str) -> bool:
    """owner/name; a name with a file's ending is a file that is missing, and is nobody else's business."""
    looks_like_a_file = Path(path).suffix in ENDINGS | PACKED
    return not os.path.exists(path) and not looks_like_a_file and re.fullmatch(r"[\w-]+/[\w.-]+", path) is not None


def _ending(file: Path) -> str:
    """The ending that says what a file is, without that of its compression."""
    return next((suffix.lower() for suffix in reversed(file.suffixes) if suffix.lower() not in PACKED), "")


def list_files(folder: Path) -> list[Path]:
    try:
        seen = [at for at in folder.rglob("*") if not any(p.startswith(".") for p in at.relative_to(folder).parts)]
        files = sorted(file for file in seen if file.is_file() and _ending(file) in ENDINGS)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    # A README beside rows is about them, and none of them.
    files = [file for file in files if _ending(file) not in TEXTS] or files
    if not files:
        raise UserError(
            f"{folder} is a folder without a file that OneBase reads ({', '.join(sorted(ENDINGS))}, .gz, .zst)"
        )
    return files


def _list_split(folder: Path, split: str) -> list[Path]:
    """A folder's files; of one whose files are named by splits (train-00000.parquet, test.jsonl), that split's."""
    files = list_files(folder)
    named = [file for file in files if SPLIT.match(file.name)]
    if not named:
        if split != "train":
            raise UserError(f"{folder}: data.split is '{split}', but its files are not named by splits")
        return files
    chosen = [file for file in named if file.name.lower().startswith(split.lower())]
    if not chosen:
        raise UserError(f"{folder}: no file of the split '{split}' (there is: {', '.join(f.name for f in named)})")
    return chosen


def _read_file(file: Path, lines: bool, encoding: str) -> Iterator[Placed]:
    ending = _ending(file)
    if ending not in ENDINGS:
        raise UserError(
            f"{file}: unknown kind of file. OneBase reads {', '.join(sorted(ENDINGS))}, also as .gz or .zst"
        )
    try:
        if ending == ".parquet":
            from pyarrow import parquet

            batches = parquet.ParquetFile(file).iter_batches(1024)
            yield from _number(str(file), (row for batch in batches for row in batch.to_pylist()))
        elif ending in LINES or (lines and ending in LISTS):
            yield from _parse_lines(file, encoding, _parse_object)
        elif lines:
            yield from _parse_lines(file, encoding, lambda line: {"text": line.rstrip("\r\n")})
        elif ending in LISTS:
            yield from _read_list(file, encoding)
        elif ending in TABLES:
            yield from read_table(file, _read_lines(file, encoding), tabs=ending == ".tsv")
        else:
            yield from _read_documents(file, encoding)
    except UnicodeError as error:
        why = getattr(error, "reason", error)
        raise UserError(f"{file} is not in the encoding '{encoding}' that the recipe names: {why}") from error
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:  # pyarrow's are ValueErrors
        raise UserError(f"{file} cannot be read: {error}") from error


def _read_lines(file: Path, encoding: str) -> Iterator[str]:
    """A file's lines, unpacked, each ended by \\n alone. A byte that the encoding has no letter for stays as half of a
    surrogate pair, and makes its row unfit."""
    with file.open("rb") as plain:
        magic = plain.read(4)
    if magic == b"\x28\xb5\x2f\xfd" or file.suffix.lower() == ".zst":
        import pyarrow

        stream = pyarrow.input_stream(str(file), compression="zstd", buffer_size=1 << 20)
    elif magic[:2] == b"\x1f\x8b" or file.suffix.lower() == ".gz":
        stream = gzip.GzipFile(file)
    else:
        stream = file.open("rb")
    with io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="\n") as text:
        try:
            for number, line in enumerate(text):
                yield line if number else line.removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            if error.reason != "truncated data":
                raise
            yield "\udc80"  # a letter cut short at the end of the file makes the last row unfit


def _parse_lines(file: Path, encoding: str, parse: Callable[[str], Row | Unreadable]) -> Iterator[Placed]:
    for number, line in enumerate(_read_lines(file, encoding), 1):
        if line.strip(string.whitespace):
            stray = STRAY.search(line)
            at_byte = len(line[: stray.start()].encode()) if stray else 0
            yield f"{file}:{number}", not_utf8(f"byte {at_byte} of the line") if stray else parse(line)


def _parse_object(line: str) -> Row | Unreadable:
    try:
        row = json.loads(line.rstrip("\n"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"is broken JSON: {error}")
    return _check_object(row) if SURROGATE.search(line) or not isinstance(row, dict) else row


def _check_object(row: Any) -> Row | Unreadable:
    if not isinstance(row, dict):
        return Unreadable("is not a JSON object")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return Unreadable("holds half of a surrogate pair, which is not a character")
    return row


def _read_list(file: Path, encoding: str) -> Iterator[Placed]:
    """A list of objects; one that begins with an object has one a line."""
    first = next((line for line in _read_lines(file, encoding) if line.strip()), "")
    if first.lstrip().startswith("{"):
        _refuse_wrapped(file, first, encoding)
        yield from _parse_lines(file, encoding, _parse_object)
        return
    text = "".join(_read_lines(file, encoding))
    try:
        rows = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is broken JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a JSON list of rows. For one row per line use .jsonl")
    has_stray = STRAY.search(text) is not None
    for number, row in enumerate(rows, 1):
        torn = has_stray and STRAY.search(json.dumps(row, ensure_ascii=False))
        yield f"{file}[{number}]", not_utf8("somewhere in the row") if torn else _check_object(row)


def _refuse_wrapped(file: Path, first: str, encoding: str) -> None:
    """Raises UserError for a file that is one object around the list of rows."""
    try:
        whole = json.loads(first)
    except (ValueError, RecursionError):
        try:
            whole = json.loads("".join(_read_lines(file, encoding)))
        except (ValueError, RecursionError):
            return  # one object a line, and the first is broken
    lists = [key for key, value in whole.items() if isinstance(value, list) and key not in KNOWN_COLUMNS]
    if len(lists) == 1 and not whole.keys() & KNOWN_COLUMNS and isinstance((whole[lists[0]] or [0])[0], dict):
        key = lists[0]
        raise UserError(
            f"{file} is one object, with the rows inside it under '{key}'. Save that list alone, for example: "
            f"jq '.\"{key}\"' {file} > rows.json"
        )


def _read_documents(file: Path, encoding: str) -> Iterator[Placed]:
    """Parts between form feeds or lines of a lone %, named by the line they begin on."""
    pieces: list[str] = []
    begins, size = 1, 0
    for number, line in enumerate(_read_lines(file, encoding), 1):
        first, *rest = PARTS.split(line)
        pieces.append(first)
        size += len(first)
        for text in rest:
            yield from _make_document(file, begins, "".join(pieces))
            pieces, begins, size = [text], number, len(text)
        if size > LONGEST_DOCUMENT:
            raise UserError(
                f"{file}: a document of more than {LONGEST_DOCUMENT >> 20} million characters begins on line {begins}. "
                "Put a form feed between documents, or set `format: lines` in the data section if each line is one"
            )
    yield from _make_document(file, begins, "".join(pieces))


def _make_document(file: Path, line: int, text: str) -> Iterator[Placed]:
    if text.strip():
        start = line + text[: len(text) - len(text.lstrip())].count("\n")
        stray = STRAY.search(text)
        torn = stray and not_utf8(f"line {line + text.count(chr(10), 0, stray.start())}")
        yield f"{file}:{start}", torn or {"text": text.strip("\r\n")}


def _number(path: str, rows: Iterator[Row]) -> Iterator[Placed]:
    for number, row in enumerate(rows, 1):
        yield f"{path}[{number}]", dict(row)
