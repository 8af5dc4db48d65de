"""PPO for language models as pure functions on padded tensors.

B episodes, G tokens of the longest answer, V vocabulary. `mask_BG` is 1 on the tokens an answer has, its end-of-turn
token included; everywhere else values are 0 and carry nothing. A state is the text before a token, an action the token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Tensor = torch.Tensor


def log_probs(logits_NV: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
    """Log-probability (N,) of each token under softmax(logits / temperature), in nats.

    Computed in float32 whatever the logits are in.
    """
    # Not logsumexp, which takes several times as long over a vocabulary on a CPU.
    shifted_NV = (logits_NV.float() - logits_NV.amax(-1, keepdim=True)).div_(temperature)
    return shifted_NV.gather(-1, ids_N[:, None]).squeeze(-1) - shifted_NV.exp().sum(-1).log()


def log_probs_with_slope(logits_NV: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`log_probs`, the entropy (N,) of each softmax in nats, and the slope (N, V) of each token's log-probability in
    its logits, d log p / d logits = (onehot - softmax) / temperature, in the logits' dtype.

    One softmax serves all three, where differentiating `log_probs` would make three more tables of its size.
    """
    shifted_NV = (logits_NV.float() - logits_NV.amax(-1, keepdim=True)).div_(temperature)
    chance_NV = shifted_NV.exp()
    mass_N = chance_NV.sum(-1)
    chance_NV.div_(mass_N[:, None])
    logp_N = shifted_NV.gather(-1, ids_N[:, None]).squeeze(-1) - mass_N.log()
    entropy_N = mass_N.log() - torch.linalg.vecdot(chance_NV, shifted_NV)
    slope_NV = chance_NV.div_(-temperature)
    slope_NV.scatter_add_(-1, ids_N[:, None], torch.full_like(logp_N, 1 / temperature)[:, None])
    return logp_N, entropy_N, slope_NV.to(logits_NV.dtype)


def kl_per_token(logp_BG: Tensor, ref_logp_BG: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """An estimate of KL(policy || reference) at each sampled token, in nats (joschu.net/blog/kl-approx.html).

    k1 = log pi - log ref: unbiased, may be negative. k3 = ref/pi - 1 - log(ref/pi): unbiased, never negative.
    """
    log_ratio_BG = logp_BG - ref_logp_BG
    return log_ratio_BG if estimator == "k1" else torch.expm1(-log_ratio_BG) + log_ratio_BG


def shaped_rewards(scores_B: Tensor, kl_BG: Tensor, mask_BG: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * KL at every token, and the answer's score at its last one (arXiv 1909.08593, eq. 2)."""
    rewards_BG = -kl_coef * kl_BG * mask_BG
    last_B = mask_BG.sum(1).long() - 1
    return rewards_BG.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BG.dtype))


