"""Policies against each other on the same prompts: who wins how often, and how strong that makes each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from scipy.optimize import minimize
from scipy.special import expit

from pipeline.evaluate.stored import Arena
from pipeline.measure import intervals
from pipeline.measure.metric import Estimate

ELO = 400 / numpy.log(10)
CENTRE = 1000.0
PRIOR = 0.5
"""Ties that every pair of policies is given, so that one which always wins has a finite strength."""


@dataclass(frozen=True)
class Played:
    """Policies against each other by one judge. `points_PKK[p, a, b]`: a's points against b at prompt p, a tie is one
    half; together with b's points against a they are as many as the times that the two met there."""

    names: list[str]
    points_PKK: numpy.ndarray

    def win_rate(self, policy: str, other: str) -> Estimate | None:
        """The share that a policy wins where the two met; None where they never did."""
        a, b = self.names.index(policy), self.names.index(other)
        won_P, met_P = self.points_PKK[:, a, b], self.points_PKK[:, a, b] + self.points_PKK[:, b, a]
        return intervals.share(won_P[met_P > 0] / met_P[met_P > 0]) if met_P.any() else None

    def described(self, **judge: Any) -> Arena:
        """As it stands in results.json."""
        return Arena(names=self.names, elo=self.elo(), wins=self.wins(), **judge)

    def wins(self) -> dict[str, dict[str, Estimate]]:
        names = self.names
        return {a: {b: rate for b in names if b != a and (rate := self.win_rate(a, b))} for a in names}

    def elo(self) -> dict[str, Estimate]:
        """Bradley-Terry strengths on the Elo scale, their mean at 1000, with intervals over prompts."""
        prompts = len(self.points_PKK)
        strengths_K = strengths(self.points_PKK.sum(0))
        low_K, high_K = intervals.over_prompts(lambda drawn: strengths(self.points_PKK[drawn].sum(0)), prompts)
        scaled = [CENTRE + ELO * values for values in (strengths_K, low_K, high_K)]
        return {
            name: Estimate(float(value), float(low), float(high), prompts, intervals.OVER_PROMPTS)
            for name, value, low, high in zip(self.names, *scaled, strict=True)
        }


def by_score(scores: dict[str, numpy.ndarray], weights: dict[str, numpy.ndarray] | None = None) -> Played:
    """From scores (P, S) of each policy's answers to the same prompts: every answer of one against every answer of the
    other to the same prompt. `weights` (P, S): how often each answer of a policy is the one it gives, where they are
    not all as likely (best-of-n)."""
    names = list(scores)
    given = {
        name: (weights or {}).get(name, numpy.full(value.shape, 1 / value.shape[1])) for name, value in scores.items()
    }
    points_PKK = numpy.full((len(scores[names[0]]), len(names), len(names)), 0.5)
    for a, first in enumerate(names):
        for b, second in enumerate(names):
            if a != b:
                higher_PST = numpy.sign(scores[first][:, :, None] - scores[second][:, None, :])
                points_P = numpy.einsum("pst,ps,pt->p", higher_PST, given[first], given[second])
                points_PKK[:, a, b] = (points_P + 1) / 2
    return Played(names, points_PKK)


def strengths(points_KK: numpy.ndarray, prior: float = PRIOR) -> numpy.ndarray:
    """Bradley-Terry: the strengths s, of mean 0, that make the points likeliest when a beats b with probability
    sigmoid(s_a - s_b) (Bradley and Terry 1952). `points_KK[a, b]`: a's points against b; the diagonal is not read.

    The likelihood is concave, so its maximum is the only one.
    """
    count = len(points_KK)
    wins_KK = (points_KK + prior) * (1 - numpy.eye(count))

    def loss(s_K: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        apart_KK = s_K[:, None] - s_K[None, :]
        missed_KK = wins_KK * expit(-apart_KK)
        return float((wins_KK * numpy.logaddexp(0, -apart_KK)).sum()), missed_KK.sum(0) - missed_KK.sum(1)

    found = minimize(loss, numpy.zeros(count), jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 1e-14})
    return found.x - found.x.mean()  # type: ignore[no-any-return]
