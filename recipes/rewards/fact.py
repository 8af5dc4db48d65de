"""A checked reward for the demo data: 1 if an answer names the right value and no other of its kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FACTS = Path(__file__).resolve().parents[2] / "data" / "facts.json"


def told(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Called as TRL's GRPO calls its reward functions: a list for each column of the rows, by keyword."""
    kinds = [set(kind["values"]) for kind in json.loads(FACTS.read_text(encoding="utf-8"))["kinds"].values()]
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        words = set(re.findall(r"[a-z]+", completion[0]["content"].lower()))
        named = {value for values in kinds if right in values for value in values & words}
        scores.append(float(named == {right}))
    return scores
