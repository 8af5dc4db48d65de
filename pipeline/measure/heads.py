"""How far the heads of a reward model differ, whether that tells its errors, and how much a score owes to length."""

from __future__ import annotations

from typing import Any

import numpy

from pipeline.measure import intervals
from pipeline.measure.metric import Estimate
from pipeline.measure.ranking import ranked_right

Array = numpy.ndarray[Any, Any]


def deviations(scores_NK: Any, means_K: Any) -> Array:
    """The deviation (N,) of an answer's score over K heads, divided by K - 1, each head's scores less its own mean.

    Bradley-Terry sees differences only, so where a head's zero lies is chance and says nothing of an answer
    (arXiv 2312.09244, which centres scores for that reason by its eq. 2).
    """
    found_N: Array = numpy.std(numpy.asarray(scores_NK) - numpy.asarray(means_K), axis=1, ddof=1)
    return found_N


def disagreement(chosen_PK: Array, rejected_PK: Array, swapped_SK: Array) -> dict[str, Estimate]:
    """Of P held-out pairs, and of S prompts that were given the answer to another one.

    `deviation`, `deviation_swapped`: mean deviation of an answer's score over the heads, of the pairs' own answers (in
    distribution) and of the swapped ones (out of it); each head's mean is that over the pairs' answers.
    `agreed_over_disputed`: by how much more often a pair is ranked right in the half of the pairs on whose margin the
    heads agree most; positive where disagreement tells errors. Left out where there are fewer than two pairs.
    """
    means_K = numpy.concatenate([chosen_PK, rejected_PK]).mean(0)
    by_pair_P = (deviations(chosen_PK, means_K) + deviations(rejected_PK, means_K)) / 2
    found = {"deviation": intervals.mean(by_pair_P)}
    if len(swapped_SK):
        found["deviation_swapped"] = intervals.mean(deviations(swapped_SK, means_K))
    margins_PK = chosen_PK - rejected_PK
    order_P = numpy.argsort(margins_PK.std(1), kind="stable")
    agreed, disputed = numpy.array_split(ranked_right(margins_PK.mean(1))[order_P], 2)
    if len(disputed):
        found["agreed_over_disputed"] = intervals.gap(agreed, disputed)
    return found


def length_slope(margins_P: Any, longer_by_P: Any) -> float:
    """By how much a score grows with each token of an answer: the slope of the line of least squares through a pair's
    margin against the tokens by which its chosen answer is the longer one; 0 where the lengths never differ.

    The line's height at 0 is what better answers gain by being better, and a pair's two answers share their prompt, so
    neither is taken for length. (A linear correction of rewards: arXiv 2409.17407.)
    """
    margins_P, longer_by_P = numpy.asarray(margins_P, dtype=float), numpy.asarray(longer_by_P, dtype=float)
    apart_P = longer_by_P - longer_by_P.mean()
    spread = float((apart_P**2).sum())
    return float((apart_P * margins_P).sum()) / spread if spread else 0.0
