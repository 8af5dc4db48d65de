"""Rows as people have them, turned into TRL's shapes (contracts.py).

A reader takes a row as it stands in the file and gives it in TRL's words, or raises Unreadable with the reason. What a
stage can use of that depends on the stage: ranked replies are several comparisons for a reward model and one
demonstration for SFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, Literal

from pipeline.data.contracts import Row, RowKind
from pipeline.data.dialogues import (
    Unreadable,
    message,
    parse_json,
    read_history,
    read_messages,
    read_sharegpt,
    read_transcript,
    split_answer,
    split_pair,
)
from pipeline.data.trees import read_tree

Format = Literal[
    "auto", "trl", "openai", "alpaca", "dolly", "sharegpt", "hh", "kto", "oasst", "messages_pair", "qa", "lines"
]
OUR_COLUMNS = (
    "instruction", "input", "output", "response", "context", "question", "answers", "history", "system", "instances",
    "chosen", "rejected", "prompt", "completion", "messages", "text", "label",
)  # fmt: skip
"""Columns that make up the shape of instructions and questions; the others are carried along."""


def find_format(row: Row) -> Format | None:
    """Which format a row is in, told by its keys alone; None if it is none of them."""
    keys = row.keys()
    if "message_tree_id" in keys and isinstance(row.get("prompt"), dict):
        return "oasst"
    if "conversations" in keys or "conversation" in keys:
        return "sharegpt"
    if "chosen_messages" in keys:
        return "messages_pair"
    if "kto_tag" in keys or ("label" in keys and ("messages" in keys or "completion" in keys)):
        return "kto"
    if "messages" in keys:
        return "openai"
    if "question" in keys and "chosen" in keys and "prompt" not in keys:
        return "qa"
    if "instruction" in keys:
        return "dolly" if "response" in keys else "alpaca"
    if "chosen" in keys and "rejected" in keys and "prompt" not in keys:
        return "hh"
    if "question" in keys and ("answer" in keys or "answers" in keys) and "prompt" not in keys:
        return "qa"
    return "trl" if keys & {"text", "prompt", "completion", "chosen"} else None


def read_rows(row: Row, form: Format, kind: RowKind) -> Iterator[Row]:
    """The rows of a kind that one row of a file gives. Raises Unreadable."""
    named = find_format(row) if form in ("auto", "lines") else form
    if kind == "rated" and row.keys() & {"label", "kto_tag"} and "chosen" not in row:
        named = "kto"
    if named is None:
        # Left as it is: the contract says which of its own fields is missing.
        yield row
        return
    if named == "kto" and kind in ("text", "question"):
        raise Unreadable("is one answer with a label (KTO), which this stage cannot use")
    empty = True
    try:
        for given in READERS[named](row, kind):
            for shaped in _select(_parse_tools(given), kind):
                empty = False
                yield shaped
    except KeyError as error:
        raise Unreadable(f"has no field {error}, which format '{named}' needs") from error
    except (TypeError, AttributeError) as error:
        raise Unreadable(f"is not in the format '{named}': {error}") from error
    if empty:
        raise Unreadable(f"holds nothing this stage can use (read as format '{named}')")


def _select(row: Row, kind: RowKind) -> Iterator[Row]:
    """What a stage can use of a row in TRL's words. Of a comparison the better answer is a demonstration, and its
    prompt a prompt; so is a dialogue up to the assistant's last turn."""
    if kind == "rated":
        yield from _select_rated(row)
    elif isinstance(row.get("replies"), list) and "prompt" in row:
        yield from _select_ranked(_without(row, "replies"), row["replies"], kind)
    elif kind == "prompt" and "prompt" not in row and "messages" in row:
        yield {**_without(row, "messages"), "prompt": _cut_last_answer(row["messages"])}
    elif kind == "prompt":
        yield _without(row, "chosen", "rejected")
    elif kind == "demonstration" and not row.keys() & {"completion", "messages"} and {"chosen", "prompt"} <= row.keys():
        yield {**_without(row, "chosen", "rejected"), "completion": row["chosen"]}
    else:
        yield row


