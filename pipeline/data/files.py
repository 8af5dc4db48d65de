"""Files, folders and Hub data sets as rows, each with the place a person finds it at. Nothing is held in memory whole.

.jsonl .ndjson        one JSON object a line
.json                 a list of objects, held in memory whole (or one a line, as some .json files are)
.csv .tsv .parquet    a row a row
.txt .md .rst         documents: a file is one, unless form feeds or lines of a lone % part it; `format: lines` makes
                      every line one
... .gz .zst          any of these, compressed
a folder              all such files in it, by name (those of `split` where they are named by splits; no texts beside
                      tables or rows, no hidden files); or what `datasets` saved there
owner/name            a data set on the Hub

Text in another encoding than UTF-8 is read where the recipe names it; else a byte that is no UTF-8 makes its row unfit.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.data import hub
from pipeline.data.contracts import Row
from pipeline.data.dialogues import Unreadable
from pipeline.errors import UserError

Stream = IO[bytes] | gzip.GzipFile
Placed = tuple[str, Row | Unreadable]
LINES, LISTS, TABLES, TEXTS = {".jsonl", ".ndjson"}, {".json"}, {".csv", ".tsv"}, {".txt", ".md", ".rst", ".text"}
PACKED = {".gz", ".zst"}
ENDINGS = LINES | LISTS | TABLES | TEXTS | {".parquet"}
PARTS = re.compile(r"\f|^%[ \t]*\r?$", re.MULTILINE)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
STRAY = re.compile("[\udc80-\udcff]")
SPLIT = re.compile(r"(train|test|validation|valid|dev|eval)([-_.]|$)", re.IGNORECASE)
LONGEST_DOCUMENT = 1 << 27
"""Characters of one document; more is a file of many that nothing parts."""


def placed_rows(path: str, split: str, lines: bool, encoding: str = "utf-8") -> Iterator[Placed]:
    """Every row with its place; what is no row at all comes as the reason.

    Raises UserError if the file is absent, of an unknown kind, damaged, or cannot be loaded.
    """
    local = Path(path)
    if hub.is_hub_id(path):
        yield from _numbered(path, hub.rows(path, split))
    elif os.path.isdir(local) and hub.saved_by_datasets(local):
        yield from _numbered(path, hub.saved(local, split))
    elif os.path.isdir(local):
        for file in _of_split(local, split):
            yield from _file_rows(file, lines, encoding)
    elif os.path.isfile(local):
        if split != "train":
            raise UserError(f"{path}: data.split is '{split}', but a single file has no splits; name the file instead")
        yield from _file_rows(local, lines, encoding)
    else:
        raise UserError(f"{path}: no such file (looked in {Path.cwd()})")


def content_hash(path: str) -> str:
    """What lies there, for fingerprints: sha256 of a file or of a folder's files, or the commit of a Hub data set."""
    local = Path(path)
    if os.path.isfile(local):
        with local.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if os.path.isdir(local):
        files = sorted(f for f in local.rglob("*") if f.is_file()) if hub.saved_by_datasets(local) else _files(local)
        names = "".join(f"{file.relative_to(local)} {content_hash(str(file))}\n" for file in files)
        return hashlib.sha256(names.encode()).hexdigest()
    if not hub.is_hub_id(path):
        raise UserError(f"{path}: no such file (looked in {Path.cwd()})")
    return f"hub:{hub.commit(path)}"


