"""Dialogues as files write them, turned into messages of {role, content} with tool_calls where a tool is called."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.data.contracts import Row

Messages = list[dict[str, Any]]
ROLES = {"developer": "system", "function": "tool", "ipython": "tool", "model": "assistant"}
SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
TURN = re.compile(r"\n\n(Human|Assistant):")


class Unreadable(ValueError):
    """A row that is not in the format it is read as."""


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def messages_of(row: Row, key: str) -> Messages:
    """Messages under a key, each content one text: parts are joined, a call told as a part becomes `tool_calls`.

    What is not a message at all is left as it is, for the contract to name.
    """
    value = row.get(key)
    if not isinstance(value, list):
        raise Unreadable(f"field '{key}' is no list of messages")
    return [_plain(said) if isinstance(said, dict) else said for said in value]


def _plain(said: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {
        key: said[key] for key in ("role", "content", "tool_calls", "tool_call_id", "name") if key in said
    }
    role = known.get("role")
    if isinstance(role, str):
        known["role"] = ROLES.get(role, role)
    content = known.get("content")
    if isinstance(content, list):
        known |= _joined(content)
    if known.get("tool_calls"):
        known["tool_calls"] = _calls(known["tool_calls"])
        known["content"] = known.get("content") or ""
    elif "tool_calls" in known:
        del known["tool_calls"]
    return known


def _joined(parts: list[Any]) -> dict[str, Any]:
    """A content of parts {type, text|value}: texts joined, reasoning between think marks, calls as `tool_calls`."""
    texts: list[str] = []
    calls: list[Any] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        told = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(told, str):
            raise Unreadable(f"holds a part of type '{kind}', which is no text: only text is trained on here")
        if kind in ("tool_call", "function_call"):
            calls.append(_decoded_call(told))
        elif kind == "reasoning":
            texts.append(f"<think>\n{told}\n</think>\n\n")
        elif kind in ("text", "tools", "tool_result", None):
            texts.append(told)
        else:
            raise Unreadable(f"holds a part of type '{kind}', which is no text: only text is trained on here")
    return {"content": "".join(texts)} | ({"tool_calls": calls} if calls else {})


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls in the shape chat templates read: {type, function: {name, arguments as an object}}."""
    if not isinstance(calls, list):
        raise Unreadable("field 'tool_calls' is no list")
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unreadable("a tool call names no function")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise Unreadable(f"the arguments of the call of '{function['name']}' are broken JSON") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _decoded_call(text: str) -> dict[str, Any]:
    try:
        return _call(json.loads(text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"a tool call is broken JSON: {error}") from error


def sharegpt_messages(row: Row) -> Messages:
    """`conversations` of {from, value}, with `system` beside them."""
    turns = row.get("conversations", row.get("conversation"))
    if not isinstance(turns, list):
        raise Unreadable("field 'conversations' is no list")
    messages = [message("system", row["system"])] if isinstance(row.get("system"), str) and row["system"] else []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Unreadable(f"conversations[{index}] is no object with 'from' and 'value'")
        speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise Unreadable(f"conversations[{index}].from is {speaker!r:.40}, expected one of {', '.join(SPEAKERS)}")
        if not isinstance(said, str):
            raise Unreadable(f"conversations[{index}].value is no text")
        if speaker == "function_call":
            calls = _parsed_calls(said, index)
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append(message(role, said))
    return messages


def _parsed_calls(said: str, index: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"conversations[{index}] is a call in broken JSON: {error}") from error
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def history(row: Row) -> Messages:
    """What was said before: `system`, and `history` as pairs of a question and its answer."""
    messages = []
    if row.get("system"):
        if not isinstance(row["system"], str):
            raise Unreadable("field 'system' is no text")
        messages.append(message("system", row["system"]))
    before = row.get("history") or []
    if not isinstance(before, list):
        raise Unreadable("field 'history' is no list of pairs")
    for index, pair in enumerate(before):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(s, str) and s.strip() for s in pair)):
            raise Unreadable(f"history[{index}] is no pair of a question and its answer")
        messages += [message("user", pair[0]), message("assistant", pair[1])]
    return messages


def transcript(row: Row, key: str) -> Messages:
    """A text "\\n\\nHuman: ... \\n\\nAssistant: ..." as messages."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"field '{key}' is missing or empty")
    parts = TURN.split(value)
    if parts[0].strip() or len(parts) < 3:
        raise Unreadable(f"field '{key}' is not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [message(roles[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    if turns[-1]["role"] != "assistant":
        raise Unreadable(f"field '{key}' does not end on an Assistant turn")
    if any(first["role"] == second["role"] for first, second in zip(turns, turns[1:], strict=False)):
        raise Unreadable(f"field '{key}' has two turns of one speaker in a row")
    return turns


def common_start(chosen: Messages, rejected: Messages) -> Row:
    """Two dialogues that differ in their last turn, as prompt, chosen and rejected."""
    if not chosen or not rejected:
        raise Unreadable("one of the two dialogues is empty")
    if chosen[:-1] != rejected[:-1]:
        raise Unreadable("the prompts of 'chosen' and 'rejected' differ")
    if len(chosen) < 2:
        raise Unreadable("the two dialogues share no prompt")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