def _select_ranked(row: Row, replies: list[Any], kind: RowKind) -> Iterator[Row]:
    """Replies to one prompt, best first: every two of them are a comparison (InstructGPT, arXiv 2203.02155, 3.5)."""
    if not all(isinstance(reply, str) and reply.strip() for reply in replies):
        raise Unreadable("one of the ranked replies is empty or not text")
    if isinstance(row["prompt"], list):
        replies = [[message("assistant", reply)] for reply in replies]
    if kind == "prompt":
        yield row
    elif kind == "demonstration" and replies:
        yield {**row, "completion": replies[0]}
    elif kind == "preference":
        if len(replies) < 2:
            raise Unreadable(f"has {len(replies)} ranked reply, and a comparison needs two")
        for better, worse in combinations(replies, 2):
            yield {**row, "chosen": better, "rejected": worse}


def _select_rated(row: Row) -> Iterator[Row]:
    """An answer with its label; of a comparison the better answer with thumbs up and the other one with thumbs down."""
    if not {"chosen", "rejected"} <= row.keys():
        yield split_answer(row)
        return
    if row["chosen"] == row["rejected"]:
        raise Unreadable("fields 'chosen' and 'rejected' are equal, so the pair teaches nothing")
    rest = _without(row, "chosen", "rejected", "messages")
    yield {**rest, "completion": row["chosen"], "label": True}
    yield {**rest, "completion": row["rejected"], "label": False}


def _cut_last_answer(messages: Any) -> list[Any]:
    """A dialogue as a prompt: all before the assistant's last turn, or all of it where it ends on the question."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise Unreadable("field 'messages' is not a list of messages")
    answers = [index for index, each in enumerate(messages) if each.get("role") == "assistant"]
    ends_on_answer = bool(messages) and messages[-1].get("role") == "assistant"
    prompt = messages[: answers[-1]] if ends_on_answer else messages
    if not prompt:
        raise Unreadable("field 'messages' has no question before the first answer of the assistant")
    return prompt


def _trl(row: Row, kind: RowKind) -> Iterator[Row]:
    """TRL's own shapes, with the content of messages as text."""
    listed = [key for key in ("prompt", "completion", "chosen", "rejected") if isinstance(row.get(key), list)]
    if isinstance(row.get("prompt"), str) and "chosen" in listed and "rejected" in listed:
        # Whole dialogues beside the prompt's text, as in UltraFeedback: the dialogues say it better.
        yield from _hh(_without(row, "prompt", "messages"), kind)
    else:
        yield {**row, **{key: read_messages(row, key) for key in listed}}


def _openai(row: Row, kind: RowKind) -> Iterator[Row]:
    # Of a prompt beside the dialogue the dialogue says more.
    rest = _without(row, "prompt") if kind == "prompt" else row
    yield {**rest, "messages": read_messages(row, "messages")}


def _kto(row: Row, kind: RowKind) -> Iterator[Row]:
    label, rest = read_label(row), drop_label(row)
    if not label and kind == "demonstration":
        raise Unreadable("is labelled as an undesirable answer, so it is not an example to learn from")
    reader = READERS[find_format(rest) or "trl"]
    if kind == "rated":
        yield from ({**shaped, "label": label} for shaped in reader(rest, "demonstration"))
    else:
        yield from reader(rest, kind)


def read_label(row: Row) -> bool:
    """A KTO row's label: true (or 1) for a desirable answer, false (or 0) for one that is not. Raises Unreadable."""
    label = row.get("label", row.get("kto_tag"))
    label = {"0": 0, "1": 1}.get(label, label) if isinstance(label, str) else label  # a table holds text
    if not isinstance(label, int) or label not in (0, 1):
        raise Unreadable(f"field 'label' is {label!r:.40}, expected true or false")
    return bool(label)


def drop_label(row: Row) -> Row:
    return _without(row, "label", "kto_tag")


def _alpaca(row: Row, kind: RowKind) -> Iterator[Row]:
    """instruction / input / output with system and history; a list as output is ranked replies, best first; instances
    (self-instruct) are several pairs of input and output; chosen / rejected compare two answers."""
    if not isinstance(row.get("instances"), list):
        yield _answer(row, _join(row, "instruction", "input"), "output", kind)
        return
    for instance in row["instances"]:
        if not isinstance(instance, dict):
            raise Unreadable("field 'instances' holds something that is not an object")
        yield from _alpaca({**_without(row, "instances"), **instance}, kind)


