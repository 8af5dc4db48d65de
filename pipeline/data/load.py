"""Files into checked rows. Every row is either used or counted with the reason it was not.

Nothing here needs a tokenizer or torch: this runs over all stages' data before the first model is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.data import files, formats, mixture
from pipeline.data.contracts import Contract, Row, is_labelled
from pipeline.data.dialogues import Unreadable
from pipeline.data.formats import Format
from pipeline.data.holding import hold_out, keep_apart
from pipeline.data.labelled import LabelledRows
from pipeline.data.shelf import Picked, Shelf
from pipeline.data.voted import is_of_votes, read_voted
from pipeline.disk.manifest import SourceCounts
from pipeline.errors import UserError

NAMED_AT_MOST = 20
TEST_OF_ROUNDS = "with rounds, test is a share of the prompts, as 0.2: what is held out stays held out"


def _of_text(encoding: str) -> str:
    try:
        "a".encode(encoding).decode(encoding, "surrogateescape")
    except (LookupError, ValueError) as error:  # of ValueError: a null byte in the name, or an encoding of no text
        raise ValueError("is not a text encoding that Python knows, such as latin-1, cp1252 or utf-16") from error
    return encoding


Encoding = Annotated[str, AfterValidator(_of_text)]
Round = Annotated[int, Field(gt=0, strict=True)]


class Part(BaseModel):
    """One of several sources of a stage's rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    format: Format = "auto"
    split: str = "train"
    encoding: Encoding | None = None
    """The section's own, unless this file has another."""
    limit: int | None = Field(default=None, gt=0)
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Share of the mixture's rows that come from here, relative to the other sources' weights."""
    epochs: float = Field(default=1.0, gt=0, le=1000)
    """With weights, how often this source's rows may be seen at most; without, how often they are."""
    rounds: Round | None = None
    """As in the section."""


class DataSpec(BaseModel):
    """Where a stage's rows come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    """Training rows: a file or folder (see data/files.py), or the id of a data set on the Hub (owner/name).
    Paths count from the folder in which a command is typed."""
    mix: list[Part] | None = Field(default=None, min_length=1)
    """Several sources instead of one path, each with its weight or epochs."""
    test: str | int | float | None = None
    """Held-out rows: a file as above, the share of the prompts to hold out (0 < share < 1), or how many prompts."""
    format: Format = "auto"
    """How the rows of `path` and `test` are laid out: told by their keys, unless one of data/formats.py is named."""
    split: str = "train"
    """Split of a Hub data set or of a folder of `datasets`."""
    encoding: Encoding = "utf-8"
    """How the text of the stage's files is encoded, by Python's name for it (latin-1, cp1252, utf-16)."""
    rounds: Round | None = None
    """Of a folder of votes, take its rounds 1 to this one (`round-1/`, `round-2/`, ...). Written by
    [`rounds:`](rounds.md) at the top level."""
    apart: float | None = Field(default=None, gt=0, lt=1)
    """Keep the prompts out of training that a stage of the same [rounds](rounds.md) holds out with this `test`. Written
    by `rounds:` too."""
    group: str | None = None
    """Column whose equal values stay on one side when prompts are held out; the prompt, unless one is named."""
    limit: int | None = Field(default=None, gt=0)
    """Use at most so many rows of `path`, taken from the start."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Stop at unfit rows (the default), or go on without them and write them to refused.jsonl."""
    too_long: Literal["drop", "keep_end"] = "drop"
    """Of a dialogue longer than max_length: leave it out and count it, or cut it so that it still ends its turn."""
    judge_agreement: float = Field(default=0.7, ge=0, le=1)
    """Of votes by a judge (onebase label --judge): the share of checked pairs on which people must agree with it, else
    they are not trained on. 0 asks nothing."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.path is None) == (self.mix is None):
            raise ValueError("takes either 'path' or 'mix', a list of {path, weight or epochs}")
        if self.mix and (self.limit or self.split != "train"):
            raise ValueError("with 'mix', write 'limit' and 'split' in its entries")
        if self.mix and len({part.weight is None for part in self.mix}) > 1:
            raise ValueError("gives a weight to some entries of 'mix' and none to others; give one to all or to none")
        if isinstance(self.test, int | float) and not (0 < self.test < 1 or (self.test > 1 and self.test % 1 == 0)):
            expected = "a file, a share between 0 and 1, for example 0.1, or a whole number of prompts from 2 up"
            raise ValueError(f"test is {self.test}; it is {expected}")
        if self.by_place and (self.group or (isinstance(self.test, int | float) and self.test > 1)):
            raise ValueError(TEST_OF_ROUNDS)
        return self

    @property
    def by_place(self) -> bool:
        """Whether the held-out prompts stay the same though there are more of them in each round."""
        return any(part.rounds for part in self.parts())

    def parts(self) -> list[Part]:
        if self.mix:
            return [part.model_copy(update={"encoding": part.encoding or self.encoding}) for part in self.mix]
        return [self.part(str(self.path)).model_copy(update={"limit": self.limit, "rounds": self.rounds})]

    def part(self, path: str) -> Part:
        """A file that is read as the section says."""
        return Part(path=path, format=self.format, split=self.split, encoding=self.encoding)


@dataclass
class Source:
    """One file read: rows fit for use, and what became of the others."""

    path: str
    rows: Sequence[Row] = field(default_factory=list)
    refused: Shelf[dict[str, Any]] = field(default_factory=Shelf)
    reasons: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    """Formats the file's rows were read as."""
    file_rows: int = 0
    """Rows of the file; one may give several (ranked replies, trees)."""
    held_out: int = 0
    left_out: int = 0
    """Rows a mixture did not draw."""
    drawn: int | None = None
    """Rows a mixture drew, repetitions counted."""

    def counts(self) -> SourceCounts:
        rows = len(self.rows) + self.reasons.total()
        return SourceCounts(
            path=self.path,
            rows=rows,
            used=len(self.rows) - self.held_out - self.left_out,
            refused=dict(self.reasons),
            held_out=self.held_out,
            left_out=self.left_out,
            drawn=self.drawn,
            file_rows=None if self.file_rows == rows else self.file_rows,
        )


