"""Rows with a label each (KTO) as comparisons: a good and a bad answer to one prompt are a pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pipeline.data import formats
from pipeline.data.contracts import Row
from pipeline.data.dialogues import Unreadable, split_answer
from pipeline.data.shelf import Shelf

ALONE = "is one answer with a label (KTO): no comparison, as no other row answers its prompt with the other label"


class LabelledRows:
    """The labelled rows of one file, kept until all of them are read."""

    def __init__(self) -> None:
        self._rows: Shelf[tuple[str, Row, str | None]] = Shelf()
        """Each with its place, and the reason where it cannot be read."""
        self._by_prompt: dict[bytes, tuple[list[int], list[int]]] = {}
        """The good and the bad answers to each prompt."""

    def add(self, place: str, row: Row) -> None:
        try:
            good, answered = formats.read_label(row), _read_answer(row)
        except Unreadable as error:
            self._rows.append((place, row, str(error)))
            return
        prompt = json.dumps(answered["prompt"], sort_keys=True).encode()
        sides = self._by_prompt.setdefault(hashlib.blake2b(prompt, digest_size=12).digest(), ([], []))
        sides[0 if good else 1].append(len(self._rows))
        self._rows.append((place, answered, None))

    def pair(self) -> Iterator[tuple[str, Any, str | None]]:
        """Comparisons, then the rows that are in none, each with its place and the reason."""
        paired: set[int] = set()
        for good, bad in self._by_prompt.values():
            if good and bad:
                paired.update(good, bad)
            for better in good:
                for worse in bad:
                    (place, chosen, _), (_, rejected, _) = self._rows[better], self._rows[worse]
                    pair = {"chosen": chosen.pop("completion"), "rejected": rejected["completion"]}
                    yield place, {**chosen, **pair}, None
        for index, (place, row, reason) in enumerate(self._rows):
            if index not in paired:
                yield place, row, reason or ALONE


def _read_answer(row: Row) -> Row:
    """A labelled row as prompt and completion. Raises Unreadable."""
    shaped = split_answer(next(formats.read_rows(formats.drop_label(row), "auto", "demonstration")))
    if "prompt" not in shaped or "completion" not in shaped:
        raise Unreadable("has neither 'messages' nor 'prompt' and 'completion'")
    return shaped
