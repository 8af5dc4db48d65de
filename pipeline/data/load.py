"""Files into checked rows. Every row is either used or counted with the reason it was not.

Nothing here needs a tokenizer or torch: this runs over all stages' data before the first model is loaded.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.data.contracts import Contract, Row
from pipeline.data.formats import READERS, Format, Unreadable
from pipeline.errors import UserError

NAMED_AT_MOST = 20


class DataSpec(BaseModel):
    """Where a stage's rows come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    """Training rows: a .jsonl, .jsonl.gz or .json file, or the id of a data set on the Hub (owner/name)."""
    test: str | float | None = None
    """Held-out rows: a file as above, or the share of the prompts of `path` to hold out (0 < share < 1)."""
    format: Format = "trl"
    """How the rows of `path` and `test` are laid out: TRL's shapes, or one of the readers of data/formats.py."""
    split: str = "train"
    """Split of a Hub data set."""
    limit: int | None = Field(default=None, gt=0)
    """Use at most so many rows of `path`, taken from the start."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Stop at unfit rows (the default), or go on without them and write them to refused.jsonl."""


@dataclass
class Source:
    """One file read: rows fit for use, and what became of the others."""

    path: str
    rows: list[Row] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    held_out: int = 0
    """Rows of the same file that went to the held-out share."""

    def counts(self) -> dict[str, Any]:
        reasons = Counter(entry["reason"] for entry in self.refused)
        total = len(self.rows) + len(self.refused) + self.held_out
        counts = {"path": self.path, "rows": total, "used": len(self.rows), "refused": dict(reasons)}
        return {**counts, "held_out": self.held_out} if self.held_out else counts


def read_source(path: str, contract: Contract, spec: DataSpec) -> Source:
    """Read and check one file or Hub data set.

    Raises UserError naming file and line for anything unfit, unless the spec says to skip unfit rows.
    """
    source = Source(path)
    reader = READERS[spec.format]
    for place, row in _places(path, spec):
        if isinstance(row, Unreadable):
            source.refused.append({"place": place, "reason": str(row)})
            continue
        try:
            shaped = reader(row)
            reason = contract.check(shaped)
        except Unreadable as error:
            reason = str(error)
        if reason:
            source.refused.append({"place": place, "reason": reason, "row": row})
        else:
            source.rows.append({**shaped, "_place": place})
        if spec.limit and len(source.rows) >= spec.limit:
            break
    if not source.rows and not source.refused:
        raise UserError(f"{path} is empty. Expected rows like {contract.example}")
    if source.refused and spec.on_bad_row == "stop":
        raise UserError(_refusal(source, contract))
    if not source.rows:
        raise UserError(f"{path}: not one row is fit for use.\n{_refusal(source, contract)}")
    return source


def read_split(spec: DataSpec, contract: Contract, seed: int) -> tuple[Source, Source | None]:
    """Training and held-out rows. A share is held out by prompt, so no prompt stands on both sides."""
    train = read_source(spec.path, contract, spec)
    if spec.test is None:
        return train, None
    if isinstance(spec.test, str):
        return train, read_source(spec.test, contract, spec.model_copy(update={"limit": None}))
    if not 0 < spec.test < 1:
        raise UserError(f"data.test of {spec.path} is {spec.test}: a share lies between 0 and 1, for example 0.1")
    prompts = sorted({_prompt_key(row) for row in train.rows})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, round(len(prompts) * spec.test))])
    test = Source(f"{spec.path} (share {spec.test})", [r for r in train.rows if _prompt_key(r) in held_out])
    train.rows = [row for row in train.rows if _prompt_key(row) not in held_out]
    train.held_out = len(test.rows)
    if not train.rows:
        raise UserError(f"{spec.path}: holding out {spec.test} of its prompts leaves no row to train on")
    return train, test


def content_hash(path: str, spec: DataSpec) -> str:
    """What a file holds, for fingerprints: its sha256, or the commit of a Hub data set."""
    local = Path(path)
    if local.is_file():
        with local.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not _is_hub_id(path):
        raise UserError(_no_file(path))
    return _hub_commit(path)


def _is_hub_id(path: str) -> bool:
    """owner/name; a name with a file's ending is a file that is missing, and is nobody else's business."""
    looks_like_a_file = path.endswith((".json", ".jsonl", ".gz", ".csv", ".txt", ".md", ".parquet", ".zst"))
    return not Path(path).exists() and not looks_like_a_file and re.fullmatch(r"[\w-]+/[\w.-]+", path) is not None


def _no_file(path: str) -> str:
    if Path(path).is_dir():
        return f"{path} is a folder. Name a .jsonl, .jsonl.gz or .json file in it."
    return f"{path}: no such file (looked in {Path.cwd()})"


def _prompt_key(row: Row) -> str:
    if row.get("messages"):
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return json.dumps(row["messages"][:first], sort_keys=True)
    return json.dumps(row["prompt"] if row.get("prompt") else row["text"], sort_keys=True)


def _places(path: str, spec: DataSpec) -> Iterator[tuple[str, Row | Unreadable]]:
    """Every row with the place a person finds it at; a row that is no JSON object comes as the reason."""
    local = Path(path)
    if _is_hub_id(path):
        yield from _hub_rows(path, spec)
        return
    if not local.is_file():
        raise UserError(_no_file(path))
    if not local.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        raise UserError(f"{path}: expected a .jsonl, .jsonl.gz or .json file")
    try:
        with gzip.open(local, "rb") if local.suffix == ".gz" else local.open("rb") as file:
            if ".jsonl" in local.suffixes:
                for number, line in enumerate(file, 1):
                    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    if line.strip():
                        yield f"{path}:{number}", _parsed(line)
            else:
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise UserError(f"{path}: expected a JSON list of rows. For one row per line use .jsonl")
                for number, row in enumerate(rows, 1):
                    yield f"{path}[{number}]", row if isinstance(row, dict) else Unreadable("is not a JSON object")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken JSON: {error}") from error


def _parsed(line: bytes) -> Row | Unreadable:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 (byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"is broken JSON: {error}")
    return row if isinstance(row, dict) else Unreadable("is not a JSON object")


def _refusal(source: Source, contract: Contract) -> str:
    named = [f"  {entry['place']}: {entry['reason']}" for entry in source.refused[:NAMED_AT_MOST]]
    total, more = len(source.refused), len(source.refused) - len(named)
    lines = [f"{total} unfit row{'s' if total > 1 else ''} in {source.path}:", *named]
    if more > 0:
        lines.append(f"  ... and {more} more")
    lines.append(f"Expected rows like {contract.example}")
    lines.append("Correct the rows, or set on_bad_row: skip in the stage's data section to go on without them.")
    return "\n".join(lines)


def _hub_rows(path: str, spec: DataSpec) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(path, split=spec.split, revision=_hub_commit(path).removeprefix("hub:"))
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise UserError(
            f"{path}: no such local file, and it could not be loaded from the Hub ({type(error).__name__}: {error}). "
            "Point data.path at a local file to go on without the Hub."
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}[{number}]", dict(row)


@functools.cache
def _hub_commit(path: str) -> str:
    """The commit a data set is at, asked once: the rows that are read are those the fingerprint is of."""
    from huggingface_hub import HfApi

    try:
        return f"hub:{HfApi().dataset_info(path, timeout=10).sha}"
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise UserError(
            f"{path}: no such local file, and the Hub did not answer for it ({type(error).__name__}). "
            "Point data.path at a local file to go on without the Hub."
        ) from error
