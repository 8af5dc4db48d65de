"""How sure a held-out number is: 95 % intervals for shares, means, paired differences and strengths.

Shares of right and wrong take Wilson's interval (Wilson 1927), means and differences the bias-corrected and accelerated
bootstrap (Efron 1987) over prompts: several answers to one prompt are one observation, their mean. Ratios, F1 and
strengths take percentiles of the bootstrap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from pipeline.measure.metric import Estimate

Values = Sequence[float] | numpy.ndarray[Any, Any]
LEVEL = 0.95
RESAMPLES = 1000
COSTLY_RESAMPLES = 300
"""Of a statistic that takes long to compute."""
SEED = 17
NO_SPREAD = 0.05
"""Share of the span within which values tell nothing of how far others may lie."""
WILSON, EXACT = "Wilson", "Clopper-Pearson"
OVER_PROMPTS, OVER_ROWS = "bootstrap over prompts", "bootstrap over rows"


def proportion(right: Sequence[bool] | numpy.ndarray[Any, Any]) -> Estimate:
    """Share of True, with Wilson's score interval."""
    from scipy import stats  # takes a second to import, which a plan of measures need not wait for

    count, total = sum(map(bool, right)), len(right)
    found = stats.binomtest(count, total).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / total, float(found.low), float(found.high), total, WILSON)


def mean(values: Values, span: float | None = None) -> Estimate:
    """Mean of one value per prompt, with its bootstrap interval.

    span: the largest distance two values can have (1 for a share), where there is one. It matters where the values are
    all but equal and a bootstrap would claim certainty: the interval then allows for values of the other kind that n
    observations may have missed (Clopper and Pearson 1934).
    """
    from scipy import stats

    array_P = numpy.asarray(values, dtype=float)
    centre, total = float(array_P.mean()), len(array_P)
    if total < 2 or numpy.ptp(array_P) <= NO_SPREAD * (span or 0.0):
        missed = float(stats.binomtest(0, total).proportion_ci(LEVEL, method="exact").high)
        room = span * missed if span is not None else 0.0 if total > 1 else float("inf")
        return Estimate(centre, centre - room, centre + room, total, EXACT)
    low, high = bootstrap([array_P], numpy.mean, "BCa")
    return Estimate(centre, float(low), float(high), total, OVER_PROMPTS)


def share(points: Values) -> Estimate:
    """Mean of values between 0 and 1 (win rates with ties at one half), its interval kept inside them."""
    return _within(mean(points, span=1.0), 0.0, 1.0)


def of_share(values: Any) -> Estimate:
    """Of one value an item: Wilson's interval where each is right or wrong, else as of points."""
    return (proportion if all(isinstance(one, bool) for one in values) else share)(values)


def difference(after: Values, before: Values, span: float | None = None) -> Estimate:
    """Mean of after - before, prompt by prompt. span: of after and of before, as in `mean`."""
    change_P = numpy.asarray(after, dtype=float) - numpy.asarray(before, dtype=float)
    if span is None:
        return mean(change_P)
    # What was missed may lie as far off as the other end, -span or span.
    return _within(mean(change_P, span * (1 + abs(float(change_P.mean())))), -span, span)


def gap(first: Values, second: Values) -> Estimate:
    """Mean of one group less the mean of another, the groups drawn independently."""
    one, other = (numpy.asarray(group, dtype=float) for group in (first, second))

    def apart(a: Any, b: Any, axis: int = -1) -> Any:
        return a.mean(axis) - b.mean(axis)

    low, high = bootstrap([one, other], apart)
    return Estimate(float(apart(one, other)), float(low), float(high), min(len(one), len(other)), OVER_PROMPTS)


def ratio(totals: Values, counts: Values) -> Estimate:
    """sum(totals) / sum(counts), for instance nats per token over documents of unlike length; documents are drawn."""
    totals_P, counts_P = (numpy.asarray(values, dtype=float) for values in (totals, counts))

    def of(totals: Any, counts: Any, axis: int = -1) -> Any:
        return totals.sum(axis) / counts.sum(axis)

    # One document says nothing of others.
    low, high = bootstrap([totals_P, counts_P], of, paired=True) if len(totals_P) > 1 else (-numpy.inf, numpy.inf)
    return Estimate(float(of(totals_P, counts_P)), float(low), float(high), len(totals_P), OVER_ROWS)


def ratio_difference(after: Values, before: Values, counts: Values) -> Estimate:
    """The difference of two such ratios over the same documents."""
    return ratio(numpy.asarray(after, dtype=float) - numpy.asarray(before, dtype=float), counts)


def macro_f1(wanted: Sequence[str], picked: Sequence[str]) -> Estimate:
    """Mean over the labels of each one's F1, with a bootstrap interval over items."""
    from sklearn.metrics import f1_score  # takes a second to import

    names = sorted(set(wanted))
    wanted_P, picked_P = numpy.asarray(wanted), numpy.asarray(picked)

    def of(drawn: Any) -> float:
        scores = f1_score(wanted_P[drawn], picked_P[drawn], labels=names, average="macro", zero_division=0.0)
        return float(scores)

    low, high = over_prompts(of, len(wanted))
    return Estimate(of(slice(None)), float(low), float(high), len(wanted), OVER_PROMPTS)


def over_prompts(statistic: Callable[[Any], Any], prompts: int) -> tuple[Any, Any]:
    """Lower and upper ends for a costly statistic of drawn prompts, a number or an array, given their indices (P,)."""
    indices_P = numpy.arange(prompts)
    return bootstrap([indices_P], statistic, resamples=COSTLY_RESAMPLES, vectorized=False)


def bootstrap(
    samples: list[numpy.ndarray[Any, Any]],
    statistic: Callable[..., Any],
    method: str = "percentile",
    resamples: int = RESAMPLES,
    **options: Any,
) -> tuple[Any, Any]:
    """Both ends of a 95 % interval (scipy.stats.bootstrap); the value itself where there is nothing to draw from."""
    from scipy import stats

    if min(map(len, samples)) < 2:
        return (statistic(*samples),) * 2
    options |= {"confidence_level": LEVEL, "n_resamples": resamples, "rng": numpy.random.default_rng(SEED)}
    with warnings.catch_warnings():
        # With next to no spread the acceleration is 0/0; the percentile interval is taken then.
        warnings.simplefilter("ignore")
        found = stats.bootstrap(samples, statistic, method=method, **options).confidence_interval
    if method == "BCa" and not numpy.isfinite([found.low, found.high]).all():
        return bootstrap(samples, statistic, resamples=resamples)
    return found.low, found.high


def _within(found: Estimate, least: float, most: float) -> Estimate:
    """The interval kept inside what is possible."""
    assert found.low is not None and found.high is not None
    return Estimate(found.value, max(found.low, least), min(found.high, most), found.n, found.how)
