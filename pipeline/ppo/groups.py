"""GRPO and its kin as pure functions: advantages within groups of answers to one prompt, and their losses.

R answers in groups of G to one prompt, those of a group beside each other; padded tensors as in ppo/algorithm.py.
Sources: [D] arXiv 2402.03300 (GRPO), [Dr] arXiv 2503.20783 (Dr. GRPO), [DA] arXiv 2503.14476 (DAPO),
[GS] arXiv 2507.18071 (GSPO), [R] arXiv 2402.14740 (RLOO).
"""

from __future__ import annotations

from typing import Literal

import torch

from pipeline.ppo.algorithm import kl_per_token

Tensor = torch.Tensor
LossType = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"]
TINY = 1e-4
"""Added to a deviation before it divides, as TRL does."""


def alike(scores_R: Tensor, size: int) -> Tensor:
    """(R / size,) Whether all answers of a group have one score. Their deviation may be rounding, and not 0."""
    groups = scores_R.view(-1, size)
    return groups.amax(1) == groups.amin(1)


def advantages(scores_R: Tensor, size: int, scale: Literal["group", "batch", "none"], spread: float) -> Tensor:
    """(R,) Each answer's score less its group's mean [D, section 4.1.2], over the deviation of the group, or over
    `spread`, the deviation of all scores of the batch (arXiv 2508.08221), or undivided [Dr, section 3.2]."""
    groups = scores_R.view(-1, size)
    above = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        above = above / (groups.std(1, keepdim=True) + TINY)
    elif scale == "batch":
        above = above / (spread + TINY)
    return above.flatten()


def leave_one_out(scores_R: Tensor, size: int) -> Tensor:
    """(R,) Each answer's score less the mean of the others of its group [R, eq. 8]."""
    groups = scores_R.view(-1, size)
    others = (groups.sum(1, keepdim=True) - groups) / (size - 1)
    return (groups - others).flatten()


def weights(mask_BG: Tensor, loss_type: LossType, episodes: int, tokens: float, longest: int) -> Tensor:
    """What each token's loss counts for, so that the weighted sum over a batch of so many `episodes` with so many
    `tokens` is the loss: the mean over answers of each one's mean over tokens (grpo, gspo) or of its sum (rloo), the
    mean over tokens (dapo), or the sum of all over episodes * `longest`, a constant (dr_grpo).
    """
    if loss_type == "dapo":  # [DA, eq. 12]
        return mask_BG / max(tokens, 1.0)
    if loss_type == "dr_grpo":  # [Dr, listing 1]
        return mask_BG / (episodes * longest)
    return mask_BG / (mask_BG.sum(1, keepdim=True).clamp(min=1) * episodes)


def policy_loss(
    logp_BG: Tensor,
    old_logp_BG: Tensor,
    advantages_B: Tensor,
    weights_BG: Tensor,
    *,
    level: Literal["token", "sequence", "sum"],
    clip: tuple[float, float],
    delta: float | None = None,
    importance_BG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), weighted and summed [D, eq. 3]; and the ratios (B, G).

    level: the ratio is each token's; the same for all of an answer, from its tokens' mean log-ratio [GS, eq. 7]; or
    from their sum, the whole answer being one action [R, section 3.1].  delta: bounds a ratio from above whatever the
    advantage (arXiv 2505.07291, section 3.4).  importance_BG: what each token's loss is multiplied by besides
    (ppo/importance.py).
    """
    counted_BG = weights_BG > 0
    log_ratio_BG = (logp_BG - old_logp_BG) * counted_BG
    if level != "token":
        total_B1 = log_ratio_BG.sum(1, keepdim=True)
        mean_B1 = total_B1 / counted_BG.sum(1, keepdim=True).clamp(min=1)
        log_ratio_BG = (mean_B1 if level == "sequence" else total_B1).expand_as(log_ratio_BG)
    ratio_BG = torch.exp(log_ratio_BG)
    clipped_BG = ratio_BG.clamp(1 - clip[0], 1 + clip[1])
    bounded_BG = ratio_BG if delta is None else ratio_BG.clamp(max=delta)
    gains_BG = torch.minimum(bounded_BG * advantages_B[:, None], clipped_BG * advantages_B[:, None])
    if importance_BG is not None:
        gains_BG = gains_BG * importance_BG
    return -(gains_BG * weights_BG).sum(), ratio_BG.detach()


def kl_loss(logp_BG: Tensor, ref_logp_BG: Tensor, weights_BG: Tensor) -> Tensor:
    """KL(policy || reference) by k3, weighted and summed as the loss is [D, eq. 4]."""
    return (kl_per_token(logp_BG, ref_logp_BG, "k3") * weights_BG).sum()


def overlong_penalty(length: int, longest: int, cache: int) -> float:
    """What an answer of so many tokens loses: nothing up to `longest` - `cache`, then in proportion up to 1 [DA,
    eq. 13]."""
    return min(max((length - (longest - cache)) / cache, 0.0), 1.0)
