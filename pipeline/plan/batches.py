"""Which rows make a batch under a budget of tokens. Plain Python, so that the planner counts as the trainer takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def take(rows: Iterable[int], tokens: Sequence[int], budget: int) -> list[list[int]]:
    """The rows in their order, in batches of at most `budget` tokens; a row with more is a batch by itself."""
    batches: list[list[int]] = []
    left = 0
    for row in rows:
        if not batches or tokens[row] > left:
            batches.append([])
            left = budget
        batches[-1].append(row)
        left -= tokens[row]
    return batches


def spread(batches: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in the same order in `count` batches: those of most rows are halved.

    There must be as many rows as that.
    """
    while len(batches) < count:
        by_rows = sorted(range(len(batches)), key=lambda place: -len(batches[place]))
        halved = {place for place in by_rows[: count - len(batches)] if len(batches[place]) > 1}
        parts = []
        for place, batch in enumerate(batches):
            middle = len(batch) // 2
            parts += [batch[:middle], batch[middle:]] if place in halved else [batch]
        batches = parts
    return batches
