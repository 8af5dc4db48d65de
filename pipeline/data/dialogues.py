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
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")


class Unreadable(ValueError):
    """A row that is not in the format it is read as."""


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def parse_json(text: str, subject: str) -> Any:
    """Raises Unreadable with the subject, "field 'tools' is" for example."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{subject} broken JSON: {error}") from error


def read_messages(row: Row, key: str) -> Messages:
    """Messages under a key, each content one text: parts are joined, and a part that is a call becomes `tool_calls`.

    What is not a message at all is left as it is, for the contract to name.
    """
    messages = row.get(key)
    if not isinstance(messages, list):
        raise Unreadable(f"field '{key}' is not a list of messages")
    return [_normalize(each) if isinstance(each, dict) else each for each in messages]


def _normalize(given: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {
        key: given[key] for key in ("role", "content", "tool_calls", "tool_call_id", "name") if key in given
    }
    role, content = result.get("role"), result.get("content")
    if isinstance(role, str):
        result["role"] = ROLES.get(role, role)
    if isinstance(content, list):
        result |= _join_parts(content)
    calls = result.pop("tool_calls", None)
    if not calls:
        return result
    if not isinstance(calls, list):
        raise Unreadable("field 'tool_calls' is not a list")
    return {**result, "content": result.get("content") or "", "tool_calls": [_normalize_call(call) for call in calls]}


def _join_parts(parts: list[Any]) -> dict[str, Any]:
    """A content of parts {type, text|value}: texts joined, reasoning between think marks, calls as `tool_calls`."""
    texts: list[str] = []
    calls: list[Any] = []
    for part in parts:
        kind, text = (part.get("type"), part.get("text", part.get("value"))) if isinstance(part, dict) else (None, None)
        if isinstance(text, str) and kind in ("tool_call", "function_call"):
            calls.append(parse_json(text, "a tool call is"))
        elif isinstance(text, str) and kind == "reasoning":
            texts.append(f"<think>\n{text}\n</think>\n\n")
        elif isinstance(text, str) and kind in ("text", "tools", "tool_result", None):
            texts.append(text)
        else:
            raise Unreadable(f"holds a part of type '{kind}', which is not text: OneBase trains on text only")
    return {"content": "".join(texts)} | ({"tool_calls": calls} if calls else {})


def _normalize_call(call: Any) -> dict[str, Any]:
    """A tool call in the shape chat templates read: {type, function: {name, arguments as an object}}."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unreadable("a tool call names no function")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        subject = f"the arguments of the call of '{function['name']}' are"
        arguments = parse_json(arguments, subject) if arguments.strip() else {}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_sharegpt(row: Row) -> Messages:
    """`conversations` of {from, value}, with `system` beside them."""
    turns = row.get("conversations", row.get("conversation"))
    if not isinstance(turns, list):
        raise Unreadable("field 'conversations' is not a list")
    messages = [message("system", row["system"])] if isinstance(row.get("system"), str) and row["system"] else []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Unreadable(f"conversations[{index + 1}] is not an object with 'from' and 'value'")
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise Unreadable(
                f"conversations[{index + 1}].from is {speaker!r:.40}, expected one of {', '.join(SPEAKERS)}"
            )
        if not isinstance(text, str):
            raise Unreadable(f"conversations[{index + 1}].value is not text")
        if speaker == "function_call":
            calls = parse_json(text, f"conversations[{index + 1}] is a call in")
            calls = [_normalize_call(call) for call in (calls if isinstance(calls, list) else [calls])]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append(message(role, text))
    return messages


def read_history(row: Row) -> Messages:
    """What was said before: `system`, and `history` as pairs of a question and its answer."""
    messages = []
    if row.get("system"):
        if not isinstance(row["system"], str):
            raise Unreadable("field 'system' is not text")
        messages.append(message("system", row["system"]))
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise Unreadable("field 'history' is not a list of pairs")
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(s, str) and s.strip() for s in pair)):
            raise Unreadable(f"history[{index + 1}] is not a pair of a question and its answer")
        messages += [message("user", pair[0]), message("assistant", pair[1])]
    return messages


def read_transcript(row: Row, key: str) -> Messages:
    """A text "\\n\\nHuman: ... \\n\\nAssistant: ..." as messages."""
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise Unreadable(f"field '{key}' is missing or empty")
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise Unreadable(f"field '{key}' is not a Human/Assistant transcript")
    turns = [message(TRANSCRIPT_ROLES[who], words.strip()) for who, words in zip(parts[1::2], parts[2::2], strict=True)]
    if turns[-1]["role"] != "assistant":
        raise Unreadable(f"field '{key}' does not end with an Assistant turn")
    if any(first["role"] == second["role"] for first, second in zip(turns, turns[1:], strict=False)):
        raise Unreadable(f"field '{key}' has two turns of the same speaker in a row")
    return turns


def split_pair(chosen: Messages, rejected: Messages) -> Row:
    """Two dialogues that differ in their last turn, as prompt, chosen and rejected."""
    if not chosen or not rejected:
        raise Unreadable("one of the two dialogues is empty")
    if chosen[:-1] != rejected[:-1]:
        raise Unreadable("the prompts of 'chosen' and 'rejected' differ")
    if len(chosen) < 2:
        raise Unreadable("the two dialogues share no prompt")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def split_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A dialogue as its last answer and the prompt before it. Raises Unreadable."""
    messages = row.get("messages")
    if messages is None or "completion" in row:
        return row
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise Unreadable("field 'messages' does not end with an answer of the assistant")
    rest = {key: value for key, value in row.items() if key != "messages"}
    return {**rest, "prompt": messages[:-1], "completion": [last]}
