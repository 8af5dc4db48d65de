"""PPO's formulas against loops over single tokens, on answers of different lengths."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from pipeline.ppo import algorithm as maths
from pipeline.ppo.settings import PPOSettings

LENGTHS = (5, 1, 3, 7)
CLOSE = {"abs": 1e-6}


def ragged(seed: int, scale: float = 1.0) -> list[list[float]]:
    chance = random.Random(seed)
    return [[chance.gauss(0, scale) for _ in range(length)] for length in LENGTHS]


def padded(rows: list[list[float]], garbage: float = 0.0) -> torch.Tensor:
    width = max(LENGTHS)
    return torch.tensor([row + [garbage] * (width - len(row)) for row in rows], dtype=torch.float64)


MASK = padded([[1.0] * length for length in LENGTHS])


def assert_rows(tensor: torch.Tensor, rows: list[list[float]]) -> None:
    for got, row in zip(tensor.tolist(), rows, strict=True):
        assert got[: len(row)] == pytest.approx(row, **CLOSE)
        assert got[len(row) :] == pytest.approx([0.0] * (len(got) - len(row)), **CLOSE)


def test_log_probs_entropy_and_slope_are_those_of_the_softmax() -> None:
    chance = random.Random(0)
    logits = [[chance.gauss(0, 3) for _ in range(11)] for _ in range(4)]
    ids = [2, 0, 10, 5]
    for temperature in (1.0, 0.7, 2.0):
        leaf = torch.tensor(logits, requires_grad=True)
        own = maths.log_probs(leaf, torch.tensor(ids), temperature)
        (by_autograd,) = torch.autograd.grad(own.sum(), leaf)
        logp, entropy, slope = maths.log_probs_with_slope(leaf.detach(), torch.tensor(ids), temperature)
        assert own.tolist() == pytest.approx(logp.tolist(), abs=1e-6)
        assert slope.flatten().tolist() == pytest.approx(by_autograd.flatten().tolist(), abs=1e-6)
        for row, token, got, spread in zip(logits, ids, logp.tolist(), entropy.tolist(), strict=True):
            total = sum(math.exp(x / temperature) for x in row)
            chances = [math.exp(x / temperature) / total for x in row]
            assert got == pytest.approx(math.log(chances[token]), abs=1e-5)
            assert spread == pytest.approx(-sum(p * math.log(p) for p in chances), abs=1e-5)


def test_kl_estimators() -> None:
    logp, ref = ragged(1), ragged(2)
    k1 = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(logp, ref, strict=True)]
    k3 = [[math.exp(-x) - 1 + x for x in row] for row in k1]
    assert_rows(maths.kl_per_token(padded(logp), padded(ref), "k1"), k1)
    assert_rows(maths.kl_per_token(padded(logp), padded(ref), "k3"), k3)


def test_both_estimators_are_unbiased() -> None:
    """Their mean under the policy is KL(policy || reference) = sum p log(p / q)."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    for name in ("k1", "k3"):
        per_token = maths.kl_per_token(policy.log(), reference.log(), name)  # type: ignore[arg-type]
        assert (policy * per_token).sum().item() == pytest.approx(exact, abs=1e-6)


def test_score_lands_on_the_last_token() -> None:
    kl, scores = ragged(3), [2.0, -1.0, 0.5, 3.0]
    expected = [[-0.1 * x for x in row] for row in kl]
    for row, score in zip(expected, scores, strict=True):
        row[-1] += score
    assert_rows(maths.shaped_rewards(torch.tensor(scores), padded(kl, garbage=9.0), MASK, 0.1), expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma: float, lam: float) -> None:
    rewards, values = ragged(4), ragged(5)
    expected = []
    for r, v in zip(rewards, values, strict=True):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        expected.append([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))])
    advantages, returns = maths.gae(padded(rewards), padded(values), MASK, gamma, lam)
    assert_rows(advantages, expected)
    assert_rows(returns, [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(expected, values, strict=True)])


