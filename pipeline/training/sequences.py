"""A row's way to its trainer: encoded, fitted to max_length and written to an Arrow file, counted as it goes.

One row at a time, so that a million of them cost no memory.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from pipeline.data.contracts import Row
from pipeline.data.load import NAMED_AT_MOST
from pipeline.data.render import IGNORED, Encoded, Reply, TooLong, fit, unaskable
from pipeline.data.shelf import OneByOne
from pipeline.data.tokens import Unrenderable
from pipeline.errors import UserError
from pipeline.models import dialogue

if TYPE_CHECKING:
    from pipeline.stages.stage import Context, StageSpec

T = TypeVar("T")
Refused = list[dict[str, Any]]
"""Rows left out, each {place, reason}."""


class Tally:
    """What becomes of a stage's rows on their way: counts, and the rows left out with the reason. `skip`: rows that
    are unfit are left out, else they are an error."""

    def __init__(self, stage: str, skip: bool) -> None:
        self.stage, self.skip = stage, skip
        self.counts: dict[str, int] = defaultdict(int)
        self.refused: Refused = []
        self.named: dict[str, Refused] = defaultdict(list)

    def leave_out(self, row: Row, what: str, reason: str) -> None:
        self.counts[what] += 1
        self.refused.append({"place": row["_place"], "reason": reason})
        if self.counts[what] <= NAMED_AT_MOST:
            self.named[what].append(self.refused[-1])


Fit = Callable[[Iterator[tuple[Row, T]], Tally], Iterator[T]]
SINGLE = {"length", "label"}
"""Columns of one number a row."""


@dataclass(frozen=True)
class Form(Generic[T]):
    """How encoded rows of one kind lie in Arrow: lists of numbers (and a length or a label), under the names that a
    trainer takes as tokenized already."""

    columns: tuple[str, ...]
    to_row: Callable[[T], dict[str, Any]]
    from_row: Callable[[dict[str, Any]], T]

    def write(self, items: Iterable[T]) -> Dataset:
        """A Dataset that lies in a file without a name, mapped into memory."""
        number = Value("int64")
        features = Features({name: number if name in SINGLE else List(number) for name in self.columns})
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "rows.arrow")
            with ArrowWriter(path=file, features=features) as writer:
                for item in items:
                    writer.write(self.to_row(item))
                writer.finalize()
            # The mapping holds the file's blocks after its name is gone.
            return Dataset.from_file(file)


def _from_replies(pair: tuple[Reply, Reply]) -> dict[str, Any]:
    chosen, rejected = pair
    better, worse = chosen.sequence(), rejected.sequence()
    shared = len(os.path.commonprefix([chosen.prompt_ids, rejected.prompt_ids]))
    return {
        "prompt_ids": better.ids[:shared],
        "chosen_ids": better.ids[shared:],
        "rejected_ids": worse.ids[shared:],
        "chosen_mask": [int(label != IGNORED) for label in better.labels[shared:]],
        "rejected_mask": [int(label != IGNORED) for label in worse.labels[shared:]],
        "length": max(len(chosen), len(rejected)),
    }


def _to_reply(row: dict[str, Any], side: str) -> Reply:
    ids, mask = row[f"{side}_ids"], row[f"{side}_mask"]
    return Reply(row["prompt_ids"], ids, [token if bit else IGNORED for token, bit in zip(ids, mask, strict=True)])


TEXTS = Form[Encoded](
    ("input_ids", "labels"),
    lambda text: {"input_ids": text.ids, "labels": text.labels},
    lambda row: Encoded(row["input_ids"], row["labels"]),
)
"""For SFTTrainer."""
SCORED_PAIRS = Form[tuple[list[int], list[int]]](
    ("chosen_ids", "rejected_ids", "length"),
    lambda pair: {"chosen_ids": pair[0], "rejected_ids": pair[1], "length": max(map(len, pair))},
    lambda row: (row["chosen_ids"], row["rejected_ids"]),
)
"""For RewardTrainer."""
REPLY_PAIRS = Form[tuple[Reply, Reply]](
    ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "length"),
    _from_replies,
    lambda row: (_to_reply(row, "chosen"), _to_reply(row, "rejected")),
)
"""For DPOTrainer, with which of an answer's tokens carry loss beside the ids, for trainer.LearntTokens."""


@dataclass(frozen=True)
class Stored(OneByOne[T]):
    """Encoded rows, read one at a time from the `dataset` that a trainer takes."""

    form: Form[T]
    dataset: Dataset
    tally: Tally

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[T]:
        return map(self.form.from_row, self.dataset)

    def item(self, index: int) -> T:
        return self.form.from_row(self.dataset[index])


def store_both(
    ctx: Context, spec: StageSpec, encode: Callable[[Row], T], form: Form[T], fit: Fit[T]
) -> tuple[Stored[T], Stored[T]]:
    """A stage's training rows, fitted, and its held-out rows, whole."""
    train, test = (Tally(ctx.out.name, spec.data.on_bad_row == "skip") for _ in range(2))
    return store(ctx.data.train, encode, form, train, fit), store(ctx.data.test or [], encode, form, test)


def store(
    rows: Sequence[Row], encode: Callable[[Row], T], form: Form[T], tally: Tally, fit: Fit[T] | None = None
) -> Stored[T]:
    """Rows as token ids on disk. Raises UserError as encode_rows and `fit` do."""
    encoded = encode_rows(rows, encode, tally)
    return Stored(form, form.write(fit(encoded, tally) if fit else (item for _, item in encoded)), tally)


