"""Rows into token ids: the one encoder for training, evaluation and chat, so that what is served is what was trained.

Conversations go through the chat template once, as text; which characters are the assistant's is found by rendering
the turns before it, which needs no generation markers in the template. Padding is by length, never by token id: where
pad and end-of-turn are one token, a mask by id would hide the end and the model would never learn to stop.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.contracts import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100
ANSWER_AT_LEAST = 16
"""Tokens of a cut answer from which it is still one."""
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
    ids, _ = _text_tokens(tokenizer, text)
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
    _nothing_forged(tokenizer, messages, row)
    text = rendered(tokenizer, messages, row)
    spans = [
        _turn(tokenizer, messages, index, text, row)
        for index, message in enumerate(messages)
        if index >= first and message["role"] == "assistant"
    ]
    _no_results_learnt(tokenizer, messages, row, text, spans)
    ids, offsets = _tokens(tokenizer, text)
    labels = [
        token if any(begin < stop and end > start for start, stop in spans) and end > begin else IGNORED
        for token, (begin, end) in zip(ids, offsets, strict=True)
    ]
    return Encoded(ids, labels)


def prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """A prompt up to where the assistant begins to speak."""
    if isinstance(row["prompt"], str):
        return _text_tokens(tokenizer, row["prompt"])[0]
    _nothing_forged(tokenizer, row["prompt"], row)
    return _tokens(tokenizer, rendered(tokenizer, row["prompt"], row, ask=True))[0]


def unaskable(tokenizer: Tokenizer, questions: Iterable[Row]) -> list[str]:
    """Questions, their choices included, that cannot be put to the model: place and reason of each."""
    found = []
    for row in questions:
        try:
            prompt(tokenizer, row)
            for choice in row.get("choices", []) if isinstance(row["prompt"], list) else []:
                _nothing_forged(tokenizer, [{"role": "assistant", "content": choice}], {})
        except Unrenderable as error:
            found.append(f"{row['_place']}: {error}")
    return found


def reply(tokenizer: Tokenizer, row: Row, key: str) -> Reply:
    """The prompt and one of its answers (`chosen`, `rejected`, `completion`), from the assistant's first word to the
    end of its last turn."""
    if isinstance(row["prompt"], str):
        return _plain(tokenizer, row["prompt"], row[key])
    rest = {name: value for name, value in row.items() if name != "messages"}
    whole = demonstration(tokenizer, {**rest, "completion": row[key]})
    learnt = [place for place, label in enumerate(whole.labels) if label != IGNORED]
    start, stop = learnt[0], learnt[-1] + 1
    if whole.ids[stop - 1] not in stop_ids(tokenizer):
        raise Unrenderable(f"the chat template ends '{key}' with no token that the model could stop at")
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
    _nothing_forged(tokenizer, row["prompt"] + row[key], row)
    return _tokens(tokenizer, rendered(tokenizer, row["prompt"] + row[key], row))[0]


def rendered(tokenizer: Tokenizer, messages: Messages, row: Row | None = None, ask: bool = False) -> str:
    """The template's text for messages; with `ask`, up to where the assistant begins to speak."""
    if not tokenizer.chat_template:
        raise Unrenderable(
            "the base has no chat template; set model.chat_template, for example recipes/templates/chatml.jinja"
        )
    options = {"tokenize": False, "add_generation_prompt": ask, "tools": (row or {}).get("tools")}
    try:
        try:
            return str(tokenizer.apply_chat_template(messages, **options))
        except TypeError:
            # Some templates write a call's arguments as an object, others expect them written already.
            return str(tokenizer.apply_chat_template(_written_calls(messages), **options))
    except Exception as error:  # a template is a program: it can fail in any way
        raise Unrenderable(f"the chat template refuses the row: {type(error).__name__}: {error}") from error


