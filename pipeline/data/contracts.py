"""The row shapes that stages take, in TRL's vocabulary, and what makes a row unfit.

A check returns the reason a row is refused, in words that say what to change, or None. Columns beyond the shape are
carried along untouched (an id, a guideline, a reference answer) and never trained on. A stage that needs another shape
defines its Contract in its own file, out of the checks here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
RowKind = Literal["text", "demonstration", "preference", "rated", "prompt", "question"]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Contract:
    """What the rows of one kind must look like.

    name: TRL's name of the shape.  kind: what the readers of data/formats.py make of other formats.  example: shown in
    error messages.  check: row -> reason it is refused, or None.
    """

    name: str
    kind: RowKind
    example: str
    check: Callable[[Row], str | None]
    columns: str = ""
    """What its rows have as columns of a table."""

    def expected(self, path: str) -> str:
        """What its rows look like, in the words of the file they come from."""
        if self.columns and {".csv", ".tsv", ".parquet"} & {*Path(path).suffixes}:
            return f"Expected the columns {self.columns} (docs/data.md, Formats)"
        return f"Expected rows like {self.example}"


def check_text(row: Row, key: str) -> str | None:
    if key not in row:
        return f"has no field '{key}'"
    value = row[key]
    if not isinstance(value, str):
        return f"field '{key}' is {_kind(value)}, expected text"
    if not value.strip():
        return f"field '{key}' is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"field '{key}' holds half of a surrogate pair, which is not a character"
    return None


def check_messages(row: Row, key: str, last: str | None = None) -> str | None:
    """Messages with known roles and text; `last` is the role the list must end on."""
    if key not in row:
        return f"has no field '{key}'"
    messages = row[key]
    if not isinstance(messages, list):
        return f"field '{key}' is {_kind(messages)}, expected a list of messages"
    if not messages:
        return f"field '{key}' is empty"
    for index, message in enumerate(messages):
        place = f"{key}[{index + 1}]"
        if not isinstance(message, dict):
            return f"{place} is {_kind(message)}, expected {{'role', 'content'}}"
        if message.get("role") not in ROLES:
            return f"{place}.role is {message.get('role')!r}, expected one of {', '.join(ROLES)}"
        if message["role"] == "assistant" and message.get("tool_calls") and not message.get("content"):
            continue
        reason = check_text(message, "content")
        if reason:
            return f"{place} {reason}"
    reason = _check_calls(messages, key)
    if reason is None and last and messages[-1]["role"] != last:
        return f"field '{key}' ends with the role '{messages[-1]['role']}', expected '{last}'"
    return reason


def _check_calls(messages: list[dict[str, Any]], key: str) -> str | None:
    """Results of tools come after a call, and after a call comes its result, unless the dialogue ends on it."""
    called = False
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if index == 0 or (not called and messages[index - 1]["role"] != "tool"):
                return f"{key}[{index + 1}] is a tool's result, but no tool was called before it"
        elif called:
            return f"{key}[{index}] calls a tool, but {key}[{index + 1}] is not its result"
        called = bool(message.get("tool_calls"))
    return None


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def check_demonstration(row: Row) -> str | None:
    if "messages" in row:
        reason = check_messages(row, "messages", last="assistant")
        if reason is None and not any(message["role"] == "user" for message in row["messages"]):
            return "field 'messages' has no user message"
        if reason is None and row["messages"][0]["role"] == "assistant":
            return "field 'messages' begins with the role 'assistant', expected 'system' or 'user'"
        return reason
    if "prompt" not in row and "completion" not in row:
        return "has neither 'messages' nor 'prompt' and 'completion'"
    return check_prompt(row) or check_reply(row, "completion")


def check_prompt(row: Row) -> str | None:
    if isinstance(row.get("prompt"), list):
        reason = check_messages(row, "prompt")
        if reason is None and row["prompt"][-1]["role"] == "assistant":
            return "field 'prompt' ends with the role 'assistant', expected 'user'"
        return reason
    if {"data", "annotations"} <= row.keys() or {"fields", "responses"} <= row.keys():
        return "is of Label Studio or Argilla: make votes of the file with `onebase votes FILE labels`, and read those"
    return check_text(row, "prompt")


def check_reply(row: Row, key: str) -> str | None:
    """An answer to `prompt`: messages where the prompt is messages, text where it is text."""
    conversational = isinstance(row["prompt"], list)
    if key in row and isinstance(row[key], str if conversational else list):
        return (
            f"field '{key}' is {_kind(row[key])}, but 'prompt' is {_kind(row['prompt'])}: both must be text, or both "
            "lists of messages"
        )
    if not conversational:
        return check_text(row, key)
    reason = check_messages(row, key, last="assistant")
    if reason is None and row[key][0]["role"] != "assistant":
        return f"field '{key}' begins with the role '{row[key][0]['role']}', expected 'assistant'"
    return reason


def check_preference(row: Row) -> str | None:
    if "prompt" not in row and isinstance(row.get("chosen"), list):
        return (
            "has no field 'prompt' (give the shared start of both answers as 'prompt', and only the answers as "
            "'chosen' and 'rejected')"
        )
    reason = check_prompt(row) or check_reply(row, "chosen") or check_reply(row, "rejected")
    if reason is None and row["chosen"] == row["rejected"]:
        return "fields 'chosen' and 'rejected' are equal, so the pair teaches nothing"
    return reason


def check_rated(row: Row) -> str | None:
    reason = check_prompt(row) or check_reply(row, "completion")
    if reason is None and "label" not in row:
        return "has no field 'label': true is thumbs up, false is thumbs down"
    if reason is None and not isinstance(row["label"], bool):
        return f"field 'label' is {_kind(row['label'])}, expected true or false"
    return reason


def check_question(row: Row) -> str | None:
    reason = check_prompt(row) or check_text(row, "label" if is_labelled(row) else "answer")
    if reason is None and "choices" in row:
        if not isinstance(row["choices"], list) or not all(isinstance(choice, str) for choice in row["choices"]):
            return "field 'choices' is not a list of texts"
        if row["answer"] not in row["choices"]:
            return "field 'answer' is not among 'choices'"
    return reason


def is_labelled(row: Row) -> bool:
    """Whether it is a row of a classification: its label, one of those in the file, is the answer."""
    return "label" in row and "answer" not in row


LANGUAGE_MODELING = Contract(
    "language modeling", "text", '{"text": "..."}', lambda row: check_text(row, "text"), "text"
)
DEMONSTRATION = Contract(
    "prompt-completion or messages",
    "demonstration",
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    check_demonstration,
    "prompt, completion (or question, answer; or instruction, output)",
)
PREFERENCE = Contract(
    "preference",
    "preference",
    '{"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}], '
    '"rejected": [{"role": "assistant", "content": "..."}]}',
    check_preference,
    "prompt, chosen, rejected",
)
PROMPT_ONLY = Contract(
    "prompt-only", "prompt", '{"prompt": [{"role": "user", "content": "..."}]}', check_prompt, "prompt"
)
RATED = Contract(
    "unpaired preference",
    "rated",
    '{"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", "content": "..."}], '
    '"label": true}',
    check_rated,
    "prompt, completion, label",
)
QUESTION = Contract(
    "question with its answer",
    "question",
    '{"prompt": [{"role": "user", "content": "..."}], "answer": "..."}',
    check_question,
    "question, answer (or prompt, answer)",
)
