"""Files people already have, turned row by row into the shapes of contracts.py.

Each reader takes a row as it stands in the file and returns the row as a stage eats it, or raises Unreadable with the
reason. A row that is in TRL's shape already passes through.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from pipeline.data.contracts import Row

Format = Literal["trl", "alpaca", "dolly", "hh"]


class Unreadable(ValueError):
    """A row that is not in the format the recipe names."""


def trl(row: Row) -> Row:
    """TRL's own shapes, as they are."""
    return row


def alpaca(row: Row) -> Row:
    """instruction / input / output, with chosen / rejected where the file compares answers."""
    question = _field(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _field(row, "input")
    return _answered(row, question, "output")


def dolly(row: Row) -> Row:
    """instruction / context / response, as in databricks-dolly-15k."""
    question = _field(row, "instruction")
    if row.get("context"):
        question = _field(row, "context") + "\n\n" + question
    return _answered(row, question, "response")


_TURN = re.compile(r"\n\n(Human|Assistant):")


def hh(row: Row) -> Row:
    """chosen / rejected as whole transcripts "\\n\\nHuman: ... \\n\\nAssistant: ...", as in Anthropic's hh-rlhf.

    The prompt is what the two transcripts share, up to the last assistant turn.
    """
    chosen, rejected = _transcript(row, "chosen"), _transcript(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise Unreadable("the prompts of 'chosen' and 'rejected' differ")
    rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    return {**rest, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


READERS: dict[Format, Callable[[Row], Row]] = {"trl": trl, "alpaca": alpaca, "dolly": dolly, "hh": hh}


def _field(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"field '{key}' is missing or empty")
    return value


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _answered(row: Row, question: str, answer: str) -> Row:
    prompt = [_message("user", question)]
    if "chosen" in row or "rejected" in row:
        pair: dict[str, Any] = {key: [_message("assistant", _field(row, key))] for key in ("chosen", "rejected")}
        return {"prompt": prompt, **pair}
    return {"prompt": prompt, "completion": [_message("assistant", _field(row, answer))]}


def _transcript(row: Row, key: str) -> list[dict[str, str]]:
    parts = _TURN.split(_field(row, key))
    if parts[0].strip() or len(parts) < 3:
        raise Unreadable(f"field '{key}' is not a Human/Assistant transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [_message(roles[who], said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    if turns[-1]["role"] != "assistant":
        raise Unreadable(f"field '{key}' does not end on an Assistant turn")
    if any(first["role"] == second["role"] for first, second in zip(turns, turns[1:], strict=False)):
        raise Unreadable(f"field '{key}' has two turns of one speaker in a row")
    return turns
