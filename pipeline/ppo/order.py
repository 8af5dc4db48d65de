"""Which prompt a step takes: it follows from seed and step, so that a resumed run needs to remember nothing."""

from __future__ import annotations

import random
from functools import lru_cache


def place_of(count: int, seed: int, place: int) -> int:
    """Which prompt stands at a place of the endless row of shuffled epochs."""
    epoch, index = divmod(place, count)
    return _epoch(count, seed, epoch)[index]


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/prompts/{epoch}").sample(range(count), count)
