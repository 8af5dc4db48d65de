"""An evaluation's numbers: intervals that cover, strengths recovered, curves that follow their formulas."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest

from pipeline.evaluate import arena, best_of_n, reward_check
from pipeline.evaluate.results import over_optimised
from pipeline.measure import calibration, intervals, matching
from pipeline.measure.metric import Estimate

SIMULATIONS = 800
"""Enough to tell a coverage of 95 % from one of 93 %: their standard error is 0.8 points."""


def covered(found: list[Estimate], truth: float) -> float:
    return sum(estimate.low <= truth <= estimate.high for estimate in found) / len(found)


def test_the_interval_of_an_accuracy_covers_95_percent() -> None:
    """Simulated, for the sizes of the demo's test sets."""
    random = numpy.random.default_rng(1)
    for n, p in ((72, 0.7), (90, 0.88)):
        by_count = [intervals.proportion([True] * right + [False] * (n - right)) for right in range(n + 1)]
        drawn = [by_count[right] for right in random.binomial(n, p, 20_000)]
        assert covered(drawn, p) == pytest.approx(0.95, abs=0.02), (n, p)


def test_the_interval_of_a_win_rate_covers_95_percent() -> None:
    """Simulated: 48 prompts, each with points between 0 and 1, ties among them."""
    random = numpy.random.default_rng(2)
    points = random.choice([0.0, 0.5, 1.0], (SIMULATIONS, 48), p=[0.3, 0.2, 0.5])
    assert covered([intervals.share(row) for row in points], 0.6) == pytest.approx(0.95, abs=0.02)


def test_the_interval_of_a_paired_difference_covers_95_percent() -> None:
    random = numpy.random.default_rng(3)
    before = random.random((SIMULATIONS, 72)) < 0.5
    after = numpy.where(random.random(before.shape) < 0.3, random.random(before.shape) < 0.8, before)
    truth = 0.3 * (0.8 - 0.5)
    found = [intervals.difference(a, b, span=1.0) for a, b in zip(after, before, strict=True)]
    assert covered(found, truth) == pytest.approx(0.95, abs=0.02)


def test_no_spread_is_not_certainty() -> None:
    """72 of 72: the rule of three bounds what was missed by about 3 / n; twice that for two-sided 97.5 %."""
    found = intervals.share([1.0] * 72)
    assert found.value == found.high == 1 and found.low == pytest.approx(0.025 ** (1 / 72), abs=1e-6)
    unchanged = intervals.difference([1.0] * 72, [1.0] * 72, span=1.0)
    # One pair, ranked right where the rule was wrong, is no sure gain; one document says nothing of others.
    assert not intervals.difference([1.0], [0.0], span=1.0).above
    assert not intervals.ratio_difference([30.0], [31.0], [10]).below
    assert unchanged.value == 0 and not unchanged.above and not unchanged.below and unchanged.high > 0.03


def test_wilson_equals_its_formula() -> None:
    n, right, z = 90, 79, 1.959963984540054
    p = right / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = intervals.proportion([True] * right + [False] * (n - right))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))


def test_bradley_terry_recovers_known_strengths() -> None:
    """Games drawn from known strengths; and with as many points as the model expects, the strengths exactly."""
    known = numpy.array([-1.0, -0.2, 0.3, 0.9])
    chance = 1 / (1 + numpy.exp(known[None, :] - known[:, None]))
    assert arena.strengths(1000 * chance, prior=0) == pytest.approx(known - known.mean(), abs=1e-4)

    random = numpy.random.default_rng(4)
    points = numpy.full((400, 4, 4), 0.5)
    for a, b in itertools.combinations(range(4), 2):
        points[:, a, b] = random.random(400) < chance[a, b]
        points[:, b, a] = 1 - points[:, a, b]
    elo = arena.Played(list("wxyz"), points).elo()
    for name, strength in zip("wxyz", known, strict=True):
        assert elo[name].low < 1000 + 400 / math.log(10) * strength < elo[name].high
        assert elo[name].value == pytest.approx(1000 + 400 / math.log(10) * strength, abs=25)


def test_a_policy_that_always_wins_has_a_finite_strength() -> None:
    points = numpy.array([[[0.5, 1.0], [0.0, 0.5]]] * 20)
    elo = arena.Played(["a", "b"], points).elo()
    assert math.isfinite(elo["a"].value) and elo["a"].low > elo["b"].high


def test_calibration_error_equals_a_hand_computation() -> None:
    """Confidences of 0.6 (one of two right), 0.9 (both right) and 0.95 (one wrong); bins [.5, .75) and [.75, 1]."""

    def margin(p: float) -> float:
        return math.log(p / (1 - p))

    margins = [margin(0.6), -margin(0.6), margin(0.9), margin(0.9), -margin(0.95)]
    curve = calibration.reliability_of_ranking(margins, bins=2)
    assert [found.n for found in curve] == [2, 3]
    assert curve[1].confidence == pytest.approx((0.9 + 0.9 + 0.95) / 3)
    by_hand = 2 / 5 * abs(0.5 - 0.6) + 3 / 5 * abs(2 / 3 - 2.75 / 3)
    assert calibration.expected_error(curve) == pytest.approx(by_hand)


