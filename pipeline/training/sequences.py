"""Rows as token ids, fitted to max_length. Kept on disk: a million of them cost no memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from pipeline.data.load import NAMED_AT_MOST
from pipeline.data.render import IGNORED, Encoded, Reply, unaskable
from pipeline.data.shelf import Shelf
from pipeline.data.tokens import Unrenderable, stop_ids
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.contracts import Row
    from pipeline.stages.stage import Context

TooLong = Literal["drop", "keep_end", "cut"]
Refused = list[dict[str, Any]]


def encoded(
    rows: Sequence[Row], encode: Callable[[Row], Any], ctx: Context, skip: bool = False
) -> tuple[Sequence[Row], Sequence[Any], Refused]:
    """Rows with their token ids, and those that the template or tokenizer cannot render, left out with the reason.

    Raises UserError naming these, unless `skip`, or if there are no others.
    """
    kept: Shelf[Row] = Shelf()
    done = shelf()
    refused: Refused = []
    for row in rows:
        try:
            done.append(encode(row))
        except Unrenderable as error:
            refused.append({"place": row["_place"], "reason": str(error)})
        else:
            kept.append(row)
    if refused and (not skip or not len(done)):
        named = "\n".join(f"  {entry['place']}: {entry['reason']}" for entry in refused[:NAMED_AT_MOST])
        raise UserError(
            f"{len(refused)} rows of stage '{ctx.out.name}' cannot be rendered:\n{named}\n"
            "Correct them, name another model.chat_template, or set on_bad_row: skip in the stage's data section."
        )
    if refused:
        print(
            f"  {len(refused)} of {len(rows)} rows cannot be rendered: left out, from {refused[0]['place']}", flush=True
        )
    return kept, done, refused


def askable(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError naming the questions that cannot be put to the model, before any weights are read."""
    if found := unaskable(tokenizer, ctx.data.questions):
        named = "\n  ".join(found[:NAMED_AT_MOST])
        raise UserError(f"{len(found)} questions of stage '{ctx.out.name}' cannot be asked; correct them:\n  {named}")


def shelf(items: Iterable[Any] = ()) -> Shelf[Any]:
    # Pickle is read back by the process that wrote it, from a file that has no name.
    return Shelf(items, dump=pickle.dumps, load=pickle.loads)


def fitted(
    rows: Sequence[Row], sequences: Sequence[Encoded], max_length: int | None, too_long: TooLong, stop: bool
) -> tuple[Sequence[Encoded], dict[str, int], Refused]:
    """Sequences no longer than max_length, what that cost, and the rows left out with the reason.

    too_long: of a longer dialogue, leave it out (`drop`); keep the whole turns that fit, or where not one fits its
    start and its end-of-turn token (`keep_end`); or keep its start, as TRL does (`cut`, for documents).
    stop: a row of which nothing would be left to learn from is an error, else it is left out.

    Counts: rows, rows_cut, rows_too_long (left out), rows_bare (left out: nothing to learn in what fits), tokens,
    tokens_cut, supervised_tokens.
    """
    kept = shelf()
    counts = dict.fromkeys(("rows_cut", "rows_too_long", "rows_bare", "tokens", "tokens_cut", "supervised_tokens"), 0)
    left_out: Refused = []
    first_cut = None
    for row, whole in zip(rows, sequences, strict=True):
        short = whole.cut(max_length)
        longer = len(short.ids) < len(whole.ids)
        if short.supervised == 0:
            counts["rows_bare"] += 1
            left_out.append({"place": row["_place"], "reason": f"has no token to learn from within {max_length}"})
            continue
        if longer and too_long == "drop":
            counts["rows_too_long"] += 1
            reason = f"is {len(whole.ids)} tokens long, max_length is {max_length} (data.too_long: drop)"
            left_out.append({"place": row["_place"], "reason": reason})
            continue
        if longer:
            short = whole.cut_at_end(max_length) if too_long == "keep_end" else short
            if short.supervised == 0:
                counts["rows_too_long"] += 1
                left_out.append(
                    {"place": row["_place"], "reason": f"keeps next to nothing of its answer in {max_length}"}
                )
                continue
            counts["rows_cut"] += 1
            counts["tokens_cut"] += len(whole.ids) - len(short.ids)
            first_cut = first_cut or row["_place"]
        counts["tokens"] += len(short.ids)
        counts["supervised_tokens"] += short.supervised
        kept.append(short)
    if counts["rows_bare"] and (stop or not len(kept)):
        bare = [entry["place"] for entry in left_out if entry["reason"].startswith("has no token")]
        raise UserError(
            f"{counts['rows_bare']} rows have no token left to learn from once cut to max_length {max_length}:\n  "
            + "\n  ".join(bare[:NAMED_AT_MOST])
            + "\nRaise max_length in the stage's train section, or shorten or remove these rows."
        )
    if not len(kept):
        raise UserError(
            f"not one of the {len(rows)} rows, first {rows[0]['_place']}, fits max_length {max_length}. "
            "Raise it in the stage's train section, or set data.too_long: keep_end"
        )
    if first_cut:
        print(
            f"  {counts['rows_cut']} of {len(rows)} rows cut to max_length {max_length}, first {first_cut}", flush=True
        )
    if counts["rows_too_long"]:
        print(
            f"  {counts['rows_too_long']} of {len(rows)} rows are longer than max_length {max_length}: left out "
            "(refused.jsonl names them; data.too_long: keep_end would cut them)",
            flush=True,
        )
    return kept, {"rows": len(rows), **counts}, left_out


