"""Where in a rendered dialogue each turn of the assistant's lies, and what a dialogue may not hold.

A turn is found by rendering the turns before it, which needs no generation markers in the template.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.data.contracts import Row
from pipeline.data.tokens import (
    STAND_IN,
    Messages,
    Unrenderable,
    apply_template,
    closing_marks,
    marks,
    special_ids,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def find_turn(tokenizer: Tokenizer, messages: Messages, index: int, text: str, row: Row) -> tuple[int, int]:
    """Where in `text` the assistant's turn number `index` lies, from its first word through its end-of-turn token.

    Its first word is the first that the model itself has to say: what the template puts after the opening of the turn
    (an empty thought, say) belongs to it.
    """
    before = apply_template(tokenizer, messages[:index], row, ask=True)
    through = apply_template(tokenizer, messages[: index + 1], row)
    if text.startswith(before) and text.startswith(through):
        # White space after the end-of-turn token belongs to the layout of the next turn; no model has to say it.
        start, end = len(before), len(through.rstrip())
    else:
        start, end = _find_by_change(tokenizer, messages, index, text, row)
    spoken = text[start:end]
    for mark in closing_marks(tokenizer):
        spoken = spoken.removesuffix(mark)
    _refuse_lost(messages, index, spoken)
    return start, end


def _find_by_change(tokenizer: Tokenizer, messages: Messages, index: int, text: str, row: Row) -> tuple[int, int]:
    """The same where later turns change how the template renders earlier ones (thoughts that are left out of the
    history, say): what differs once the turn says something else is the turn."""
    changed = apply_template(tokenizer, _replace_content(messages, index, "assistant"), row)
    place = changed.find(STAND_IN)
    rest = changed[place + len(STAND_IN) :]
    start = _find_opening(tokenizer, messages[:index], row, text, place) if place >= 0 and text.endswith(rest) else None
    if start is None:
        raise Unrenderable(
            f"the chat template renders turn {index + 1} differently when more turns follow, so OneBase cannot tell "
            "which tokens belong to it"
        )
    end, closing = len(text) - len(rest), rest.lstrip()
    mark = next((mark for mark in closing_marks(tokenizer) if closing.startswith(mark)), None)
    return start, end + len(rest) - len(closing) + len(mark) if mark else end


def _find_opening(tokenizer: Tokenizer, before: Messages, row: Row, text: str, content: int) -> int | None:
    """Where a turn whose content stands at `content` begins: after the generation prompt, or after as much of it as
    this turn was opened with (some templates ask for a thought that they leave out of the history)."""
    prompt = apply_template(tokenizer, before, row, ask=True)
    shared = len(os.path.commonprefix([prompt, apply_template(tokenizer, before, row)]))
    tokens = [(token, *span) for token, span in zip(*tokenize(tokenizer, prompt), strict=True) if span[1] > shared]
    special = special_ids(tokenizer)
    first_mark = next((end for token, _, end in tokens if token in special), None)
    for _, _, end in reversed(tokens):
        # Without a special token in it, the opening could be anybody's words.
        if first_mark is None or end < first_mark:
            return None
        opening = prompt[tokens[0][1] : end]
        place = text.rfind(opening, 0, content)
        if place >= 0:
            return place + len(opening)
    return None


def _replace_content(messages: Messages, index: int, role: str) -> Messages:
    """The dialogue with the stand-in as one message's content."""
    kept = {key: value for key, value in messages[index].items() if key in ("tool_call_id", "name")}
    return [*messages[:index], {**kept, "role": role, "content": STAND_IN}, *messages[index + 1 :]]


def _refuse_lost(messages: Messages, index: int, turn: str) -> None:
    """A template that leaves out what an assistant says must not teach it to say nothing."""
    thought, closed, answer = str(messages[index].get("content") or "").rpartition("</think>")
    # A thought may be left out of the history, but not an answer, nor all there is.
    content = answer.strip() or thought.replace("<think>", "").strip() if closed else answer.strip()
    if content and content not in turn:
        raise Unrenderable(f"the chat template leaves out what the assistant says in turn {index + 1}")
    for call in messages[index].get("tool_calls") or []:
        if call["function"]["name"] not in turn:
            raise Unrenderable(f"the chat template leaves out the tool call of turn {index + 1}: it knows no tools")


def refuse_forged(tokenizer: Tokenizer, messages: Messages, row: Row) -> None:
    """Nobody speaks a special token: in what is said it would end the turn, or begin one in another's name."""
    places = [(f"message {index}", message) for index, message in enumerate(messages, 1)]
    for place, value in (*places, ("'tools'", row.get("tools"))):
        for text in _find_texts(value):
            if spelled := marks(tokenizer, text):
                raise Unrenderable(
                    f"{place} holds '{spelled[0]}', which is a special token of this base: it would end a turn or "
                    "fake one. Remove it, or write it differently"
                )


def _find_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for below in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _find_texts(below)


def refuse_learnt_results(
    tokenizer: Tokenizer, messages: Messages, row: Row, text: str, spans: list[tuple[int, int]]
) -> None:
    """What a tool answered stands in no turn of the assistant's."""
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            changed = apply_template(tokenizer, _replace_content(messages, index, "tool"), row)
            if STAND_IN not in changed:
                raise Unrenderable(
                    f"the chat template leaves out the tool's result of turn {index + 1}: it knows no tools"
                )
            place = len(os.path.commonprefix([text, changed]))
            if any(start <= place < stop for start, stop in spans):
                raise Unrenderable(
                    f"the chat template puts the tool's result, turn {index + 1}, into the assistant's turn"
                )
