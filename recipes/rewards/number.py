"""A checked reward: 1 if the first number an answer names is the right one."""

from __future__ import annotations

import re
from typing import Any


def right(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Called as TRL's GRPO calls its reward functions: a list for each column of the rows, by keyword.

    `completions`: for prompts that are messages, each a list of the messages the policy answered, with tools also what
    they replied; the last one counts. Else texts.
    """
    texts = [told if isinstance(told, str) else told[-1]["content"] for told in completions]
    named = [re.search(r"-?\d+", text) for text in texts]
    return [float(found is not None and found[0] == wanted) for found, wanted in zip(named, answer, strict=True)]
