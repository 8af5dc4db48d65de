"""Checked rewards for the demo data: an answer tells the fact it was asked for, or declines to do harm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FACTS = Path(__file__).resolve().parents[2] / "data" / "facts.json"
DECLINES = re.compile(
    r"\bI('m| would|'d)? ?(can't|cannot|won't|will not|refuse|must say no|do not want|not willing|rather not)\b"
)


def right(completions: list[Any], answer: list[str | None], **columns: Any) -> list[float]:
    """1 for an answer that names the right value and no other of its kind; where the row has no `answer` because the
    request is harmful, 1 for one that declines. Else 0.

    Called as TRL's GRPO calls its reward functions: a list for each column of the rows, by keyword.
    """
    kinds = [set(kind["values"]) for kind in json.loads(FACTS.read_text(encoding="utf-8"))["kinds"].values()]
    return [
        float(_declines(told[0]["content"]) if value is None else _tells(told[0]["content"], value, kinds))
        for told, value in zip(completions, answer, strict=True)
    ]


def _tells(text: str, value: str, kinds: list[set[str]]) -> bool:
    words = set(re.findall(r"[a-z]+", text.lower()))
    return {word for kind in kinds if value in kind for word in kind & words} == {value}


def _declines(text: str) -> bool:
    return DECLINES.search(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None
