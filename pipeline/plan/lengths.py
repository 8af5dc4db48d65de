"""The tokens of a stage's rows, estimated from their bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.load import read_split
from pipeline.models.environments import with_tools
from pipeline.plan.memory import ANSWER_ROW
from pipeline.plan.sizes import ANSWER_TOKENS

if TYPE_CHECKING:
    from pipeline.data.contracts import Contract, Row
    from pipeline.stages.stage import Stage, StageSpec

READ_AT_MOST = 50 << 20
"""Bytes of a data file that is read to estimate the lengths of its rows."""
TOKEN_BYTES = 4.0
"""Of UTF-8 in a token, on average over English text and, at three bytes a character, over Chinese; the longest row is
taken to have only LONGEST_TOKEN_BYTES in each."""
LONGEST_TOKEN_BYTES = 3.0
TEMPLATE = 32
"""Tokens that a chat template adds to a row."""
TOOLS_BYTES = 400
"""Of what a template says of tools besides their descriptions: how to call them."""
ENDED = 0.4
"""Of the longest answer that is allowed, what an answer takes on average, as it ends by itself."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a stage's rows, estimated from their bytes."""

    rows: list[int]
    again: list[list[int]] = field(default_factory=list)
    """Of each earlier stage whose rows it learns again, as that stage cut them."""

    @property
    def longest(self) -> int:
        return round(max(self.rows) * TOKEN_BYTES / LONGEST_TOKEN_BYTES) + TEMPLATE


def lengths_of(
    section: StageSpec, contract: Contract, seed: int, again: Iterable[tuple[Stage, StageSpec]] = ()
) -> Lengths | None:
    """None where the rows are not on this disk, or are too many to be read for an estimate. `again`: the earlier stages
    whose rows are learnt again."""
    own, earlier = _read_lengths(section, contract, seed), list[list[int]]()
    for kind, of in again:
        if (tokens := _read_lengths(of, kind.contract, seed)) is None:
            return None
        earlier.append(cut_again(kind, of, tokens))
    return None if own is None else Lengths(mixed(section, own, earlier), earlier)


def mixed(section: StageSpec, own: list[int], earlier: list[list[int]]) -> list[int]:
    """Tokens of a stage's rows, with those of earlier stages that it mixes in: the first ones, for want of the draw."""
    shares, found = section.mixed_in().values(), list(own)
    for share, tokens in zip(shares, earlier, strict=False):
        count = max(1, round(len(own) * share / (1 - sum(shares))))
        found += (tokens * (count // len(tokens) + 1))[:count]
    return found


def cut_again(kind: Stage, section: StageSpec, tokens: list[int]) -> list[int]:
    """Tokens of rows that an earlier stage was trained on, no longer than it takes them."""
    limit = kind.arguments(section).get("max_length")
    return [min(length, limit) if isinstance(limit, int) else length for length in tokens]


def _read_lengths(section: StageSpec, contract: Contract, seed: int) -> list[int] | None:
    paths = [Path(part.path) for part in section.data.parts()]
    if not all(os.path.isfile(path) and path.stat().st_size <= READ_AT_MOST for path in paths):
        return None
    rows = read_split(section.data, contract, seed).train
    if environment := section.asked_with():
        rows = with_tools(rows, environment)
    return tokens_of(rows)


def tokens_of(rows: Iterable[Row]) -> list[int]:
    """Of each row, estimated."""
    return [max(1, round(_text_bytes(row) / TOKEN_BYTES)) for row in rows]


def question_tokens(section: StageSpec, longest: int) -> int:
    """Tokens of the questions that a stage answers at once; without a file of them, of three held-out prompts."""
    file = section.question_file()
    if file is None:
        return min(ANSWER_TOKENS, 3 * (longest + ANSWER_ROW))
    if not os.path.isfile(file):
        return ANSWER_TOKENS
    text = Path(file).read_bytes()
    return min(ANSWER_TOKENS, round(len(text) / TOKEN_BYTES) + ANSWER_ROW * text.count(b"\n"))


def learnt_lengths(section: StageSpec, lengths: Lengths | None) -> Lengths | None:
    """Of the rows that it trains on: of prompts whose answers are sampled first, with as many answers as may be kept,
    each as long as answers are on average."""
    first = section.samples_first()
    if lengths is None or first is None:
        return lengths
    answer, kept = round(ENDED * first.response_length), 1 if first.keep == "best" else first.num_generations
    return Lengths([tokens + answer for tokens in lengths.rows for _ in range(kept)])


def _text_bytes(value: Any) -> int:
    """Of a row's longest reading: prompt and answer, or of two answers the longer."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list):
        return sum(_text_bytes(item) for item in value)
    if not isinstance(value, dict):
        return 0
    if "content" in value:
        calls = json.dumps(value["tool_calls"]) if value.get("tool_calls") else ""
        return _text_bytes(value["content"]) + len(str(value.get("role", ""))) + len(calls)
    either = max(_text_bytes(value.get("chosen")), _text_bytes(value.get("rejected")))
    tools = TOOLS_BYTES + len(json.dumps(value["tools"])) if value.get("tools") else 0
    return tools + either + sum(_text_bytes(value.get(key)) for key in ("prompt", "completion", "messages", "text"))