@dataclass
class Split:
    train: Sequence[Row]
    test: Sequence[Row] | None
    sources: list[Source]


def read_source(path: str, contract: Contract, spec: DataSpec, part: Part | None = None) -> Source:
    """Read and check one file, folder or Hub data set.

    Raises UserError naming file and line for anything unfit, unless the spec says to skip unfit rows.
    """
    part = part or spec.part(path)
    rows: Shelf[Row] = Shelf(strict=True)
    source = Source(path, rows)
    stop = spec.on_bad_row == "stop"
    for place, row, reason in _read_items(source, part, contract, spec.judge_agreement):
        reason = reason or contract.check(row) or _keep(rows, {**row, "_place": place})
        if reason:
            source.reasons[reason] += 1
            if not stop or len(source.refused) < NAMED_AT_MOST:
                source.refused.append({"place": place, "reason": reason, "row": row})
        elif part.limit and len(rows) >= part.limit:
            break
    if not rows and not source.reasons:
        raise UserError(f"{path} is empty. {contract.expected(path)}")
    if source.reasons and (stop or not rows):
        raise UserError(refusal(source, contract, none_left=not rows))
    return source


def _keep(rows: Shelf[Row], row: Row) -> str | None:
    """Puts a row among the others, or gives the reason why it cannot be kept."""
    try:
        rows.append(row)
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not a character"
    except (ValueError, RecursionError) as error:
        return f"holds something that is not JSON: {error}"
    return None