def encode_rows(rows: Sequence[Row], encode: Callable[[Row], T], tally: Tally) -> Iterator[tuple[Row, T]]:
    """Rows with their token ids, without those that the template or tokenizer cannot render.

    Raises UserError naming these after the last row, unless they may be skipped and there are others. Counts: rows,
    rows_unrendered.
    """
    counts = tally.counts
    counts |= {"rows": 0, "rows_unrendered": 0}
    for row in rows:
        try:
            item = encode(row)
        except Unrenderable as error:
            tally.leave_out(row, "rows_unrendered", str(error))
        else:
            counts["rows"] += 1
            yield row, item
    named = tally.named["rows_unrendered"]
    if named and (not tally.skip or not counts["rows"]):
        lines = "\n".join(f"  {entry['place']}: {entry['reason']}" for entry in named)
        raise UserError(
            f"{counts['rows_unrendered']} rows of stage '{tally.stage}' cannot be rendered:\n{lines}\n"
            "Correct them, name another model.chat_template, or set on_bad_row: skip in the stage's data section."
        )
    if named:
        what = f"{counts['rows_unrendered']} of {len(rows)} rows cannot be rendered"
        print(f"  {what}: left out, from {named[0]['place']}", flush=True)


def keep_whole(encoded: Iterator[tuple[Row, Encoded]], tally: Tally) -> Iterator[Encoded]:
    """All sequences as they are, for a trainer that splits what is too long. Counts: tokens."""
    for _, whole in encoded:
        tally.counts["tokens"] += len(whole.ids)
        yield whole


def fit_texts(
    encoded: Iterator[tuple[Row, Encoded]], tally: Tally, max_length: int | None, too_long: TooLong
) -> Iterator[Encoded]:
    """Sequences no longer than max_length, as render.fit makes them. Raises UserError where one has nothing left to
    learn from, unless it may be skipped and there are others.

    Counts: rows_cut, rows_too_long (left out), rows_bare (left out: nothing to learn in what fits), tokens,
    tokens_cut, supervised_tokens.
    """
    counts = tally.counts
    counts |= dict.fromkeys(("rows_cut", "rows_too_long", "rows_bare", "tokens", "tokens_cut", "supervised_tokens"), 0)
    first, first_cut = "", ""
    for row, whole in encoded:
        first = first or row["_place"]
        short, lost, reason = fit(whole, max_length, too_long)
        if lost:
            tally.leave_out(row, lost, reason)
            continue
        if len(short.ids) < len(whole.ids):
            counts["rows_cut"] += 1
            counts["tokens_cut"] += len(whole.ids) - len(short.ids)
            first_cut = first_cut or row["_place"]
        counts["tokens"] += len(short.ids)
        counts["supervised_tokens"] += short.supervised
        yield short
    rows, none_left = counts["rows"], counts["rows_bare"] + counts["rows_too_long"] == counts["rows"]
    if counts["rows_bare"] and (none_left or not tally.skip):
        raise UserError(
            f"{counts['rows_bare']} rows have no token left to learn from once cut to max_length {max_length}:\n  "
            + "\n  ".join(entry["place"] for entry in tally.named["rows_bare"])
            + "\nRaise max_length in the stage's train section, or shorten or remove these rows."
        )
    if none_left:
        raise UserError(
            f"none of the {rows} rows, first {first}, fits max_length {max_length}. "
            "Raise it in the stage's train section, or set data.too_long: keep_end"
        )
    if first_cut:
        print(f"  {counts['rows_cut']} of {rows} rows cut to max_length {max_length}, first {first_cut}", flush=True)
    if counts["rows_too_long"]:
        print(
            f"  {counts['rows_too_long']} of {rows} rows are longer than max_length {max_length}: left out "
            "(refused.jsonl names them; data.too_long: keep_end would cut them)",
            flush=True,
        )


def fit_pairs(encoded: Iterator[tuple[Row, Any]], tally: Tally, max_length: int | None) -> Iterator[Any]:
    """Pairs of which both answers fit max_length; a cut answer has lost its end, so its pair is left out.

    Counts: rows_too_long.
    """
    counts = tally.counts
    counts["rows_too_long"], first, shortest = 0, "", 0
    for row, pair in encoded:
        length, first = max(map(len, pair)), first or row["_place"]
        if max_length is None or length <= max_length:
            yield pair
            continue
        shortest = min(length, shortest or length)
        tally.leave_out(row, "rows_too_long", f"is {length} tokens long, max_length is {max_length}")
    if counts["rows_too_long"] == counts["rows"]:
        raise UserError(
            f"none of the {counts['rows']} pairs, first {first}, fits max_length {max_length} "
            f"(the shortest needs {shortest} tokens). Raise max_length in the stage's train section."
        )
    if counts["rows_too_long"]:
        what = f"{counts['rows_too_long']} of {counts['rows']} pairs longer than max_length {max_length}"
        print(f"  {what}: left out, from {tally.named['rows_too_long'][0]['place']}", flush=True)


def askable(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError naming the questions that cannot be put to the model, before any weights are read; and for a
    chat template that does not take the tools of the rows' environment."""
    rows = (*ctx.data.train[:1], *ctx.data.questions[:1])
    for environment in {row["environment"] for row in rows if row.get("environment")}:
        dialogue.check_template(tokenizer, environment)
    if refused := unaskable(tokenizer, ctx.data.questions):
        named = "\n  ".join(refused[:NAMED_AT_MOST])
        raise UserError(f"{len(refused)} questions of stage '{ctx.out.name}' cannot be asked; correct them:\n  {named}")
