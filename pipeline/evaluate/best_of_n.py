"""Best-of-n sampling: what choosing the best of n answers by a reward gains, and how far it goes from the policy.

From N answers to each prompt, every n up to N is estimated without drawing anew: the mean over all subsets of n of the
N answers (the unbiased estimator; as pass@k in arXiv 2107.03374).
"""

from __future__ import annotations

import math

import numpy
from scipy.special import gammaln

from pipeline.evaluate.stored import Point
from pipeline.measure import intervals


def kl(n: int) -> float:
    """KL(best-of-n || policy) <= log n - (n - 1) / n nats an answer, with equality where no two answers score alike
    (arXiv 2112.00861; the bound: arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def curve(proxy_PN: numpy.ndarray, gold_PN: numpy.ndarray | None, ns: list[int]) -> list[Point]:
    """The curve over n, with intervals over prompts. `gold_PN` holds 1 for right answers and 0 for wrong ones."""
    points = []
    for n in ns:
        gold = coverage = None
        if gold_PN is not None:
            gold = intervals.share(chosen(proxy_PN, gold_PN, n))
            coverage = intervals.share(pass_at(gold_PN, n))
        proxy = intervals.mean(chosen(proxy_PN, proxy_PN, n))
        points.append(Point(n=n, kl=kl(n), proxy=proxy, gold=gold, coverage=coverage))
    return points


def chosen(proxy_PN: numpy.ndarray, value_PN: numpy.ndarray, n: int) -> numpy.ndarray:
    """For each prompt the expected `value` of that of n answers which `proxy` scores highest, (P,).

    Of answers that score alike each is as likely to be chosen.
    """
    return (weights(proxy_PN, n) * value_PN).sum(1)  # type: ignore[no-any-return]


def pass_at(gold_PN: numpy.ndarray, n: int) -> numpy.ndarray:
    """For each prompt the chance that n answers hold a right one, (P,)."""
    total, right_P = gold_PN.shape[1], gold_PN.sum(1)
    return 1 - _subsets(total - right_P, n) / _subsets(total, n)  # type: ignore[no-any-return]


def weights(proxy_PN: numpy.ndarray, n: int) -> numpy.ndarray:
    """The chance of each answer to be the one chosen from a random subset of n: (P, N)."""
    total = proxy_PN.shape[1]
    # An answer with a others below it and b alike to it: the group of b is chosen from subsets that lie within a + b
    # and not within a.
    below_PN = (proxy_PN[:, None, :] < proxy_PN[:, :, None]).sum(2)
    alike_PN = (proxy_PN[:, None, :] == proxy_PN[:, :, None]).sum(2)
    within = _subsets(below_PN + alike_PN, n) - _subsets(below_PN, n)
    return within / _subsets(total, n) / alike_PN  # type: ignore[no-any-return]


def _subsets(count: numpy.ndarray | int, n: int) -> numpy.ndarray:
    """Binomial coefficient count over n; 0 where count < n. Up to 64 over 32 it fits a float."""
    count = numpy.asarray(count, dtype=float)
    logs = gammaln(count + 1) - gammaln(n + 1) - gammaln(numpy.maximum(count - n, 0) + 1)
    return numpy.where(count >= n, numpy.exp(logs), 0.0)
