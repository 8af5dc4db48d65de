"""Answers that another program has sampled: how far its probabilities are from the model's own, and what each token
then counts for. The formulas are those of TRL 1.16 (GRPOTrainer, vllm_importance_sampling_correction).

B episodes with G tokens at most, as in ppo/batch.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from pipeline.models.sampling import Episode
from pipeline.ppo.batch import Learnt
from pipeline.ppo.settings import RolloutSettings

Tensor = torch.Tensor
One = TypeVar("One", bound=Learnt)


def differences(episodes: Sequence[Episode]) -> Tensor:
    """(N) |log pi(token) - log q(token)| of all tokens of answers: pi the model, q the engine that drew them."""
    pairs = [zip(episode.logp, episode.sampling_logp, strict=True) for episode in episodes]
    return torch.tensor([abs(ours - theirs) for pair in pairs for ours, theirs in pair], dtype=torch.float64)


def ratios(logp_BG: Tensor, sampling_logp_BG: Tensor, mask_BG: Tensor, settings: RolloutSettings) -> Tensor:
    """(B, G) pi / q of each token or of its whole answer, truncated or masked at the bounds."""
    mode = settings.vllm_importance_sampling_mode
    lowest, highest = settings.vllm_importance_sampling_clip_min, settings.vllm_importance_sampling_clip_max
    low, high = -math.inf if lowest is None else lowest, math.inf if highest is None else highest
    log_ratio_BG = (logp_BG - sampling_logp_BG) * mask_BG
    if mode.startswith("sequence"):
        log_ratio_BG = log_ratio_BG.sum(1, keepdim=True).expand_as(log_ratio_BG)
    ratio_BG = log_ratio_BG.exp()
    if mode.endswith("truncate"):
        return ratio_BG.clamp(low, high)
    return ratio_BG.masked_fill((ratio_BG < low) | (ratio_BG > high), 0.0)


def correct(
    episodes: Sequence[Episode], batch: Sequence[One], settings: RolloutSettings
) -> tuple[list[One], dict[str, float]]:
    """What is learnt from, each token with its importance, and the numbers by TRL's names; of one process."""
    apart_N = differences(episodes)
    numbers: dict[str, float] = {
        "sampling/sampling_logp_difference/mean": apart_N.mean().item(),
        "sampling/sampling_logp_difference/max": apart_N.max().item(),
    }
    if not settings.vllm_importance_sampling_correction:
        return list(batch), numbers
    corrected, seen = [], []
    for one in batch:
        logp_BG, sampling_logp_BG = (
            one.pack.lay_out_lists(figures)
            for figures in ([e.logp for e in episodes], [e.sampling_logp for e in episodes])
        )
        ratio_BG = ratios(logp_BG, sampling_logp_BG, one.pack.mask_BG, settings)
        by_answer = settings.vllm_importance_sampling_mode.startswith("sequence")
        seen.append(ratio_BG[:, 0] if by_answer else ratio_BG[one.pack.mask_BG > 0])
        more: Any = {"importance_BG": ratio_BG}
        corrected.append(replace(one, **more))
    ratio_N = torch.cat(seen)
    return corrected, numbers | {
        "sampling/importance_sampling_ratio/min": ratio_N.min().item(),
        "sampling/importance_sampling_ratio/mean": ratio_N.mean().item(),
        "sampling/importance_sampling_ratio/max": ratio_N.max().item(),
    }
