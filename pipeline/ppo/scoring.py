"""What an update is made of: the log-probabilities and values of a rollout's answers, and their advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.models import processes
from pipeline.models.sampling import Episode
from pipeline.ppo import algorithm as maths
from pipeline.ppo.actors import POLICY, REFERENCE, Actors
from pipeline.ppo.batch import Advantaged, Pack, Rollout, Scored, pack_episodes, run_forward
from pipeline.ppo.settings import PPOSettings

Scores = dict[str, list[float]]
"""What each source says of every answer, as rewards.scores gives it."""
WhenScored = Callable[[Rollout, Scores, list[float], list[Scored]], None]
"""Called with a process's answers of a step, their scores, the scores' totals, and the packs."""


@torch.no_grad()
def score(
    actors: Actors, episodes: list[Episode], scores_R: Tensor, pack_size: int, settings: PPOSettings
) -> list[Scored]:
    """The R episodes of a rollout in packs, with what each adapter says of them. `scores_R`: what each is paid.

    Where a batch is one minibatch, its first update is still made by the policy that wrote the answers: the ratio
    is one by construction, and the pass that is differentiated gives the log-probabilities for the updates after
    it. For the KL penalty and the advantages the sampler's own figures will do, and a forward pass is saved.
    """
    trunk = actors.value_adapter == POLICY
    scored = []
    for pack in pack_episodes(episodes, pack_size, actors.pad_id, actors.device):
        (ref_logp_BG,) = run_forward(lambda part: [actors.policy(part, REFERENCE)[0]], pack)
        if settings.one_minibatch:
            sampled = [[e.logp for e in episodes], *([[e.values for e in episodes]] if trunk else [])]
            tensors = [pack.lay_out_lists(figures) for figures in sampled]
        else:
            tensors = run_forward(lambda part: as_updates_see(actors, part), pack)
        if not trunk:
            tensors += run_forward(lambda part: [actors.values(part)], pack)
        logp_BG, values_BG = tensors
        scores_B = scores_R[pack.rows].float().to(actors.device)
        scored.append(Scored(pack, scores_B, logp_BG, ref_logp_BG, values_BG))
    return scored


def as_updates_see(actors: Actors, pack: Pack) -> list[Tensor]:
    """The policy's log-probabilities and with critic: trunk its values, by the very pass that an update is made of,
    so that the first ratio is exactly 1.

    In training mode and with gradients asked for, since kernels may be chosen by that. PyTorch's scaled dot product
    attention does so on CUDA: flash attention has no way back through heads of 193 to 224 on compute capability 8.6
    to 8.9 and 12.0 (aten/native/transformers/cuda/sdp_utils.cpp), where another kernel is taken once there is a
    gradient. bitsandbytes 0.50 calls one operator with and without (earlier ones took gemv for a single row
    without), and PEFT's layers, whose cast is off, compute alike.
    """
    actors.model.train()
    try:
        with torch.enable_grad():
            logp_BG, _, values_BG = actors.policy(pack, way_back=False)
    finally:
        actors.model.eval()
    return [logp_BG.detach()] if values_BG is None else [logp_BG.detach(), values_BG.detach()]


def take_advantages(
    scored: list[Scored], settings: PPOSettings, kl_coef: float
) -> tuple[list[Advantaged], dict[str, float]]:
    """What the update learns from, and the numbers of the batch; whitening is over all processes' tokens."""
    batch = []
    sums = torch.zeros(5, dtype=torch.float64)
    for one in scored:
        assert one.ref_logp_BG is not None and one.values_BG is not None
        mask_BG = one.pack.mask_BG
        kl_BG = maths.kl_per_token(one.logp_BG, one.ref_logp_BG, settings.kl_estimator) * mask_BG
        rewards_BG = maths.shaped_rewards(one.scores_B, kl_BG, mask_BG, kl_coef)
        gained = maths.gae(rewards_BG, one.values_BG, mask_BG, settings.gamma, settings.lam)
        batch.append(Advantaged(one.pack, None if settings.one_minibatch else one.logp_BG, one.values_BG, *gained))
        parts = (kl_BG, rewards_BG, one.scores_B, -one.logp_BG * mask_BG, mask_BG)
        sums += torch.stack([part.double().sum().cpu() for part in parts])
    pairs = [maths.explained_variance(one.old_values_BG, one.returns_BG, one.pack.mask_BG) for one in batch]
    returns = maths.mean_and_std(processes.add_up(sum(pair[0].cpu() for pair in pairs)))
    unexplained = maths.mean_and_std(processes.add_up(sum(pair[1].cpu() for pair in pairs)))
    if settings.whiten_advantages:
        moments_3 = processes.add_up(sum(maths.moments(one.advantages_BG, one.pack.mask_BG).cpu() for one in batch))
        batch = [
            replace(one, advantages_BG=maths.whitened(one.advantages_BG, one.pack.mask_BG, moments_3)) for one in batch
        ]
    kl, shaped, reward, surprise, tokens = (processes.add_up(sums) / settings.batch_size).tolist()
    return batch, {
        "kl": kl,
        "reward": reward,
        "reward_shaped": shaped,
        "answer_length": tokens,
        "sampled_nll": surprise / tokens,
        "explained_variance": 1 - (unexplained[1] / max(returns[1], 1e-8)) ** 2,
        "kl_coef": kl_coef,
    }


def describe(
    rollout: Rollout, columns: Scores, totals: list[float], scored: list[Scored], estimator: Literal["k1", "k3"]
) -> list[dict[str, Any]]:
    """Each answer of a rollout as a row of a table, with the `columns` of rewards.columns. Its numbers have the names
    that their means have in metrics.jsonl: `score` is what the sources say of it together, `reward` what it is paid."""
    paid: dict[int, dict[str, float]] = {}
    for one in scored:
        numbers = {"reward": one.scores_B.tolist()}
        if one.ref_logp_BG is not None:
            kl_BG = maths.kl_per_token(one.logp_BG, one.ref_logp_BG, estimator) * one.pack.mask_BG
            numbers["kl"] = kl_BG.sum(1).tolist()
        for place, row in enumerate(one.pack.rows):
            paid[row] = {name: values[place] for name, values in numbers.items()}
    return [
        {
            "prompt": one.row["prompt"],
            "answer": one.text,
            **({"turns": one.turns} if one.turns else {}),
            "score": totals[place],
            **{name: values[place] for name, values in columns.items()},
            **paid[place],
            "answer_length": len(one.episode.sampled),
            "ended": one.episode.ended,
        }
        for place, one in enumerate(rollout.told)
    ]
