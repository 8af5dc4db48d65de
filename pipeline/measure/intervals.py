"""How sure a held-out number is: 95 % intervals for shares, means, paired differences and strengths.

Shares of right and wrong take Wilson's interval (Wilson 1927), means and differences the bias-corrected and accelerated
bootstrap (Efron 1987) over prompts: several answers to one prompt are one observation, their mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from scipy import stats

Values = Sequence[float] | numpy.ndarray[Any, Any]
LEVEL = 0.95
RESAMPLES = 1000
SEED = 17
NO_SPREAD = 0.05
"""Share of the span within which values tell nothing of how far others may lie."""


@dataclass(frozen=True)
class Estimate:
    """A number and the 95 % interval around it, from `n` independent observations."""

    value: float
    low: float
    high: float
    n: int

    @property
    def above(self) -> bool:
        """The whole interval lies above 0: a rise that chance does not explain."""
        return self.low > 0

    @property
    def below(self) -> bool:
        return self.high < 0


def proportion(right: Sequence[bool] | numpy.ndarray[Any, Any]) -> Estimate:
    """Share of True, with Wilson's score interval."""
    count, total = sum(map(bool, right)), len(right)
    found = stats.binomtest(count, total).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / total, float(found.low), float(found.high), total)


def mean(values: Values, span: float | None = None) -> Estimate:
    """Mean of one value per prompt, with its bootstrap interval.

    span: the largest distance two values can have (1 for a share), where there is one. It matters where the values are
    all but equal and a bootstrap would claim certainty: the interval then allows for values of the other kind that n
    observations may have missed (Clopper and Pearson 1934).
    """
    array_P = numpy.asarray(values, dtype=float)
    centre, total = float(array_P.mean()), len(array_P)
    if total < 2 or numpy.ptp(array_P) <= NO_SPREAD * (span or 0.0):
        missed = float(stats.binomtest(0, total).proportion_ci(LEVEL, method="exact").high)
        room = span * missed if span is not None else 0.0 if total > 1 else float("inf")
        return Estimate(centre, centre - room, centre + room, total)
    with warnings.catch_warnings():
        # With next to no spread the acceleration is 0/0; the percentile interval is taken then.
        warnings.simplefilter("ignore")
        options = {"confidence_level": LEVEL, "n_resamples": RESAMPLES, "rng": numpy.random.default_rng(SEED)}
        found = stats.bootstrap((array_P,), numpy.mean, method="BCa", **options).confidence_interval
        if not numpy.isfinite([found.low, found.high]).all():
            options["rng"] = numpy.random.default_rng(SEED)
            found = stats.bootstrap((array_P,), numpy.mean, method="percentile", **options).confidence_interval
    return Estimate(centre, float(found.low), float(found.high), total)


def share(points: Values) -> Estimate:
    """Mean of values between 0 and 1 (win rates with ties at one half), its interval kept inside them."""
    found = mean(points, span=1.0)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0), found.n)


def difference(after: Values, before: Values, span: float | None = None) -> Estimate:
    """Mean of after - before, prompt by prompt. span: of after and of before, as in `mean`."""
    change_P = numpy.asarray(after, dtype=float) - numpy.asarray(before, dtype=float)
    if span is None:
        return mean(change_P)
    # What was missed may lie as far off as the other end, -span or span.
    found = mean(change_P, span * (1 + abs(float(change_P.mean()))))
    return Estimate(found.value, max(found.low, -span), min(found.high, span), found.n)


def gap(first: Values, second: Values) -> Estimate:
    """Mean of one group less the mean of another, the groups drawn independently."""
    groups = [numpy.asarray(group, dtype=float) for group in (first, second)]
    means = [group[_drawn(len(group))].mean(1) for group in groups]
    low, high = numpy.percentile(means[0] - numpy.random.default_rng(SEED + 1).permutation(means[1]), _tails())
    centre = float(groups[0].mean() - groups[1].mean())
    return Estimate(centre, float(low), float(high), min(len(group) for group in groups))


def ratio(totals: Values, counts: Values) -> Estimate:
    """sum(totals) / sum(counts), for instance nats per token over documents of unlike length; documents are drawn."""
    totals_P, counts_P = numpy.asarray(totals, dtype=float), numpy.asarray(counts, dtype=float)
    centre = float(totals_P.sum() / counts_P.sum())
    if len(totals_P) < 2:  # one document says nothing of others
        return Estimate(centre, -float("inf"), float("inf"), len(totals_P))
    drawn = _drawn(len(totals_P))
    low, high = numpy.percentile(totals_P[drawn].sum(1) / counts_P[drawn].sum(1), _tails())
    return Estimate(centre, float(low), float(high), len(totals_P))


def ratio_difference(after: Values, before: Values, counts: Values) -> Estimate:
    """The difference of two such ratios over the same documents."""
    return ratio(numpy.asarray(after, dtype=float) - numpy.asarray(before, dtype=float), counts)


def macro_f1(wanted: Sequence[str], picked: Sequence[str]) -> Estimate:
    """Mean over the labels of each one's F1, with a bootstrap interval over items."""
    from sklearn.metrics import f1_score  # takes a second to import

    names = sorted(set(wanted))
    wanted_P, picked_P = numpy.asarray(wanted), numpy.asarray(picked)

    def of(drawn: Any) -> numpy.ndarray:
        scores = f1_score(wanted_P[drawn], picked_P[drawn], labels=names, average="macro", zero_division=0.0)
        return numpy.array([scores])

    low, high = over_prompts(of, len(wanted))
    return Estimate(float(of(slice(None))[0]), float(low[0]), float(high[0]), len(wanted))


def over_prompts(statistic, prompts: int) -> tuple[numpy.ndarray, numpy.ndarray]:  # type: ignore[no-untyped-def]
    """Lower and upper ends for a statistic of drawn prompts: `statistic(indices_P)` gives an array (K,)."""
    found = numpy.stack([statistic(indices) for indices in _drawn(prompts, 300)])
    low, high = numpy.percentile(found, _tails(), axis=0)
    return low, high


def _drawn(count: int, resamples: int = RESAMPLES) -> numpy.ndarray:
    return numpy.random.default_rng(SEED).integers(0, count, (resamples, count))


def _tails() -> list[float]:
    return [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
