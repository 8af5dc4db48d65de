"""Text into tokens: what the chat template makes of messages, and the tokens that stand for no text."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from typing import TYPE_CHECKING, Any

from pipeline.data.contracts import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages = list[dict[str, Any]]
STAND_IN = "\ue000stand-in\ue001"
"""Says nothing a template could take for its own; from Unicode's private use area."""


class Unrenderable(ValueError):
    """A row that the chat template or the tokenizer cannot turn into something to train on."""


def apply_template(tokenizer: Tokenizer, messages: Messages, row: Row | None = None, ask: bool = False) -> str:
    """The template's text for messages; with `ask`, up to where the assistant begins to speak."""
    if not tokenizer.chat_template:
        raise Unrenderable(
            "the base has no chat template; set model.chat_template, for example recipes/templates/chatml.jinja"
        )
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": ask, "tools": (row or {}).get("tools")}
    try:
        try:
            return str(tokenizer.apply_chat_template(messages, **options))
        except TypeError:
            # Some templates write a call's arguments as an object, others expect them as JSON.
            return str(tokenizer.apply_chat_template(_dump_arguments(messages), **options))
    except Exception as error:  # a template is a program: it can fail in any way
        raise Unrenderable(f"the chat template refuses the row: {type(error).__name__}: {error}") from error


def _dump_arguments(messages: Messages) -> Messages:
    messages = copy.deepcopy(messages)
    for call in (call for message in messages for call in message.get("tool_calls") or []):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return messages


def tokenize(tokenizer: Tokenizer, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def tokenize_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A text that no template made, with the tokens that the tokenizer puts before one. Those that some put after it
    are left off: they would end a prompt before its answer, and lie at (0, 0) as if they stood in the prompt."""
    ids, offsets = tokenize(tokenizer, text, special=True)
    special = special_ids(tokenizer)
    while ids and ids[-1] in special and offsets[-1] == (0, 0):
        ids.pop(), offsets.pop()
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise Unrenderable("begins with two beginning-of-sequence tokens: remove the one in the text")
    return ids, offsets


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
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": STAND_IN}]
    return not {*_closing(tokenizer, dialogue)}.isdisjoint(stop_ids(tokenizer))


def _closing(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The token after the content of STAND_IN's turn, if any."""
    return tokenize(tokenizer, apply_template(tokenizer, messages).partition(STAND_IN)[2].lstrip())[0][:1]


@functools.lru_cache(maxsize=8)
def _turn_ends(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    question = [{"role": "user", "content": "q"}]
    dialogue = [*question, {"role": "assistant", "content": STAND_IN}]
    # Some templates close the last turn with another token than those before it.
    ends = _closing(tokenizer, dialogue) + _closing(tokenizer, [*dialogue, *question])
    with contextlib.suppress(Unrenderable):  # and a turn that calls a tool with yet another, where they know tools
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": STAND_IN}}}
        called = apply_template(tokenizer, [*question, {"role": "assistant", "content": "", "tool_calls": [call]}])
        if STAND_IN in called:
            ends += tokenize(tokenizer, called.rstrip())[0][-1:]
    special = special_ids(tokenizer) | {tokenizer.eos_token_id}
    return tuple(dict.fromkeys(token for token in ends if token in special))


def closing_marks(tokenizer: Tokenizer) -> list[str]:
    return [str(tokenizer.decode([token])) for token in stop_ids(tokenizer)]
