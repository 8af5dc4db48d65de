"""Rows as people have them, turned into TRL's shapes (contracts.py).

A reader takes a row as it stands in the file and gives the rows a stage eats, or raises Unreadable with the reason.
What a row of the file is worth depends on the stage: ranked replies are several comparisons for a reward model and
one demonstration for SFT, so a reader is told the shape that is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, Literal

from pipeline.data.contracts import Row
from pipeline.data.dialogues import (
    Unreadable,
    common_start,
    history,
    message,
    messages_of,
    sharegpt_messages,
    transcript,
)
from pipeline.data.trees import oasst

Format = Literal[
    "auto", "trl", "openai", "alpaca", "dolly", "sharegpt", "hh", "kto", "oasst", "messages_pair", "qa", "lines"
]
Wanted = Literal["text", "demonstration", "preference", "prompt", "question"]
Reader = Callable[[Row, Wanted], Iterator[Row]]


def layout(row: Row) -> Format | None:
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


def read(row: Row, form: Format, wanted: Wanted) -> Iterator[Row]:
    """The rows a stage eats out of one row of a file. Raises Unreadable."""
    named = layout(row) if form in ("auto", "lines") else form
    if named is None:
        # Left as it is: the contract says which of its own fields is missing.
        yield row
        return
    if named == "kto" and wanted in ("text", "question"):
        raise Unreadable("is one answer with a label (KTO), which this stage has no use for")
    made = False
    try:
        for shaped in READERS[named](row, wanted):
            made = True
            yield shaped
    except KeyError as error:
        raise Unreadable(f"has no field {error}, which format '{named}' needs") from error
    except (TypeError, AttributeError) as error:
        raise Unreadable(f"is not in the format '{named}': {error}") from error
    if not made:
        raise Unreadable(f"holds nothing this stage can use (read as format '{named}')")


def _trl(row: Row, wanted: Wanted) -> Iterator[Row]:
    """TRL's own shapes, with the content of messages as text and tools as a list."""
    if isinstance(row.get("prompt"), str) and _listed(row, "chosen") and _listed(row, "rejected"):
        # Whole dialogues beside the prompt's text, as in UltraFeedback: the dialogues say it better.
        yield from _hh({key: value for key, value in row.items() if key not in ("prompt", "messages")}, wanted)
        return
    ranked = row.get("replies")
    if isinstance(ranked, list) and "prompt" in row:
        rest = {key: value for key, value in row.items() if key != "replies"}
        prompt = messages_of(row, "prompt") if isinstance(row["prompt"], list) else row["prompt"]
        yield from _ranked({**rest, "prompt": prompt}, ranked, wanted, conversational=isinstance(prompt, list))
        return
    tidy = {key: messages_of(row, key) for key in ("prompt", "completion", "chosen", "rejected") if _listed(row, key)}
    shaped = _with_tools({**row, **tidy})
    if wanted == "prompt" and "prompt" not in shaped and "messages" in shaped:
        yield from _asked(shaped)
    elif wanted == "demonstration" and "completion" not in shaped and "chosen" in shaped and "prompt" in shaped:
        yield {**shaped, "completion": shaped["chosen"]}
    else:
        yield shaped


def _openai(row: Row, wanted: Wanted) -> Iterator[Row]:
    shaped = _with_tools({**row, "messages": messages_of(row, "messages")})
    if wanted == "prompt":
        yield from _asked(shaped)
    else:
        yield shaped


def _kto(row: Row, wanted: Wanted) -> Iterator[Row]:
    if not label(row) and wanted == "demonstration":
        raise Unreadable("is labelled as an undesirable answer, which is no demonstration")
    rest = {key: value for key, value in row.items() if key not in ("label", "kto_tag")}
    yield from READERS[layout(rest) or "trl"](rest, wanted)


def label(row: Row) -> bool:
    """A KTO row's label: true for a desirable answer. Raises Unreadable."""
    value = row.get("label", row.get("kto_tag"))
    if not isinstance(value, bool):
        raise Unreadable(f"field 'label' is {value!r:.40}, expected true or false")
    return value


