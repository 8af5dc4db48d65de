"""What a row asks, as a text that is equal for rows about the same thing."""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any

from pipeline.data.contracts import Row


def find_prompts(row: Row) -> list[str]:
    """What a row asks, as texts: one for each answer the assistant gives in it, each with all that led to it.

    The same question is the same text whether it is given as text, as messages, or inside a longer dialogue; system
    messages are left out. A document asks itself.
    """
    if "prompt" in row:
        prompt = row["prompt"]
        return [_write_turns(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])]
    if "messages" in row:
        return [_write_turns(row["messages"][:i]) for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    return [str(row["text"])]


def prompt_key(row: Row) -> str:
    """What a row asks last: rows with an equal one are about the same thing."""
    return find_prompts(row)[-1]


def first_question(row: Row) -> str:
    """What a row asks first, whatever its letters' case: dialogues that go on from one question share it."""
    messages = row.get("messages", row.get("prompt"))
    asked = list(takewhile(lambda m: m["role"] != "assistant", messages)) if isinstance(messages, list) else []
    return " ".join((_write_turns(asked) if asked else find_prompts(row)[0]).casefold().split())


def _write_turns(messages: list[dict[str, Any]]) -> str:
    turns = [(m["role"], m.get("content") or "", m.get("tool_calls")) for m in messages if m["role"] != "system"]
    return json.dumps(turns, sort_keys=True, ensure_ascii=False)