def _dolly(row: Row, kind: RowKind) -> Iterator[Row]:
    """instruction / context / response, as in databricks-dolly-15k."""
    yield _answer(row, _join(row, "context", "instruction"), "response", kind)


def _qa(row: Row, kind: RowKind) -> Iterator[Row]:
    """question / answer, or question / context / answers as in SQuAD (the first of several answers)."""
    question = _join(row, "context", "question")
    answer: Any = row.get("answer", row.get("answers"))
    if isinstance(answer, dict):
        answer = answer.get("text")
    if isinstance(answer, list):
        if not answer:
            raise Unreadable("field 'answers' is empty")
        answer = answer[0]
    if kind == "question":
        yield {**row, "prompt": [message("user", question)], "answer": answer}
    else:
        yield _answer({**row, "answer": answer}, question, "answer", kind)


def _answer(row: Row, question: str, key: str, kind: RowKind) -> Row:
    """A question as a prompt, with the answer under `key`, ranked replies, or two answers compared."""
    shaped = _without(row, *OUR_COLUMNS, key) | {"prompt": [*read_history(row), message("user", question)]}
    if kind == "prompt":
        return {**shaped, "answer": row[key]} if key in row else shaped
    if isinstance(row.get(key), list):
        return {**shaped, "replies": row[key]}
    if kind == "question":
        return {**shaped, "answer": row.get(key)}
    if kind == "preference" or ("chosen" in row and (key not in row or kind == "rated")):
        return shaped | {name: [message("assistant", _field(row, name))] for name in ("chosen", "rejected")}
    return {**shaped, "completion": [message("assistant", _field(row, key))]}


def _sharegpt(row: Row, kind: RowKind) -> Iterator[Row]:
    """conversations of from / value, with chosen / rejected as the next turn where answers are compared."""
    messages, rest = read_sharegpt(row), _without(row, "conversations", "conversation", "system")
    if "chosen" not in row and "rejected" not in row:
        yield {**rest, "messages": messages}
        return
    pair = {}
    for key in ("chosen", "rejected"):
        reply = row.get(key)
        text = reply.get("value", reply.get("content")) if isinstance(reply, dict) else reply
        if not isinstance(text, str):
            raise Unreadable(f"field '{key}' is not text")
        pair[key] = [message("assistant", text)]
    yield {**rest, "prompt": messages, **pair}


def _hh(row: Row, kind: RowKind) -> Iterator[Row]:
    """chosen / rejected as whole dialogues: transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." as in hh-rlhf,
    or messages (TRL's preference shape with the prompt inside). The prompt is what both share up to the last turn."""
    read = read_messages if isinstance(row["chosen"], list) else read_transcript
    yield {**row, **split_pair(read(row, "chosen"), read(row, "rejected"))}


def _messages_pair(row: Row, kind: RowKind) -> Iterator[Row]:
    pair = split_pair(read_messages(row, "chosen_messages"), read_messages(row, "rejected_messages"))
    yield {**_without(row, "chosen_messages", "rejected_messages"), **pair}


READERS: dict[Format, Callable[[Row, RowKind], Iterator[Row]]] = {
    "trl": _trl,
    "openai": _openai,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "sharegpt": _sharegpt,
    "hh": _hh,
    "kto": _kto,
    "oasst": read_tree,
    "messages_pair": _messages_pair,
    "qa": _qa,
}


def _parse_tools(row: Row) -> Row:
    """Tools as a list of descriptions; some files keep them as JSON in a text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, "field 'tools' is") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unreadable("field 'tools' is not a list of descriptions")
    return _without(row, "tools") | ({"tools": tools} if tools else {})


def _join(row: Row, first: str, second: str) -> str:
    """Two fields as one text; `input` and `context` may be missing or empty."""
    return "\n\n".join(_field(row, key) for key in (first, second) if key not in ("input", "context") or row.get(key))


def _field(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        problem = "missing" if key not in row else f"{value!r:.40}, expected text"
        raise Unreadable(f"field '{key}' is {problem}")
    if not value.strip():
        raise Unreadable(f"field '{key}' is empty")
    return value


def _without(row: Row, *columns: str) -> Row:
    return {key: value for key, value in row.items() if key not in columns}