def test_gae_of_one_token_and_of_cut_rows_is_that_of_each_row_alone() -> None:
    """What stands beside an answer, or after it, changes no bit of its advantages."""
    rewards, values = padded(ragged(4), garbage=7.0).float(), padded(ragged(5), garbage=9.0).float()
    together, returns = maths.gae(rewards, values, MASK.float(), 0.9, 0.8)
    for row, count in enumerate(LENGTHS):
        alone, of_one = maths.gae(
            rewards[row : row + 1, :count], values[row : row + 1, :count], torch.ones(1, count), 0.9, 0.8
        )
        assert torch.equal(together[row, :count], alone[0]) and torch.equal(returns[row, :count], of_one[0])
        assert not together[row, count:].any() and not returns[row, count:].any()


def test_whitening_is_over_tokens_of_all_parts() -> None:
    rows = ragged(6, scale=4.0)
    flat = [x for row in rows for x in row]
    mean, deviation = statistics.mean(flat), statistics.stdev(flat)
    halves = [maths.moments(padded(rows)[part], MASK[part]) for part in (slice(0, 2), slice(2, 4))]
    white = maths.whitened(padded(rows, garbage=100.0) * MASK, MASK, halves[0] + halves[1])
    assert_rows(white, [[(x - mean) / deviation for x in row] for row in rows])


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_losses_are_the_clipped_objectives(normalization: str) -> None:
    new, old, advantages, values, before, returns = (ragged(seed, 0.3) for seed in range(7, 13))
    weights = maths.weights(MASK, normalization, float(MASK.sum()), len(LENGTHS))  # type: ignore[arg-type]
    policy, value = [], []
    for i, length in enumerate(LENGTHS):
        policy_row, value_row = [], []
        for t in range(length):
            ratio = math.exp(new[i][t] - old[i][t])
            bounded = min(max(ratio, 0.8), 1.2)
            policy_row.append(-min(ratio * advantages[i][t], bounded * advantages[i][t]))
            near = before[i][t] + min(max(values[i][t] - before[i][t], -0.2), 0.2)
            value_row.append(0.5 * max((values[i][t] - returns[i][t]) ** 2, (near - returns[i][t]) ** 2))
        policy.append(policy_row)
        value.append(value_row)

    def mean(rows: list[list[float]]) -> float:
        if normalization == "token":
            return statistics.mean(x for row in rows for x in row)
        return statistics.mean(statistics.mean(row) for row in rows)

    loss, ratios = maths.policy_loss(padded(new), padded(old, garbage=50.0), padded(advantages), weights, 0.2)
    assert loss.item() == pytest.approx(mean(policy), **CLOSE)
    assert torch.isfinite(ratios).all()
    critic = maths.value_loss(padded(values), padded(before), padded(returns), weights, 0.2)
    assert critic.item() == pytest.approx(mean(value), **CLOSE)


def test_adaptive_kl_coefficient_follows_its_rule() -> None:
    controller = maths.KLController(0.2, target=6.0, horizon=1000)
    controller.update(kl=6.6, episodes=100)  # 10 % too far: within the bound of 20 %
    assert controller.coef == pytest.approx(0.2 * (1 + 0.1 * 100 / 1000))
    controller.update(kl=60.0, episodes=100)
    assert controller.coef == pytest.approx(0.2 * (1 + 0.1 * 100 / 1000) * (1 + 0.2 * 100 / 1000))
    fixed = maths.KLController(0.2, target=None, horizon=1000)
    fixed.update(kl=60.0, episodes=100)
    assert fixed.coef == 0.2


def test_learning_rate_warms_up_and_decays() -> None:
    linear = PPOSettings(steps=10, warmup_steps=2)
    assert [linear.learning_rate_factor(step) for step in (0, 1, 2, 6, 9)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5, 1 / 8]
    )
    assert PPOSettings(steps=10, lr_scheduler_type="constant").learning_rate_factor(9) == 1.0
