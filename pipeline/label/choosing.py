"""Which of the answers drawn people see, by what the reward model's heads say of them: docs/label.md says why."""

from __future__ import annotations

from itertools import combinations
from operator import sub
from statistics import fmean, pstdev

from pipeline.data.votes import Choose


def best(texts: list[str], scores: list[float], of: int, shown: list[str]) -> list[str]:
    """Of every `of` draws in turn the one that scores highest, of those that say something new."""
    found, said = list[str](), {"", *(text.strip() for text in shown)}
    for start in range(0, len(texts) - of + 1, of):
        highest_first = sorted(range(start, start + of), key=lambda i: -scores[i])
        new = next((texts[i] for i in highest_first if texts[i].strip() not in said), None)
        if new is not None:
            found.append(new)
            said.add(new.strip())
    return found


def pick(choose: Choose, by_head_WK: list[list[float]], width: int) -> list[int]:
    """The `width` answers to a prompt that are worth most beside each other; the first ones where none are."""
    several = combinations(range(len(by_head_WK)), width)
    return list(max(several, key=lambda some: worth(choose, [by_head_WK[i] for i in some])))


def worth(choose: Choose, by_head_WK: list[list[float]]) -> float:
    """What a person's time with these answers is worth, to compare. Where a head's zero lies is chance, so of heads
    only differences of scores are compared."""
    if choose == "disagree":
        return max(float(pstdev(map(sub, one_K, other_K))) for one_K, other_K in combinations(by_head_WK, 2))
    scores = [fmean(heads_K) for heads_K in by_head_WK]
    spread = max(scores) - min(scores)
    return {"gap": spread, "uncertain": -spread}.get(choose, 0.0)
