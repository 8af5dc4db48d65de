"""Which rows are held out: by what they ask, so that no prompt stands on both sides."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

from pipeline.data.contracts import Row
from pipeline.data.prompts import first_question, prompt_key
from pipeline.errors import UserError

Sources = Sequence[Sequence[Row]]


def hold_out(
    sources: Sources, where: str, test: float, group: str | None, seed: int, by_place: bool
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Indices kept of each source, and (source, index) of those held out: of the distinct prompts or groups the share
    `test`, or that many where it is above 1. Raises UserError naming `where` they are if none is kept.

    by_place: a prompt is held out by its own digest, whatever other prompts there are. It is so in every round, and in
    every stage that holds out as much or more; the share is then met on average."""
    keys: list[list[Any]] = _sides(sources, group)
    if by_place:
        keys = [[_place(row, seed) for row in rows] for rows in sources]
    distinct = sorted(set().union(*keys))
    random.Random(seed).shuffle(distinct)
    chosen = set(distinct[: int(test) if test > 1 else max(1, round(len(distinct) * test))])
    if by_place:
        chosen = {place for place in distinct if place < test}
    kept = [[i for i, key in enumerate(of_source) if key not in chosen] for of_source in keys]
    if not any(kept):
        what = f"values of '{group}'" if group else "prompts"
        raise UserError(f"{where}: holding out {test:g} of the {len(distinct)} {what} leaves no row to train on")
    return kept, [(s, i) for s, of_source in enumerate(keys) for i, key in enumerate(of_source) if key in chosen]


def keep_apart(sources: Sources, where: str, kept: list[list[int]], share: float, seed: int) -> list[list[int]]:
    """Those of the rows kept that no stage of the recipe's rounds holds out. Raises UserError if none is left."""
    left = [[i for i in of_source if _place(sources[s][i], seed) >= share] for s, of_source in enumerate(kept)]
    if not any(left):
        raise UserError(f"{where}: holding out {share:g} of the prompts in all rounds leaves no row to train on")
    return left


def _place(row: Row, seed: int) -> float:
    """From 0 to 1, the same for all rows that begin with one question."""
    return int.from_bytes(_digest(f"{seed} {first_question(row)}")) / 2**64


def _sides(sources: Sources, group: str | None) -> list[list[bytes]]:
    """Of each row what decides on which side it is: its group, or the prompt; the least of all prompts that begin with
    one question, so that a dialogue is not on the other side of one that goes on from it."""
    if group is not None:
        return [[_digest(json.dumps(_column(row, group), sort_keys=True)) for row in rows] for rows in sources]
    prompts = [[(_digest(first_question(row)), _digest(prompt_key(row))) for row in rows] for rows in sources]
    least: dict[bytes, bytes] = {}
    for first, last in chain(*prompts):
        least[first] = min(last, least.get(first, last))
    return [[least[first] for first, _ in of_source] for of_source in prompts]


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise UserError(f"{row['_place']}: has no column '{name}', which data.group names")
    return row[name]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
