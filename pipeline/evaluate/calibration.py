"""Whether a reward model's confidence is earned: reliability curve and expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy.special import expit

BINS = 5


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence: how sure the model was on average, and how often it was right."""

    confidence: float
    accuracy: float
    n: int


def reliability(margins: Sequence[float], bins: int = BINS) -> list[Bin]:
    """Margins (score of chosen - score of rejected) in bins of equal width by confidence, from 1/2 to 1; empty bins are
    left out. The model's confidence in its own ranking is sigmoid(|margin|), as Bradley-Terry has it."""
    margins_P = numpy.asarray(margins, dtype=float)
    confidence_P = expit(numpy.abs(margins_P))
    right_P = (margins_P > 0) + 0.5 * (margins_P == 0)
    place_P = numpy.minimum(((confidence_P - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        Bin(float(confidence_P[place_P == b].mean()), float(right_P[place_P == b].mean()), int((place_P == b).sum()))
        for b in range(bins)
        if (place_P == b).any()
    ]


def expected_error(curve: list[Bin]) -> float:
    """ECE: mean over pairs of |accuracy - confidence| of their bin (arXiv 1706.04599)."""
    total = sum(found.n for found in curve)
    return sum(found.n * abs(found.accuracy - found.confidence) for found in curve) / total
