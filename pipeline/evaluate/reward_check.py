"""Whether a reward model ranks by more than length: accuracy, baselines, calibration, and where it fails."""

from __future__ import annotations

import numpy
from scipy import stats

from pipeline.disk.atomic import Json
from pipeline.evaluate.stored import RewardModel, Third
from pipeline.language.say import kept
from pipeline.measure import calibration, heads, intervals
from pipeline.measure.metric import Estimate
from pipeline.measure.ranking import longer_wins, ranked_right

LEANS = 0.1
"""By how much more often pairs must be ranked right when the better answer is the longer one, for a model to be said to
lean on length: the whole interval lies above it."""


def check(pairs: Json) -> RewardModel:
    """Everything the page says of a reward model, from the item by item measure `pairs` of measures.py."""
    chosen, rejected = pairs["chosen"], pairs["rejected"]
    margins_P = numpy.asarray(chosen) - numpy.asarray(rejected)
    longer_P = numpy.asarray(pairs["chosen_length"]) - numpy.asarray(pairs["rejected_length"])
    right_P = ranked_right(margins_P)
    words_P = ranked_right(pairs["bag_of_words"])
    rule_P = longer_wins(pairs["chosen_length"], pairs["rejected_length"])
    curve = calibration.reliability_of_ranking(margins_P.tolist())
    groups = {
        kept("chosen longer"): longer_P > 0,
        kept("same length"): longer_P == 0,
        kept("chosen shorter"): longer_P < 0,
    }
    uneven = longer_P != 0
    prefers_longer_P = ranked_right(margins_P[uneven] * longer_P[uneven])
    lean = None
    if (longer_P > 0).any() and (longer_P < 0).any():
        lean = intervals.gap(right_P[longer_P > 0], right_P[longer_P < 0])
    over_rule = intervals.difference(right_P, rule_P, span=1.0)
    correlation = stats.spearmanr([*pairs["chosen_length"], *pairs["rejected_length"]], [*chosen, *rejected])
    return RewardModel(
        accuracy=_share(right_P),
        longer_wins=intervals.share(rule_P),
        bag_of_words=_share(words_P),
        over_longer=over_rule,
        over_words=intervals.difference(right_P, words_P, span=1.0),
        by_margin=_by_margin(margins_P, right_P),
        by_length={name: _share(right_P[where]) for name, where in groups.items() if where.any()},
        by_guideline={
            str(name): _share(right_P[[found == name for found in pairs["guideline"]]])
            for name in dict.fromkeys(pairs["guideline"])
            if name is not None
        },
        prefers_longer=_share(prefers_longer_P) if uneven.any() else None,
        longer_is_better=float((longer_P[uneven] > 0).mean()) if uneven.any() else None,
        lean=lean,
        length_correlation=None if numpy.isnan(correlation.statistic) else float(correlation.statistic),
        reliability=curve,
        ece=calibration.expected_error(curve),
        scores={"chosen": chosen, "rejected": rejected},
        flags=flags(over_rule, lean),
        disagreement=_disagreement(pairs),
    )


def _disagreement(pairs: Json) -> dict[str, Estimate]:
    sides = [numpy.array(pairs.get(f"{side}_heads", [])) for side in ("chosen", "rejected", "swapped")]
    return heads.disagreement(*sides) if len(sides[0]) else {}


def flags(over_rule: Estimate, lean: Estimate | None) -> list[str]:
    """What is wrong with how a reward model uses length, in words; empty where nothing is."""
    found = []
    if not over_rule.above:
        found.append(
            kept("is no better than choosing the longer answer")
            if over_rule.value <= 0
            else kept("is not shown to be better than choosing the longer answer")
        )
    if lean is not None and (lean.low or 0) > LEANS:
        found.append(kept("leans on length: it is right far more often where the better answer is the longer one"))
    return found


def _by_margin(margins_P: numpy.ndarray, right_P: numpy.ndarray) -> list[Third]:
    """Accuracy in thirds of the pairs, from the closest calls to the clearest."""
    order = numpy.argsort(numpy.abs(margins_P), kind="stable")
    thirds = [part for part in numpy.array_split(order, 3) if len(part)]
    return [
        Third(low=float(abs(margins_P[part[0]])), high=float(abs(margins_P[part[-1]])), right=_share(right_P[part]))
        for part in thirds
    ]


def _share(right_P: numpy.ndarray) -> Estimate:
    """Wilson's interval, which knows no halves; where pairs tie the bootstrap's."""
    tied = (right_P == 0.5).any()
    return intervals.share(right_P) if tied else intervals.proportion(right_P == 1)