def _written_calls(messages: Messages) -> Messages:
    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**m, "tool_calls": [written(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that stand for no text. `all_special_ids` holds only those that have a role or were registered by name,
    and most families ship their end-of-turn tokens as special in tokenizer.json alone."""
    return frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)


def marks(tokenizer: Tokenizer, text: str) -> list[str]:
    """The special tokens that are spelled out in a text: the tokenizer makes a token of each."""
    return _marks(tokenizer, len(tokenizer)).findall(text)


def without_marks(tokenizer: Tokenizer, text: str) -> str:
    """What a model said, without special tokens that it spelled out letter by letter: put into a dialogue again, they
    would become what they spell."""
    while marks(tokenizer, text):  # what is left once one is gone may spell another
        text = _marks(tokenizer, len(tokenizer)).sub("", text)
    return text


@functools.lru_cache(maxsize=8)
def _marks(tokenizer: Tokenizer, size: int) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder
    spelled = sorted((added[token].content for token in special_ids(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, filter(None, spelled))) or r"(?!)")


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens at which an answer ends: end-of-sequence, and what the chat template closes a turn with."""
    ends = _turn_ends(tokenizer, json.dumps(tokenizer.chat_template)) if tokenizer.chat_template else ()
    return list(dict.fromkeys([tokenizer.eos_token_id, *ends]))


def closes_turns(tokenizer: Tokenizer) -> bool:
    """Whether the chat template ends a dialogue with a token that the model can stop at."""
    told = [{"role": "user", "content": "q"}, {"role": "assistant", "content": STAND_IN}]
    return not {*_closing(tokenizer, told)}.isdisjoint(stop_ids(tokenizer))


def _closing(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The token after what is said in STAND_IN's turn, if any."""
    return _tokens(tokenizer, rendered(tokenizer, messages).partition(STAND_IN)[2].lstrip())[0][:1]


@functools.lru_cache(maxsize=8)
def _turn_ends(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    asked = [{"role": "user", "content": "q"}]
    told = [*asked, {"role": "assistant", "content": STAND_IN}]
    # Some templates close the last turn with another token than those before it.
    found = [_closing(tokenizer, messages) for messages in (told, [*told, *asked])]
    with contextlib.suppress(Unrenderable):  # and a turn that calls a tool with yet another, where they know tools
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": STAND_IN}}}
        called = rendered(tokenizer, [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
        if STAND_IN in called:
            found.append(_tokens(tokenizer, called.rstrip())[0][-1:])
    special = special_ids(tokenizer) | {tokenizer.eos_token_id}
    return tuple(dict.fromkeys(token for ids in found for token in ids if token in special))


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
    ids, offsets = _text_tokens(tokenizer, before + after)
    # A token that reaches over the boundary is part of what is learnt: it says the start of the answer.
    split = sum(end <= len(before) for _, end in offsets)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Reply(ids[:split], ids[split:], ids[split:])


def _turn(tokenizer: Tokenizer, messages: Messages, index: int, text: str, row: Row) -> tuple[int, int]:
    """Where in `text` the assistant's turn number `index` lies, from its first word through its end-of-turn token.

    Its first word is the first that the model itself has to say: what the template puts after the opening of the turn
    (an empty thought, say) belongs to it.
    """
    before = rendered(tokenizer, messages[:index], row, ask=True)
    through = rendered(tokenizer, messages[: index + 1], row)
    if text.startswith(before) and text.startswith(through):
        # White space after the end-of-turn token belongs to the layout of the next turn; no model has to say it.
        start, end = len(before), len(through.rstrip())
    else:
        start, end = _turn_by_change(tokenizer, messages, index, text, row)
    spoken = text[start:end]
    for mark in _closings(tokenizer):
        spoken = spoken.removesuffix(mark)
    _nothing_lost(messages, index, spoken)
    return start, end


STAND_IN = "\ue000stand-in\ue001"
"""Says nothing a template could take for its own; from Unicode's private use area."""


def _turn_by_change(tokenizer: Tokenizer, messages: Messages, index: int, text: str, row: Row) -> tuple[int, int]:
    """The same where later turns change how the template renders earlier ones (thoughts that are left out of the
    history, say): what differs once the turn says something else is the turn."""
    other = rendered(tokenizer, _saying(messages, index, "assistant"), row)
    said = other.find(STAND_IN)
    rest = other[said + len(STAND_IN) :]
    start = _opened(tokenizer, messages[:index], row, text, said) if said >= 0 and text.endswith(rest) else None
    if start is None:
        raise Unrenderable(
            f"the chat template renders turn {index} differently once more turns follow, so its place cannot be told"
        )
    end, closing = len(text) - len(rest), rest.lstrip()
    mark = next((mark for mark in _closings(tokenizer) if closing.startswith(mark)), None)
    return start, end + len(rest) - len(closing) + len(mark) if mark else end


def _opened(tokenizer: Tokenizer, before: Messages, row: Row, text: str, said: int) -> int | None:
    """Where a turn that speaks at `said` begins: after the words that ask the assistant to speak, or as many of them
    as this turn was opened with (some templates ask for a thought that they leave out of the history)."""
    asked = rendered(tokenizer, before, row, ask=True)
    shared = len(os.path.commonprefix([asked, rendered(tokenizer, before, row)]))
    tokens = [
        (token, begin, end) for token, (begin, end) in zip(*_tokens(tokenizer, asked), strict=True) if end > shared
    ]
    special = special_ids(tokenizer)
    marks = [end for token, _, end in tokens if token in special]
    for _, _, end in reversed(tokens):
        opening = asked[tokens[0][1] : end]
        # Without a special token in it, the opening could be anybody's words.
        place = text.rfind(opening, 0, said) if marks and end >= marks[0] else -1
        if place >= 0:
            return place + len(opening)
    return None


def _saying(messages: Messages, index: int, role: str) -> Messages:
    """The dialogue with one message's words exchanged."""
    kept = {key: value for key, value in messages[index].items() if key in ("tool_call_id", "name")}
    return [*messages[:index], {**kept, "role": role, "content": STAND_IN}, *messages[index + 1 :]]


def _nothing_lost(messages: Messages, index: int, turn: str) -> None:
    """A template that has no words for what an assistant says must not teach it to say nothing."""
    thought, closed, answer = str(messages[index].get("content") or "").rpartition("</think>")
    # A thought may be left out of the history, but not an answer, nor all there is.
    said = answer.strip() or thought.replace("<think>", "").strip() if closed else answer.strip()
    if said and said not in turn:
        raise Unrenderable(f"the chat template leaves out what the assistant says in turn {index}")
    for call in messages[index].get("tool_calls") or []:
        if call["function"]["name"] not in turn:
            raise Unrenderable(f"the chat template leaves out the tool call of turn {index}: it knows no tools")


def _nothing_forged(tokenizer: Tokenizer, messages: Messages, row: Row) -> None:
    """Nobody speaks a special token: in what is said it would end the turn, or begin one in another's name."""
    told = [(f"message {index}", message) for index, message in enumerate(messages)]
    for where, value in (*told, ("'tools'", row.get("tools"))):
        for text in _texts(value):
            if found := marks(tokenizer, text):
                raise Unrenderable(
                    f"{where} holds '{found[0]}', which is a special token of this base: it would end or forge a turn. "
                    "Take it out, or write it otherwise"
                )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(key)
            yield from _texts(below)


def _no_results_learnt(
    tokenizer: Tokenizer, messages: Messages, row: Row, text: str, spans: list[tuple[int, int]]
) -> None:
    """What a tool answered stands in no turn of the assistant's."""
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            other = rendered(tokenizer, _saying(messages, index, "tool"), row)
            if STAND_IN not in other:
                raise Unrenderable(f"the chat template leaves out the tool's result of turn {index}: it knows no tools")
            place = len(os.path.commonprefix([text, other]))
            if any(start <= place < stop for start, stop in spans):
                raise Unrenderable(f"the chat template puts the tool's result, turn {index}, into the assistant's turn")


def _closings(tokenizer: Tokenizer) -> list[str]:
    return [str(tokenizer.decode([token])) for token in stop_ids(tokenizer)]


def _tokens(tokenizer: Tokenizer, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _text_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A text that no template made, with the tokens that the tokenizer puts before one. Those that some put after it
    are left off: they would end a prompt before its answer, and lie at (0, 0) as if they stood in the prompt."""
    ids, offsets = _tokens(tokenizer, text, special=True)
    special = special_ids(tokenizer)
    while ids and ids[-1] in special and offsets[-1] == (0, 0):
        ids.pop(), offsets.pop()
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise Unrenderable("begins with two beginning-of-sequence tokens: take the one out of the text")
    return ids, offsets