def kind_of(file: Path) -> str:
    """The ending that says what a file is, without that of its compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _files(folder: Path) -> list[Path]:
    try:
        seen = [at for at in folder.rglob("*") if not any(p.startswith(".") for p in at.relative_to(folder).parts)]
        files = sorted(file for file in seen if file.is_file() and kind_of(file) in ENDINGS)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    rows = [file for file in files if kind_of(file) not in TEXTS]
    files = rows or files  # a README beside rows is about them, and none of them
    if not files:
        raise UserError(f"{folder} is a folder without any file this reads ({', '.join(sorted(ENDINGS))}, .gz, .zst)")
    return files


def _of_split(folder: Path, split: str) -> list[Path]:
    """A folder's files; of one whose files are named by splits (train-00000.parquet, test.jsonl), that split's."""
    files = _files(folder)
    named = [file for file in files if SPLIT.match(file.name)]
    if not named:
        if split != "train":
            raise UserError(f"{folder}: data.split is '{split}', but its files are not named by splits")
        return files
    chosen = [file for file in named if file.name.lower().startswith(split.lower())]
    if not chosen:
        raise UserError(f"{folder}: no file of the split '{split}' (there is: {', '.join(f.name for f in named)})")
    return chosen


def _file_rows(file: Path, lines: bool, encoding: str) -> Iterator[Placed]:
    kind = kind_of(file)
    if kind not in ENDINGS:
        raise UserError(f"{file}: unknown kind of file. Read are {', '.join(sorted(ENDINGS))}, also as .gz or .zst")
    try:
        if kind == ".parquet":
            yield from _numbered(str(file), _parquet(file))
            return
        with _opened(file, encoding) as stream:
            if lines or kind in LINES:
                yield from _json_lines(str(file), stream) if kind in LINES | LISTS else _text_lines(str(file), stream)
            elif kind in LISTS:
                yield from _json_list(file, stream, encoding)
            elif kind in TABLES:
                yield from _table(str(file), stream, "\t" if kind == ".tsv" else ",")
            else:
                yield from _documents(str(file), stream)
    except UserError:
        raise
    except UnicodeError as error:
        why = getattr(error, "reason", error)
        raise UserError(f"{file} is not in the encoding '{encoding}' that the recipe names: {why}") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _opened(file: Path, encoding: str = "utf-8") -> Stream:
    """A file's bytes, unpacked and in UTF-8."""
    stream = _unpacked(file)
    if codecs.lookup(encoding).name == "utf-8":
        return stream
    # what the named encoding has no letter for stays the byte it is, and makes its row unfit
    return codecs.EncodedFile(stream, "utf-8", encoding, errors="surrogateescape")


def _unpacked(file: Path) -> Stream:
    with file.open("rb") as plain:
        magic = plain.read(4)
    if magic[:2] == b"\x1f\x8b" or file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    if magic == b"\x28\xb5\x2f\xfd" or file.suffix.lower() == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(file), compression="zstd", buffer_size=1 << 20)  # type: ignore[no-any-return]
    return file.open("rb")


def _json_lines(path: str, stream: Stream) -> Iterator[Placed]:
    for number, line in enumerate(_byte_lines(stream), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line)


def _byte_lines(stream: Stream) -> Iterator[bytes]:
    """Lines ended by \\n alone; pyarrow's streams do not iterate by themselves."""
    first, rest = True, b""
    while block := stream.read(1 << 20):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield line.removeprefix(codecs.BOM_UTF8) if first else line
            first = False
    if rest:
        yield rest.removeprefix(codecs.BOM_UTF8) if first else rest


def _parsed(line: bytes) -> Row | Unreadable:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return _not_utf8(f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"is broken JSON: {error}")
    return _object(row, suspect=SURROGATE.search(line) is not None)


def _not_utf8(where: str) -> Unreadable:
    return Unreadable(f"holds bytes that are no UTF-8 ({where}): name their encoding as data.encoding, say latin-1")


def _stray(text: str) -> int | None:
    """Where in a text that was decoded with `surrogateescape` the first byte stands that is no UTF-8."""
    found = STRAY.search(text)
    return found.start() if found else None


