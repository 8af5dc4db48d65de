"""Whether a model's confidence is earned: reliability curve and expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

BINS = 5


@dataclass(frozen=True)
class Bin:
    """Items of like confidence: how sure the model was on average, and how often it was right."""

    confidence: float
    accuracy: float
    n: int


def reliability(confidence_N: Any, right_N: Any, least: float = 0.0, bins: int = BINS) -> list[Bin]:
    """Items in bins of equal width by confidence, from `least` to 1; empty bins are left out.

    right_N: 1 where the model was right, 0 where it was wrong, one half of a tie."""
    place_N = numpy.minimum(((confidence_N - least) / (1 - least) * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence_N[place_N == b].mean()), float(right_N[place_N == b].mean()), int((place_N == b).sum()))
        for b in range(bins)
        if (place_N == b).any()
    ]


def reliability_of_ranking(margins: Sequence[float], bins: int = BINS) -> list[Bin]:
    """The same of a reward model, by its margins (score of chosen - score of rejected). Its confidence in its own
    ranking is sigmoid(|margin|), as Bradley-Terry has it: from 1/2 to 1."""
    margins_P = numpy.asarray(margins, dtype=float)
    right_P = (margins_P > 0) + 0.5 * (margins_P == 0)
    confidence_P = 1 / (1 + numpy.exp(-numpy.abs(margins_P)))
    return reliability(confidence_P, right_P, 0.5, bins)


def expected_error(curve: list[Bin]) -> float:
    """ECE: mean over items of |accuracy - confidence| of their bin (arXiv 1706.04599)."""
    total = sum(one.n for one in curve)
    return sum(one.n * abs(one.accuracy - one.confidence) for one in curve) / total