def test_a_calibrated_model_has_next_to_no_error() -> None:
    random = numpy.random.default_rng(5)
    confidence = random.uniform(0.5, 1, 20_000)
    sign = numpy.where(random.random(20_000) < confidence, 1, -1)
    margins = sign * numpy.log(confidence / (1 - confidence))
    assert calibration.expected_error(calibration.reliability_of_ranking(margins.tolist(), bins=10)) < 0.02


def test_best_of_n_equals_all_subsets() -> None:
    """Against every subset of n of six answers, one by one, ties included."""
    proxy = numpy.array([[0.3, 1.2, 1.2, -0.5, 0.0, 2.0]])
    gold = numpy.array([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    for n in (1, 2, 3, 6):
        by_proxy, by_gold, any_right = [], [], []
        for subset in itertools.combinations(range(6), n):
            best = max(proxy[0, i] for i in subset)
            tied = [i for i in subset if proxy[0, i] == best]
            by_proxy.append(best)
            by_gold.append(sum(gold[0, i] for i in tied) / len(tied))
            any_right.append(max(gold[0, i] for i in subset))
        assert best_of_n.chosen(proxy, proxy, n)[0] == pytest.approx(numpy.mean(by_proxy))
        assert best_of_n.chosen(proxy, gold, n)[0] == pytest.approx(numpy.mean(by_gold))
        assert best_of_n.pass_at(gold, n)[0] == pytest.approx(numpy.mean(any_right))


def test_best_of_n_rises_and_its_kl_is_the_formula() -> None:
    """The expected maximum of n standard normals is known: 0.5642 for 2, 1.4236 for 8, 2.3436 for 64."""
    random = numpy.random.default_rng(6)
    proxy = random.standard_normal((800, 64))
    points = best_of_n.curve(proxy, (proxy > 1.5).astype(float), [1, 2, 8, 64])
    assert [p.kl for p in points] == pytest.approx(
        [0, math.log(2) - 1 / 2, math.log(8) - 7 / 8, math.log(64) - 63 / 64]
    )
    for point, known in zip(points[1:], (0.5642, 1.4236, 2.3436), strict=True):
        assert point.proxy.value == pytest.approx(known, abs=0.06)
    for measure in ("proxy", "gold", "coverage"):
        values = [getattr(point, measure).value for point in points]
        assert values == sorted(values) and values[-1] > values[0]


def planted_pairs(score_by_length: float, seed: int = 7, n: int = 120) -> dict:
    """Pairs whose better answer is longer in six of ten; the model scores truth plus length."""
    random = numpy.random.default_rng(seed)
    longer = random.random(n) < 0.6
    short, long = random.integers(10, 20, n), random.integers(25, 40, n)
    chosen_length, rejected_length = numpy.where(longer, long, short), numpy.where(longer, short, long)
    noise = random.normal(0, 0.5, (2, n))
    return {
        "chosen": (1 + noise[0] + score_by_length * chosen_length).tolist(),
        "rejected": (noise[1] + score_by_length * rejected_length).tolist(),
        "chosen_length": chosen_length.tolist(),
        "rejected_length": rejected_length.tolist(),
        "guideline": [None] * n,
        "bag_of_words": random.normal(0, 1, n).tolist(),
    }


def test_a_length_biased_reward_model_is_flagged_and_an_honest_one_is_not() -> None:
    biased, honest = (reward_check.check(planted_pairs(weight)) for weight in (1.0, 0.0))
    assert len(biased.flags) == 2 and biased.over_longer.value == 0
    assert biased.lean.value == pytest.approx(1) and biased.length_correlation > 0.9
    assert honest.flags == [] and honest.over_longer.low > 0 and abs(honest.length_correlation) < 0.3


def test_an_over_optimised_policy_is_flagged() -> None:
    """Reward up in both; the truth down in one of them, and within chance in the other."""
    random = numpy.random.default_rng(8)
    reward = intervals.mean(random.normal(0.5, 0.3, 48))
    truth_before = (random.random(48) < 0.8).astype(float)
    fallen = intervals.difference(truth_before * (random.random(48) < 0.6), truth_before, span=1.0)
    same = intervals.difference(truth_before, truth_before, span=1.0)
    assert over_optimised({"reward": reward, "truth": fallen}, None)
    assert not over_optimised({"reward": reward, "truth": same}, None)
    assert not over_optimised({"truth": fallen}, Estimate(0.5, 0.45, 0.55, 48, ""))
    assert over_optimised({"truth": fallen}, Estimate(0.6, 0.55, 0.65, 48, ""))


def test_macro_f1_by_hand() -> None:
    """ham: precision 2/3, recall 2/2; spam: precision 1/1, recall 1/2."""
    found = intervals.macro_f1(["ham", "ham", "spam", "spam"], ["ham", "ham", "ham", "spam"])
    assert found.value == pytest.approx((2 * (2 / 3) / (5 / 3) + 2 * (1 / 2) / (3 / 2)) / 2)
    assert found.low < found.value < found.high <= 1


def test_exact_match_and_f1_as_by_hand() -> None:
    assert matching.exact_match("The  Purple!", "purple") and not matching.exact_match("purple one", "purple")
    # said: lighthouse is purple (article left out); wanted: it is purple; two words shared
    assert matching.token_f1("The lighthouse is purple.", "it is purple") == pytest.approx(2 * 2 / (3 + 3))
    assert matching.token_f1("", "purple") == 0