def fitting_pairs(
    rows: Sequence[Row], pairs: Sequence[tuple[Any, Any]], max_length: int | None
) -> tuple[Sequence[tuple[Any, Any]], dict[str, int], Refused]:
    """Pairs of which both answers fit max_length; a cut answer has lost its end, so its pair is left out, counted."""
    kept = shelf()
    left_out: Refused = []
    shortest = None
    for row, pair in zip(rows, pairs, strict=True):
        length = max(len(answer) for answer in pair)
        if max_length is None or length <= max_length:
            kept.append(pair)
            continue
        shortest = min(length, shortest or length)
        left_out.append({"place": row["_place"], "reason": f"is {length} tokens long, max_length is {max_length}"})
    if not len(kept):
        raise UserError(
            f"none of the {len(rows)} pairs, first {rows[0]['_place']}, fits max_length {max_length} "
            f"(the shortest needs {shortest} tokens). Raise max_length in the stage's train section."
        )
    if left_out:
        print(
            f"  {len(left_out)} of {len(rows)} pairs longer than max_length {max_length}: left out, from "
            f"{left_out[0]['place']}",
            flush=True,
        )
    return kept, {"rows": len(rows), "rows_too_long": len(left_out)}, left_out


def ends_supervised(sequences: Iterable[Encoded], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many sequences carry loss on an end-of-turn token."""
    ends = set(stop_ids(tokenizer))
    return sum(any(label in ends for label in sequence.labels) for sequence in sequences)


def demonstrations(sequences: Sequence[Encoded]) -> Dataset:
    """What SFTTrainer takes as tokenized already: columns input_ids and labels."""
    rows = ({"input_ids": sequence.ids, "labels": sequence.labels} for sequence in sequences)
    return _written(rows, ids=("input_ids", "labels"))


def scored_pairs(pairs: Sequence[tuple[list[int], list[int]]]) -> Dataset:
    """What RewardTrainer takes as tokenized already."""
    rows = (
        {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}
        for chosen, rejected in pairs
    )
    return _written(rows, ids=("chosen_ids", "rejected_ids"), numbers=("length",))


def reply_pairs(pairs: Sequence[tuple[Reply, Reply]]) -> Dataset:
    """What DPOTrainer makes of preference rows, the ids of prompt, chosen and rejected; and beside them, which of an
    answer's tokens carry loss (`chosen_mask`, `rejected_mask`), for trainer.LearntTokens."""

    def row(chosen: Reply, rejected: Reply) -> dict[str, Any]:
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

    rows = (row(*pair) for pair in pairs)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
    return _written(rows, ids=columns, numbers=("length",))


def _written(rows: Iterable[dict[str, Any]], ids: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Dataset:
    """A Dataset that lies in a file without a name, mapped into memory."""
    features = Features({**{name: List(Value("int64")) for name in ids}, **{name: Value("int64") for name in numbers}})
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "rows.arrow")
        writer = ArrowWriter(path=file, features=features)
        for row in rows:
            writer.write(row)
        writer.finalize()
        # The mapping holds the file's blocks after its name is gone.
        return Dataset.from_file(file)