def labelled(row: Row) -> Row:
    """A KTO row as prompt and completion, its label left out. Raises Unreadable."""
    rest = {key: value for key, value in row.items() if key not in ("label", "kto_tag")}
    shaped = next(read(rest, "auto", "demonstration"))
    messages = shaped.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or len(messages) < 2 or not isinstance(messages[-1], dict):
            raise Unreadable("field 'messages' does not end on an answer of the assistant")
        rest = {key: value for key, value in shaped.items() if key != "messages"}
        shaped = {**rest, "prompt": messages[:-1], "completion": messages[-1:]}
    if "prompt" not in shaped or "completion" not in shaped:
        raise Unreadable("has neither 'messages' nor 'prompt' and 'completion'")
    return shaped


def _alpaca(row: Row, wanted: Wanted) -> Iterator[Row]:
    """instruction / input / output with system and history; a list as output is ranked replies, best first; instances
    (self-instruct) are several pairs of input and output; chosen / rejected compare two answers."""
    if isinstance(row.get("instances"), list):
        rest = {key: value for key, value in row.items() if key != "instances"}
        for instance in row["instances"]:
            if not isinstance(instance, dict):
                raise Unreadable("field 'instances' holds something that is no object")
            yield from _alpaca({**rest, **instance}, wanted)
        return
    asked = _field(row, "instruction")
    if row.get("input"):
        asked += "\n\n" + _field(row, "input")
    yield from _answered(row, asked, "output", wanted)


def _dolly(row: Row, wanted: Wanted) -> Iterator[Row]:
    """instruction / context / response, as in databricks-dolly-15k."""
    asked = _field(row, "instruction")
    if row.get("context"):
        asked = _field(row, "context") + "\n\n" + asked
    yield from _answered(row, asked, "response", wanted)


def _qa(row: Row, wanted: Wanted) -> Iterator[Row]:
    """question / answer, or question / context / answers as in SQuAD (the first of several answers)."""
    asked = _field(row, "question")
    if row.get("context"):
        asked = _field(row, "context") + "\n\n" + asked
    answers: Any = row.get("answer", row.get("answers"))
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list):
        if not answers:
            raise Unreadable("field 'answers' is empty")
        answers = answers[0]
    if wanted == "question":
        yield {**row, "prompt": [message("user", asked)], "answer": answers}
    else:
        yield from _answered({**row, "answer": answers}, asked, "answer", wanted)


def _sharegpt(row: Row, wanted: Wanted) -> Iterator[Row]:
    """conversations of from / value, with chosen / rejected as the next turn where answers are compared."""
    messages = sharegpt_messages(row)
    rest = {key: row[key] for key in row.keys() - {"conversations", "conversation", "system"}}
    if "chosen" in row or "rejected" in row:
        pair = {key: [_reply(row, key)] for key in ("chosen", "rejected")}
        yield from _compared(_with_tools({**rest, "prompt": messages, **pair}), wanted)
        return
    shaped = _with_tools({**rest, "messages": messages})
    if wanted == "prompt":
        yield from _asked(shaped)
    else:
        yield shaped


def _hh(row: Row, wanted: Wanted) -> Iterator[Row]:
    """chosen / rejected as whole dialogues: transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." as in hh-rlhf,
    or messages (TRL's preference shape with the prompt inside). The prompt is what both share up to the last turn."""
    if isinstance(row["chosen"], list):
        chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    else:
        chosen, rejected = transcript(row, "chosen"), transcript(row, "rejected")
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    yield from _compared(_with_tools({**rest, **common_start(chosen, rejected)}), wanted)


def _messages_pair(row: Row, wanted: Wanted) -> Iterator[Row]:
    rest = {key: value for key, value in row.items() if key not in ("chosen_messages", "rejected_messages")}
    pair = common_start(messages_of(row, "chosen_messages"), messages_of(row, "rejected_messages"))
    yield from _compared(_with_tools({**rest, **pair}), wanted)


READERS: dict[Format, Reader] = {
    "trl": _trl,
    "openai": _openai,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "sharegpt": _sharegpt,
    "hh": _hh,
    "kto": _kto,
    "oasst": oasst,
    "messages_pair": _messages_pair,
    "qa": _qa,
}


