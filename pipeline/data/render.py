"""Rows into token ids: the one encoder for training, evaluation and chat, so that what is served is what was trained.

Conversations go through the chat template once, as text; which characters are the assistant's is found by rendering
the turns before it, which needs no generation markers in the template. Padding is by length, never by token id: where
pad and end-of-turn are one token, a mask by id would hide the end and the model would never learn to stop.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.data.contracts import Row
from pipeline.data.tokens import Unrenderable, apply_template, stop_ids, tokenize, tokenize_text
from pipeline.data.turns import find_turn, refuse_forged, refuse_learnt_results

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase as Tokenizer

TooLong = Literal["drop", "keep_end", "cut"]
IGNORED = -100
ANSWER_AT_LEAST = 16
"""Tokens of a cut answer from which it is still one."""


@dataclass(frozen=True)
class Encoded:
    """One sequence. `labels` are the ids themselves where there is loss and -100 elsewhere."""

    ids: list[int]
    labels: list[int]

    @classmethod
    def without_loss(cls, ids: list[int]) -> Encoded:
        return cls(ids, [IGNORED] * len(ids))

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    def cut(self, max_length: int | None) -> Encoded:
        """The start of the sequence, as TRL cuts it."""
        return self if max_length is None else Encoded(self.ids[:max_length], self.labels[:max_length])

    def cut_at_end(self, max_length: int) -> Encoded:
        """The start of the sequence through the last whole turn of the assistant's that fits; where not one does, its
        start and, in the last place, the token that ends its first turn. Nothing is supervised where fewer than
        ANSWER_AT_LEAST tokens of that turn are left: a fragment teaches to stop, and nothing to say."""
        turns = [i + 1 for i, label in enumerate(self.labels) if label != IGNORED and self._ends_turn(i)]
        whole = [end for end in turns if end <= max_length]
        if whole:
            return self.cut(whole[-1])
        end = self.ids[turns[0] - 1]
        cut = Encoded([*self.ids[: max_length - 1], end], [*self.labels[: max_length - 1], end])
        return cut if cut.supervised > ANSWER_AT_LEAST else Encoded(cut.ids, [IGNORED] * len(cut.ids))

    def _ends_turn(self, index: int) -> bool:
        return index + 1 == len(self.labels) or self.labels[index + 1] == IGNORED


def fit(whole: Encoded, max_length: int | None, too_long: TooLong) -> tuple[Encoded, str, str]:
    """A sequence no longer than max_length; where it is to be left out, also what it is counted as, and the reason.

    too_long: of a longer dialogue, leave it out (`drop`); keep the whole turns that fit, or where not one fits its
    start and its end-of-turn token (`keep_end`); or keep its start, as TRL does (`cut`, for documents).
    """
    short = whole.cut(max_length)
    if short.supervised == 0:
        return short, "rows_bare", f"has no token to learn from within {max_length}"
    if max_length is None or len(whole.ids) <= max_length or too_long == "cut":
        return short, "", ""
    if too_long == "drop":
        reason = f"is {len(whole.ids)} tokens long, max_length is {max_length} (data.too_long: drop)"
        return short, "rows_too_long", reason
    short = whole.cut_at_end(max_length)
    if short.supervised == 0:
        return short, "rows_too_long", f"keeps next to nothing of its answer in {max_length}"
    return short, "", ""


@dataclass(frozen=True)
class Reply:
    """An answer after its prompt: the answer's ids run through the end-of-turn token.

    Of an answer of several messages only the assistant's carry loss, as `labels` says: the answer's ids where there is
    loss and -100 elsewhere.
    """

    prompt_ids: list[int]
    reply_ids: list[int]
    labels: list[int]

    def sequence(self) -> Encoded:
        return Encoded(self.prompt_ids + self.reply_ids, [IGNORED] * len(self.prompt_ids) + self.labels)

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids)


def document(tokenizer: Tokenizer, text: str) -> Encoded:
    """A text to be learnt whole, closed by the end-of-sequence token."""
    ids, _ = tokenize_text(tokenizer, text)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Encoded(ids, list(ids))


def demonstration(tokenizer: Tokenizer, row: Row) -> Encoded:
    """A dialogue, with loss on what the assistant says and on the token that ends its turn.

    Of `prompt` and `completion` only the completion's turns carry loss; of `messages` all of the assistant's.
    """
    if "messages" not in row and isinstance(row["prompt"], str):
        return _plain(tokenizer, row["prompt"], row["completion"]).sequence()
    if "messages" in row:
        messages, first = row["messages"], 0
    else:
        messages, first = row["prompt"] + row["completion"], len(row["prompt"])
    refuse_forged(tokenizer, messages, row)
    text = apply_template(tokenizer, messages, row)
    spans = [
        find_turn(tokenizer, messages, index, text, row)
        for index, message in enumerate(messages)
        if index >= first and message["role"] == "assistant"
    ]
    refuse_learnt_results(tokenizer, messages, row, text, spans)
    ids, offsets = tokenize(tokenizer, text)
    labels = [
        token if any(begin < stop and end > start for start, stop in spans) and end > begin else IGNORED
        for token, (begin, end) in zip(ids, offsets, strict=True)
    ]
    return Encoded(ids, labels)


def prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """A prompt up to where the assistant begins to speak."""
    if isinstance(row["prompt"], str):
        return tokenize_text(tokenizer, row["prompt"])[0]
    refuse_forged(tokenizer, row["prompt"], row)
    return tokenize(tokenizer, apply_template(tokenizer, row["prompt"], row, ask=True))[0]


def unaskable(tokenizer: Tokenizer, questions: Iterable[Row]) -> list[str]:
    """Questions, their choices included, that cannot be put to the model: place and reason of each."""
    problems = []
    for row in questions:
        try:
            prompt(tokenizer, row)
            for choice in row.get("choices", []) if isinstance(row["prompt"], list) else []:
                refuse_forged(tokenizer, [{"role": "assistant", "content": choice}], {})
        except Unrenderable as error:
            problems.append(f"{row['_place']}: {error}")
    return problems


def reply(tokenizer: Tokenizer, row: Row, key: str) -> Reply:
    """The prompt and one of its answers (`chosen`, `rejected`, `completion`), from the assistant's first word to the
    end of its last turn."""
    if isinstance(row["prompt"], str):
        return _plain(tokenizer, row["prompt"], row[key])
    rest = {name: value for name, value in row.items() if name != "messages"}
    whole = demonstration(tokenizer, {**rest, "completion": row[key]})
    with_loss = [place for place, label in enumerate(whole.labels) if label != IGNORED]
    start, stop = with_loss[0], with_loss[-1] + 1
    if whole.ids[stop - 1] not in stop_ids(tokenizer):
        raise Unrenderable(f"the chat template ends '{key}' without a token at which the model could stop")
    return Reply(whole.ids[:start], whole.ids[start:stop], whole.labels[start:stop])


def pair(tokenizer: Tokenizer, row: Row) -> tuple[Reply, Reply]:
    """Both answers of a comparison.

    Where a token reaches over the end of a text prompt, the two answers' prompts differ in it: what they share is the
    prompt, the rest belongs to each answer.
    """
    chosen, rejected = reply(tokenizer, row, "chosen"), reply(tokenizer, row, "rejected")
    if not isinstance(row["prompt"], str):
        return chosen, rejected
    shared = len(os.path.commonprefix([chosen.prompt_ids, rejected.prompt_ids]))

    def after_shared(answer: Reply) -> Reply:
        own = answer.prompt_ids[shared:] + answer.reply_ids
        return Reply(answer.prompt_ids[:shared], own, own)

    return after_shared(chosen), after_shared(rejected)


def conversation(tokenizer: Tokenizer, row: Row, key: str) -> list[int]:
    """A prompt with one of its answers, as a reward model reads it: rendered whole, closing marks included."""
    if isinstance(row["prompt"], str):
        return _plain(tokenizer, row["prompt"], row[key]).sequence().ids
    refuse_forged(tokenizer, row["prompt"] + row[key], row)
    return tokenize(tokenizer, apply_template(tokenizer, row["prompt"] + row[key], row))[0]


def swapped(tokenizer: Tokenizer, rows: Sequence[Row]) -> list[list[int]]:
    """Each prompt with the chosen answer of the next row that has another prompt, as `conversation` gives it: what a
    reward model has not learnt to judge. Left out where the template refuses it, or there is no such row."""
    found = []
    for place, row in enumerate(rows):
        others = (rows[(place + step) % len(rows)] for step in range(1, len(rows)))
        other = next((one for one in others if one["prompt"] != row["prompt"]), None)
        if other is not None:
            with contextlib.suppress(Unrenderable):
                found.append(conversation(tokenizer, {**row, "chosen": other["chosen"]}, "chosen"))
    return found


def padded(rows: list[list[int]], fill: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged ids as (ids_BT, mask_BT); the mask is 1 on the real tokens, whatever their ids."""
    import torch

    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), fill, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_BT[index, where] = torch.tensor(row, dtype=torch.long)
        mask_BT[index, where] = 1
    return ids_BT, mask_BT


def _plain(tokenizer: Tokenizer, before: str, after: str) -> Reply:
    """Text and its continuation, closed by the end-of-sequence token."""
    ids, offsets = tokenize_text(tokenizer, before + after)
    # A token that reaches over the boundary is part of what is learnt: it says the start of the answer.
    split = sum(end <= len(before) for _, end in offsets)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Reply(ids[:split], ids[split:], ids[split:])