def read_split(spec: DataSpec, contract: Contract, seed: int) -> Split:
    """Training and held-out rows. These are held out by prompt or group, so none stands on both sides."""
    sources = [read_source(part.path, contract, spec, part) for part in spec.parts()]
    rows = [source.rows for source in sources]
    kept = [list(range(len(of_source))) for of_source in rows]
    test: Sequence[Row] | None = None
    where = " and ".join(source.path for source in sources)
    if isinstance(spec.test, str):
        sources.append(read_source(spec.test, contract, spec))
        test = sources[-1].rows
    elif spec.test is not None:
        kept, held_out = hold_out(rows, where, spec.test, spec.group, seed, spec.by_place)
        test = Picked(rows, [number for number, _ in held_out], [index for _, index in held_out]) or None
        for source, of_source in zip(sources, kept, strict=True):
            source.held_out = len(source.rows) - len(of_source)
    if spec.apart is not None:
        kept, before = keep_apart(rows, where, kept, spec.apart, seed), kept
        for source, of_source, all_kept in zip(sources, kept, before, strict=False):
            source.left_out = len(all_kept) - len(of_source)
    if spec.mix is None:
        return Split(Picked(rows, [0] * len(kept[0]), kept[0]), test, sources)
    weights, epochs = [part.weight for part in spec.mix], [part.epochs for part in spec.mix]
    which, index = mixture.draw([len(of_source) for of_source in kept], weights, epochs, seed)
    for number, (source, of_source) in enumerate(zip(sources, kept, strict=False)):
        source.drawn = int((which == number).sum())
        source.left_out += max(0, len(of_source) - source.drawn)
        if not source.drawn:
            why = "raise its weight or epochs, or leave it out"
            if not of_source:
                why = f"data.test ({spec.test:g}) holds all of them out; hold out fewer"
            raise UserError(f"data.mix: no row of {source.path} is used: {why}")
    places = [kept[s][i] for s, i in zip(which.tolist(), index.tolist(), strict=True)]
    return Split(Picked(rows, which.tolist(), places), test, sources)


def labels_as_answers(rows: Sequence[Row]) -> Sequence[Row]:
    """Questions, those with a label asked for it: the labels of all rows are the choices. `labelled` marks them."""
    labels = sorted({row["label"] for row in rows if is_labelled(row)})
    if not labels:
        return rows
    shared = {"choices": labels, "labelled": True}
    return [{**row, "answer": row["label"], **shared} if is_labelled(row) else row for row in rows]


def _read_items(
    source: Source, part: Part, contract: Contract, judge_agreement: float
) -> Iterator[tuple[str, Any, str | None]]:
    """Every row a file gives, with its place, and the reason where it is none."""
    if part.rounds or is_of_votes(part.path):
        for place, layout, rows in read_voted(part.path, contract.kind, part.rounds, judge_agreement):
            source.file_rows += 1
            source.layouts[layout] += 1
            yield from ((place, row, None) for row in rows)
        return
    labelled = LabelledRows()
    for place, row in files.read_placed(part.path, part.split, part.format == "lines", part.encoding or "utf-8"):
        source.file_rows += 1
        if isinstance(row, Unreadable):
            yield place, None, str(row)
            continue
        of_keys = formats.find_format(row)
        source.layouts[(of_keys or "unknown") if part.format in ("auto", "lines") else part.format] += 1
        if contract.kind == "preference" and "kto" in (part.format, of_keys if part.format == "auto" else None):
            labelled.add(place, row)
            continue
        count = 0
        try:
            for count, shaped in enumerate(formats.read_rows(row, part.format, contract.kind), 1):
                yield place if count == 1 else f"{place}#{count}", shaped, None
        except Unreadable as error:
            yield place if count == 0 else f"{place}#{count + 1}", row, str(error)
    yield from labelled.pair()


def refusal(source: Source, contract: Contract, none_left: bool = False) -> str:
    """What is wrong with a file's unfit rows, the first of them by name."""
    total, first = source.reasons.total(), source.refused[:NAMED_AT_MOST]
    lines = [f"{source.path}: not one row is fit for use."] if none_left else []
    lines += [f"{total} unfit row{'s' if total > 1 else ''} in {source.path}:"]
    lines += [f"  {entry['place']}: {entry['reason']}" for entry in first]
    lines += [f"  ... and {total - len(first)} more"] if total > len(first) else []
    advice = "Correct the rows, or set on_bad_row: skip in the stage's data section to go on without them."
    return "\n".join([*lines, contract.expected(source.path), advice])