READ = frozenset(
    ["instruction", "input", "output", "response", "context", "question", "answers", "history", "system", "instances"]
    + ["chosen", "rejected", "prompt", "completion", "messages", "text", "label"]
)
"""Columns that make up the shape; the others are carried along."""


def _answered(row: Row, asked: str, answer: str, wanted: Wanted) -> Iterator[Row]:
    prompt = history(row) + [message("user", asked)]
    rest = {key: value for key, value in row.items() if key not in READ and key != answer}
    shaped: Row = _with_tools({**rest, "prompt": prompt})
    if wanted == "prompt":
        yield {**shaped, **({"answer": row[answer]} if answer in row else {})}
    elif isinstance(row.get(answer), list):
        yield from _ranked(shaped, row[answer], wanted, conversational=True)
    elif wanted == "question":
        yield {**shaped, "answer": row.get(answer)}
    elif wanted == "preference" or (answer not in row and "chosen" in row):
        pair = {key: [message("assistant", _field(row, key))] for key in ("chosen", "rejected")}
        yield from _compared({**shaped, **pair}, wanted)
    else:
        yield {**shaped, "completion": [message("assistant", _field(row, answer))]}


def _compared(shaped: Row, wanted: Wanted) -> Iterator[Row]:
    """A comparison as it is, or of what use it is where none is wanted: the better answer is a demonstration."""
    if wanted == "demonstration":
        yield {**{key: shaped[key] for key in shaped.keys() - {"chosen", "rejected"}}, "completion": shaped["chosen"]}
    elif wanted == "prompt":
        yield {key: shaped[key] for key in shaped.keys() - {"chosen", "rejected"}}
    else:
        yield shaped


def _ranked(shaped: Row, replies: list[Any], wanted: Wanted, conversational: bool) -> Iterator[Row]:
    """Replies to one prompt, best first: every two of them are a comparison (InstructGPT, arXiv 2203.02155, 3.5)."""
    if not all(isinstance(reply, str) and reply.strip() for reply in replies):
        raise Unreadable("one of the ranked replies is empty or no text")
    said: list[Any] = [[message("assistant", reply)] if conversational else reply for reply in replies]
    if wanted == "prompt":
        yield shaped
    elif wanted == "demonstration" and said:
        yield {**shaped, "completion": said[0]}
    elif wanted == "preference":
        if len(said) < 2:
            raise Unreadable(f"has {len(said)} ranked reply, a comparison takes two")
        for better, worse in combinations(said, 2):
            yield {**shaped, "chosen": better, "rejected": worse}


def _asked(shaped: Row) -> Iterator[Row]:
    """A dialogue as a prompt: all before the assistant's last turn."""
    messages = shaped["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Unreadable("field 'messages' is no list of messages")
    if messages and messages[-1].get("role") != "assistant":
        last = len(messages)  # it ends on the question
    else:
        last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=len(messages))
    if not messages[:last]:
        raise Unreadable("field 'messages' asks nothing before the assistant speaks")
    yield {**{key: value for key, value in shaped.items() if key != "messages"}, "prompt": messages[:last]}


def _reply(row: Row, key: str) -> dict[str, Any]:
    said = row.get(key)
    if isinstance(said, dict):
        said = said.get("value", said.get("content"))
    if not isinstance(said, str):
        raise Unreadable(f"field '{key}' is no text")
    return message("assistant", said)


def _with_tools(row: Row) -> Row:
    """Tools as a list of descriptions; some files keep them as JSON in a text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"field 'tools' is broken JSON: {error}") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unreadable("field 'tools' is not a list of descriptions")
    rest = {key: value for key, value in row.items() if key != "tools"}
    return {**rest, "tools": tools} if tools else rest


def _field(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        kind = "missing" if key not in row else f"{value!r:.40}, expected text"
        raise Unreadable(f"field '{key}' is {kind}")
    if not value.strip():
        raise Unreadable(f"field '{key}' is empty")
    return value


def _listed(row: Row, key: str) -> bool:
    return isinstance(row.get(key), list)