def _object(row: Any, suspect: bool = True) -> Row | Unreadable:
    if not isinstance(row, dict):
        return Unreadable("is not a JSON object")
    try:
        if suspect:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return Unreadable("holds half of a surrogate pair, which is no character")
    return row


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _json_list(file: Path, stream: Stream, encoding: str) -> Iterator[Placed]:
    head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    with _opened(file, encoding) as again:
        if head[:1] == b"{":
            yield from _json_lines(str(file), again)
            return
        try:
            text = again.read().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
            rows = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is broken JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a JSON list of rows. For one row per line use .jsonl")
    stray = _stray(text) is not None
    for number, row in enumerate(rows, 1):
        torn = stray and _stray(json.dumps(row, ensure_ascii=False)) is not None
        yield f"{file}[{number}]", _not_utf8("somewhere in the row") if torn else _object(row)


def _table(path: str, stream: Stream, delimiter: str) -> Iterator[Placed]:
    csv.field_size_limit(sys.maxsize)
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for line in _byte_lines(stream))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    columns = reader.fieldnames or []
    if _stray("".join(columns)) is not None:
        raise UserError(f"{path}:1: the header {_not_utf8('in a name')}")
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}:1: two columns have the same name: {', '.join(columns)}")
    last = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{last + 1}: a quote is opened here and not closed as CSV closes it ({error}). "
                "Double the quotes inside a field, or use .jsonl"
            ) from error
        # A quoted field runs over several lines; the row is named by its first.
        place, last = f"{path}:{last + 1}", reader.line_num
        if torn := next((column for column, text in row.items() if _stray(str(text)) is not None), None):
            yield place, _not_utf8(f"column '{torn}'")
        elif None in row:
            yield place, Unreadable("has more fields than the header")
        elif None in row.values():
            yield place, Unreadable("has fewer fields than the header")
        else:
            yield place, {column: _cell(column, text) for column, text in row.items()}


NESTED = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools", "history")


def _cell(column: str, text: str) -> Any:
    """A table holds text; messages are read out of it, and so is a label that is true or false."""
    if column in ("label", "kto_tag") and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if column in NESTED and text.startswith("[{"):
        try:
            return json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return text
    return text


def _text_lines(path: str, stream: Stream) -> Iterator[Placed]:
    for number, line in enumerate(_byte_lines(stream), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", {"text": line.decode("utf-8").rstrip("\r")}
            except UnicodeDecodeError as error:
                yield f"{path}:{number}", _not_utf8(f"byte {error.start} of the line")


def _documents(path: str, stream: Stream) -> Iterator[Placed]:
    """Parts between form feeds or lines of a lone %, named by the line they begin on."""
    held: list[str] = []
    line, size = 1, 0
    for piece in _decoded(stream):
        first, *more = PARTS.split(piece)
        held.append(first)
        size += len(first)
        for text in more:
            whole = "".join(held)
            yield from _document(path, line, whole)
            line += whole.count("\n")
            held, size = [text], len(text)
        if size > LONGEST_DOCUMENT:
            raise UserError(
                f"{path}: a document of more than {LONGEST_DOCUMENT >> 20} million characters begins on line {line}. "
                "Put a form feed between documents, or set `format: lines` in the data section if each line is one"
            )
    yield from _document(path, line, "".join(held))


def _document(path: str, line: int, text: str) -> Iterator[Placed]:
    if text.strip():
        start = line + text[: len(text) - len(text.lstrip())].count("\n")
        stray = _stray(text)
        at = 0 if stray is None else line + text.count("\n", 0, stray)
        yield f"{path}:{start}", _not_utf8(f"line {at}") if at else {"text": text.strip("\r\n")}


def _decoded(stream: Stream) -> Iterator[str]:
    """Text in blocks that end with a line, so that no separator is torn."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    held = ""
    while block := stream.read(1 << 20):
        text = held + decoder.decode(block)
        end = text.rfind("\n") + 1
        held = text[end:]
        yield text[:end]
    yield held + decoder.decode(b"", True)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _numbered(path: str, rows: Iterator[Row]) -> Iterator[Placed]:
    for number, row in enumerate(rows, 1):
        yield f"{path}[{number}]", dict(row)
