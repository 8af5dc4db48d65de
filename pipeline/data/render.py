"""Rows into token ids: the one encoder for training, evaluation and chat, so that what is served is what was trained.

Conversations go through the chat template once, as text; which characters are the assistant's is found by rendering
the turns before it, which needs no generation markers in the template. Padding is by length, never by token id: where
pad and end-of-turn are one token, a mask by id would hide the end and the model would never learn to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.contracts import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100
Messages = list[dict[str, Any]]


class Unrenderable(ValueError):
    """A row that the chat template or the tokenizer cannot turn into something to train on."""


@dataclass(frozen=True)
class Encoded:
    """One sequence. `labels` are the ids themselves where there is loss and -100 elsewhere."""

    ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    def cut(self, max_length: int | None) -> Encoded:
        """The start of the sequence, as TRL cuts it."""
        return self if max_length is None else Encoded(self.ids[:max_length], self.labels[:max_length])


@dataclass(frozen=True)
class Reply:
    """An answer after its prompt: the answer's ids run through the end-of-turn token."""

    prompt_ids: list[int]
    reply_ids: list[int]

    def sequence(self) -> Encoded:
        return Encoded(self.prompt_ids + self.reply_ids, [IGNORED] * len(self.prompt_ids) + self.reply_ids)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.reply_ids)


def document(tokenizer: Tokenizer, text: str) -> Encoded:
    """A text to be learnt whole, closed by the end-of-sequence token."""
    ids = _one_bos(tokenizer, list(tokenizer(text)["input_ids"]))
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
    text = rendered(tokenizer, messages, row)
    spans = [
        _turn(tokenizer, messages, index, text, row)
        for index, message in enumerate(messages)
        if index >= first and message["role"] == "assistant"
    ]
    ids, offsets = _tokens(tokenizer, text)
    labels = [
        token if any(begin < stop and end > start for start, stop in spans) and end > begin else IGNORED
        for token, (begin, end) in zip(ids, offsets, strict=True)
    ]
    return Encoded(ids, labels)


def prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """A prompt up to where the assistant begins to speak."""
    if isinstance(row["prompt"], str):
        return _one_bos(tokenizer, list(tokenizer(row["prompt"])["input_ids"]))
    return _tokens(tokenizer, rendered(tokenizer, row["prompt"], row, ask=True))[0]


def reply(tokenizer: Tokenizer, row: Row, key: str) -> Reply:
    """The prompt and one of its answers (`chosen`, `rejected`, `completion`)."""
    if isinstance(row["prompt"], str):
        return _plain(tokenizer, row["prompt"], row[key])
    messages = row["prompt"] + row[key]
    text = rendered(tokenizer, messages, row)
    start, _ = _turn(tokenizer, messages, len(row["prompt"]), text, row)
    ids, offsets = _tokens(tokenizer, text.rstrip())
    split = sum(end <= start for _, end in offsets)
    return Reply(ids[:split], ids[split:])


def conversation(tokenizer: Tokenizer, row: Row, key: str) -> list[int]:
    """A prompt with one of its answers, as a reward model reads it: rendered whole, closing marks included."""
    if isinstance(row["prompt"], str):
        return _plain(tokenizer, row["prompt"], row[key]).sequence().ids
    return _tokens(tokenizer, rendered(tokenizer, row["prompt"] + row[key], row))[0]


def rendered(tokenizer: Tokenizer, messages: Messages, row: Row | None = None, ask: bool = False) -> str:
    """The template's text for messages; with `ask`, up to where the assistant begins to speak."""
    if not tokenizer.chat_template:
        raise Unrenderable(
            "the base has no chat template; set model.chat_template, for example recipes/templates/chatml.jinja"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, tools=(row or {}).get("tools")
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise Unrenderable(f"the chat template refuses the row: {type(error).__name__}: {error}") from error
    return str(text)


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens at which an answer ends: end-of-sequence, and what the chat template closes a turn with."""
    found = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        asked = rendered(tokenizer, messages[:1], ask=True)
        told = rendered(tokenizer, messages)
        if told.startswith(asked):
            ids = _tokens(tokenizer, told[len(asked) :].rstrip())[0]
            found.append(ids[-1])
    return list(dict.fromkeys(found))


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
    ids, offsets = _tokens(tokenizer, before + after, special=True)
    ids = _one_bos(tokenizer, ids)
    # A token that reaches over the boundary is part of what is learnt: it says the start of the answer.
    split = sum(end <= len(before) for _, end in offsets)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Reply(ids[:split], ids[split:])


def _turn(tokenizer: Tokenizer, messages: Messages, index: int, text: str, row: Row) -> tuple[int, int]:
    """Where in `text` the assistant's turn number `index` lies, from its first word through its end-of-turn token."""
    before = rendered(tokenizer, messages[:index], row, ask=True)
    through = rendered(tokenizer, messages[: index + 1], row)
    if not (text.startswith(before) and text.startswith(through)):
        raise Unrenderable(
            f"the chat template renders turn {index} differently once more turns follow, so its place cannot be told"
        )
    # White space after the end-of-turn token belongs to the layout of the next turn; no model has to say it.
    return len(before), len(through.rstrip())


def _tokens(tokenizer: Tokenizer, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise Unrenderable("begins with two beginning-of-sequence tokens: take the one out of the text")
    return ids
