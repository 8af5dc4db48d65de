"""Pairs of answers ranked by their scores, and by their lengths."""

from __future__ import annotations

from typing import Any

import numpy

from pipeline.measure import intervals
from pipeline.measure.metric import Estimate


def ranked_right(margins: Any) -> numpy.ndarray:
    """1 where a pair is ranked right, one half where both answers score alike, else 0; (P,)."""
    right_P: numpy.ndarray = (numpy.sign(numpy.asarray(margins, dtype=float)) + 1) / 2
    return right_P


def rank_auc(higher: Any, lower: Any) -> float:
    """How often a value of `higher` lies above one of `lower`, a tie counting half (Mann and Whitney 1947)."""
    from scipy import stats  # takes a second to import

    found = stats.mannwhitneyu(higher, lower, method="asymptotic").statistic
    return float(found / (len(higher) * len(lower)))


def longer_wins(chosen_lengths: list[int], rejected_lengths: list[int]) -> numpy.ndarray:
    """1 where the chosen answer is the longer one, one half where both are of one length, else 0; (P,)."""
    more_P = numpy.sign(numpy.asarray(chosen_lengths) - numpy.asarray(rejected_lengths))
    points_P: numpy.ndarray = (more_P + 1) / 2
    return points_P


def over_longer(margins: list[float], chosen_lengths: list[int], rejected_lengths: list[int]) -> Estimate:
    """How much more often the model ranks a pair right than the rule "longer wins" does, pair by pair."""
    return intervals.difference(ranked_right(margins), longer_wins(chosen_lengths, rejected_lengths), span=1.0)
