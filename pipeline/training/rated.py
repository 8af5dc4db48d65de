"""Answers with thumbs up or down on their way to TRL's KTOTrainer: coupled with a neighbour's answer, put into batches.

KTO's KL term is estimated from prompts with the answers of other rows (arXiv 2402.01306, section 4.1). As TRL does,
each prompt takes the answer before its own in its batch, and the first one the last, so that a batch is judged by its
own answers. TRL keeps the order of the rows for that: they are shuffled before, once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from pipeline.data.contracts import Row
from pipeline.data.render import IGNORED, Reply
from pipeline.data.shelf import Picked
from pipeline.errors import UserError
from pipeline.training.sequences import Form, Tally


@dataclass(frozen=True)
class Rated:
    """An answer with its label; `other` is its prompt with a neighbour's answer, where a loss needs that."""

    reply: Reply
    good: bool
    other: Reply | None = None


def shuffle(rows: Sequence[Row], seed: int) -> Sequence[Row]:
    """All rows, in an order that depends on the seed alone."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return Picked([rows], [0] * len(rows), order)


def couple(
    encoded: Iterator[tuple[Row, Rated]], tally: Tally, max_length: int | None, batch: int | None
) -> Iterator[Rated]:
    """Answers that fit max_length, in batches of so many each with the answer before it; with no `batch`, alone.

    Counts: rows_too_long. Raises UserError if none fits.
    """
    fitting = _leave_out_long(encoded, tally, max_length)
    if batch is None:
        yield from fitting
        return
    while some := list(islice(fitting, batch)):
        for item, before in zip(some, [some[-1], *some[:-1]], strict=True):
            other = Reply(item.reply.prompt_ids, before.reply.reply_ids, before.reply.labels)
            yield replace(item, other=other)


def _leave_out_long(encoded: Iterator[tuple[Row, Rated]], tally: Tally, max_length: int | None) -> Iterator[Rated]:
    counts = tally.counts
    counts["rows_too_long"], first = 0, ""
    for row, item in encoded:
        first = first or row["_place"]
        if max_length is None or len(item.reply) <= max_length:
            yield item
        else:
            tally.leave_out(row, "rows_too_long", f"is {len(item.reply)} tokens long, max_length is {max_length}")
    if counts["rows_too_long"] == counts["rows"]:
        raise UserError(
            f"none of the {counts['rows']} answers, first {first}, fits max_length {max_length}. "
            "Raise max_length in the stage's train section."
        )
    if counts["rows_too_long"]:
        what = f"{counts['rows_too_long']} of {counts['rows']} answers longer than max_length {max_length}"
        print(f"  {what}: left out, from {tally.named['rows_too_long'][0]['place']}", flush=True)


def form(coupled: bool) -> Form[Rated]:
    """How they lie in Arrow: the names that KTOTrainer takes, with which of an answer's tokens carry loss."""
    columns = ("prompt_ids", "completion_ids", "completion_mask", "label", "length")
    return Form(
        (*columns, "KL_completion_ids", "KL_completion_mask") if coupled else columns,
        lambda item: _to_row(item, coupled),
        _from_row,
    )


def _to_row(item: Rated, coupled: bool) -> dict[str, Any]:
    other = item.other or Reply([], [], [])
    row = {
        "prompt_ids": item.reply.prompt_ids,
        "completion_ids": item.reply.reply_ids,
        "completion_mask": [int(label != IGNORED) for label in item.reply.labels],
        "label": int(item.good),
        "length": max(len(item.reply), len(other)),
    }
    if coupled:
        row["KL_completion_ids"] = other.reply_ids
        row["KL_completion_mask"] = [int(label != IGNORED) for label in other.labels]
    return row


def _from_row(row: dict[str, Any]) -> Rated:
    ids, mask = row["completion_ids"], row["completion_mask"]
    labels = [token if bit else IGNORED for token, bit in zip(ids, mask, strict=True)]
    return Rated(Reply(row["prompt_ids"], ids, labels), bool(row["label"]))


class LearntAnswers(DataCollatorForUnpairedPreference):
    """TRL's collator takes every token after the prompt as the answer's. Of an answer of several messages only the
    assistant's are. A prompt with another row's answer is cut to max_length, as TRL cuts it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in batch.keys() & {"completion_mask", "KL_completion_mask"}:
            for mask_T, row in zip(batch[name], examples, strict=True):
                start = len(row["prompt_ids"])
                learnt = torch.tensor(row[name])[: len(mask_T) - start]
                mask_T[start : start + len(learnt)] = learnt
        return batch