def gae(rewards_BG: Tensor, values_BG: Tensor, mask_BG: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalized advantage estimation (arXiv 1506.02438, eq. 16).

    A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t; nothing comes after the last token.
    """
    device = rewards_BG.device
    rewards_BG, values_BG, mask_BG = rewards_BG.cpu(), values_BG.cpu(), mask_BG.cpu()  # G steps of a few numbers each
    advantages_BG = torch.zeros_like(rewards_BG)
    next_advantage_B = next_value_B = torch.zeros_like(rewards_BG[:, 0])
    for t in reversed(range(rewards_BG.shape[1])):
        delta_B = rewards_BG[:, t] + gamma * next_value_B - values_BG[:, t]
        here_B = mask_BG[:, t]
        next_advantage_B = (delta_B + gamma * lam * next_advantage_B) * here_B
        next_value_B = values_BG[:, t] * here_B
        advantages_BG[:, t] = next_advantage_B
    return advantages_BG.to(device), ((advantages_BG + values_BG) * mask_BG).to(device)


def moments(values_BG: Tensor, mask_BG: Tensor) -> Tensor:
    """(count, sum, sum of squares) of the masked values in float64: what processes add up to agree on a mean."""
    values_BG, mask_BG = values_BG.double(), mask_BG.double()
    return torch.stack([mask_BG.sum(), (values_BG * mask_BG).sum(), (values_BG.square() * mask_BG).sum()])


def mean_and_std(moments_3: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (of a sample: n - 1) from `moments`."""
    count, total, squares = moments_3.tolist()
    mean = total / max(count, 1.0)
    return mean, math.sqrt(max(squares - count * mean * mean, 0.0) / max(count - 1.0, 1.0))


def whitened(values_BG: Tensor, mask_BG: Tensor, moments_3: Tensor) -> Tensor:
    """Values shifted and scaled to mean 0 and variance 1 over what `moments_3` was taken from."""
    mean, std = mean_and_std(moments_3)
    return (values_BG - mean) / (std + 1e-8) * mask_BG


def weights(mask_BG: Tensor, normalization: Literal["token", "sequence"], tokens: float, episodes: float) -> Tensor:
    """What each token's loss counts for, so that the weighted sum over a minibatch (of `tokens` tokens in `episodes`
    episodes) is its mean over tokens, or over episodes of each one's mean."""
    if normalization == "token":
        return mask_BG / tokens
    return mask_BG / (mask_BG.sum(1, keepdim=True).clamp(min=1) * episodes)


def policy_loss(
    logp_BG: Tensor,
    old_logp_BG: Tensor,
    advantages_BG: Tensor,
    weights_BG: Tensor,
    cliprange: float,
    importance_BG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A), weighted and summed (arXiv 1707.06347, eq. 7); and the ratios.
    importance_BG: what each token's loss is multiplied by besides (ppo/importance.py)."""
    ratio_BG = torch.exp((logp_BG - old_logp_BG) * (weights_BG > 0))
    unclipped_BG = -advantages_BG * ratio_BG
    clipped_BG = -advantages_BG * ratio_BG.clamp(1 - cliprange, 1 + cliprange)
    loss_BG = torch.maximum(unclipped_BG, clipped_BG)
    if importance_BG is not None:
        loss_BG = loss_BG * importance_BG
    return (loss_BG * weights_BG).sum(), ratio_BG.detach()


def value_loss(
    values_BG: Tensor, old_values_BG: Tensor, returns_BG: Tensor, weights_BG: Tensor, cliprange: float
) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), weighted and summed (arXiv 2403.17031, detail 17)."""
    clipped_BG = old_values_BG + (values_BG - old_values_BG).clamp(-cliprange, cliprange)
    worse_BG = torch.maximum((values_BG - returns_BG).square(), (clipped_BG - returns_BG).square())
    return 0.5 * (worse_BG * weights_BG).sum()


def explained_variance(values_BG: Tensor, returns_BG: Tensor, mask_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the returns and of what the values leave unexplained of them: 1 - Var(R - V) / Var(R)."""
    return moments(returns_BG, mask_BG), moments(returns_BG - values_BG, mask_BG)


@dataclass
class KLController:
    """kl_coef, fixed, or steered to a target by a clipped proportional rule (arXiv 1909.08593, section 2.2)."""

    coef: float
    target: float | None
    horizon: int

    def update(self, kl: float, episodes: int) -> None:
        """After a batch of `episodes` whose answers were `kl` nats from the reference on average."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


LOSS_SCALE = 2.0**16
"""In float16, where it starts."""
RAISED_AFTER = 200
"""Updates in a row with finite gradients after which it is doubled."""


@dataclass
class LossScale:
    """What a float16 run multiplies its losses by, so that small gradients are not rounded to 0 on their way back; the
    finished gradients, which are float32, are divided by it (arXiv 1710.03740, section 3.2). 1 in every other dtype."""

    moves: bool
    value: float = 1.0
    clean: int = 0
    """Updates since it last moved."""

    def __post_init__(self) -> None:
        if self.moves:
            self.value = LOSS_SCALE

    def overflowed(self, finite: bool) -> bool:
        """Told whether an update's gradients were finite, says whether the scale may be why they were not, and moves:
        a quarter after an overflow, twice itself after RAISED_AFTER clean updates."""
        if not self.moves:
            return False
        if finite:
            self.clean += 1
            if self.clean == RAISED_AFTER:
                self.value, self.clean = 2 * self.value, 0
            return False
        if self.value <= 1.0:
            return False
        self.value, self.clean = self.value / 4, 0
        return True
