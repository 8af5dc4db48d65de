"""GRPO: an advantage for each answer, by the other answers of its group; no critic (arXiv 2402.03300).

The rollout, its scores, checkpoints, health and what happens when memory runs out are PPO's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.data.contracts import Row
from pipeline.errors import UserError
from pipeline.models import processes
from pipeline.models.computed import is_packed
from pipeline.models.sampling import Episode
from pipeline.ppo import algorithm as maths
from pipeline.ppo import groups, rewards
from pipeline.ppo.actors import REFERENCE
from pipeline.ppo.batch import Grouped, Learnt, Pack, Rollout, Scored, pack_episodes, run_forward
from pipeline.ppo.grpo_settings import GRPOSettings
from pipeline.ppo.scoring import Scores
from pipeline.ppo.trainer import Numbers, RolloutTrainer


class GRPOTrainer(RolloutTrainer):
    settings: GRPOSettings
    shares = ("policy_loss", "clip_fraction", "update_kl", "entropy", "ratio")

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.copies = size = self.settings.num_generations
        share = self.settings.batch_size // self.processes
        if share % size:
            raise UserError(
                f"a rollout of {self.settings.batch_size} answers on {self.processes} process(es) cannot be divided "
                f"into groups of num_generations {size}: change generation_batch_size or num_generations"
            )

    def choose(self, rollout: Rollout, by_source: Scores) -> tuple[Rollout, Scores]:
        """Groups whose answers are all paid alike make way for groups for other prompts, as often as the recipe allows
        (dynamic sampling, arXiv 2503.14476, section 3.2). Groups that stay alike are learnt from last of all: their
        advantages are 0. Several processes ask what one would."""
        prompts = self.settings.batch_size // self.copies
        asked = self.take_rows(self.step * prompts, prompts)
        for attempt in range(1, self.settings.max_num_gen_batches):
            alike = self._find_alike(rollout, by_source)
            counts: list[int] = processes.gather(len(alike))
            if not (whole := sum(counts)):
                break
            rows = self._take_others(whole, asked)
            asked += rows
            first = sum(counts[: self.rank])
            if not alike:
                continue
            rows, among = rows[first : first + len(alike)], (first, whole)
            others = self.answer(rows, f"{self.step}/replacements {attempt}", self.copies, among)
            rollout, by_source = self._put_in(rollout, by_source, alike, others, self.ask_sources(others))
        return rollout, by_source

    def _take_others(self, count: int, asked: Sequence[Row]) -> list[Row]:
        """So many prompts that this step has not asked; where there are not so many, some of those again."""
        few = self.take_rows(self.step * self.settings.batch_size, count + len(asked), "replacements")
        places = {row["_place"] for row in asked}
        return sorted(few, key=lambda row: row["_place"] in places)[:count]

    def _find_alike(self, rollout: Rollout, by_source: Scores) -> list[int]:
        paid_R = self._pay(rollout.episodes, rewards.total(self.sources, by_source))
        return groups.alike(paid_R, self.copies).nonzero()[:, 0].tolist()

    def _pay(self, episodes: list[Episode], totals: list[float]) -> Tensor:
        """What the sources say of each answer, less the penalty for overlong ones, (R) in float64."""
        paid_R = torch.tensor(totals, dtype=torch.float64)
        if cache := self.settings.soft_punish_cache:
            limit = self.settings.response_length
            lost = [groups.overlong_penalty(len(episode.answer_ids), limit, cache) for episode in episodes]
            paid_R -= torch.tensor(lost, dtype=torch.float64)
        return paid_R

    def _put_in(
        self, rollout: Rollout, by_source: Scores, alike: list[int], others: Rollout, their_scores: Scores
    ) -> tuple[Rollout, Scores]:
        useless = set(self._find_alike(others, their_scores))
        told = list(rollout.told)
        by_source = {name: list(values) for name, values in by_source.items()}
        for other, place in enumerate(alike):
            if other in useless:
                continue
            old, new = (slice(group * self.copies, (group + 1) * self.copies) for group in (place, other))
            told[old] = others.told[new]
            for name, values in by_source.items():
                values[old] = their_scores[name][new]
        return Rollout(told), by_source

    @torch.no_grad()
    def score(self, episodes: list[Episode], totals: list[float]) -> list[Scored]:
        """The first update is made by the policy that wrote the answers, so its log-probabilities here are the
        sampler's own."""
        settings, actors = self.settings, self.actors
        scores_R = self._pay(episodes, totals)
        together = self.copies if is_packed(actors.model) else 1
        scored = []
        for pack in pack_episodes(episodes, self.pack_size, actors.pad_id, actors.device, together):
            logp_BG = pack.lay_out_lists([episode.logp for episode in episodes])
            ref_logp_BG = None
            if settings.beta:
                (ref_logp_BG,) = run_forward(lambda part: [actors.policy(part, REFERENCE)[0]], pack)
            scored.append(Scored(pack, scores_R[pack.rows].float().to(actors.device), logp_BG, ref_logp_BG, None))
        return scored

    def take_advantages(self, episodes: list[Episode], scored: list[Scored]) -> tuple[Sequence[Learnt], Numbers]:
        """Advantages within groups, and what each token counts for; both over all processes' answers."""
        settings, count = self.settings, self.settings.batch_size
        paid_R, kl_R = torch.zeros(2, len(episodes), dtype=torch.float64)
        learns_R = torch.tensor([e.ended or not settings.mask_truncated_completions for e in episodes])
        surprise = 0.0
        for one in scored:
            paid_R[one.pack.rows] = one.scores_B.double().cpu()
            surprise -= float((one.logp_BG * one.pack.mask_BG).double().sum())
            if one.ref_logp_BG is not None:
                kl_R[one.pack.rows] = ((one.logp_BG - one.ref_logp_BG) * one.pack.mask_BG).double().sum(1).cpu()
        mean, spread = maths.mean_and_std(processes.add_up(maths.moments(paid_R, torch.ones_like(paid_R))))
        if settings.loss_type == "rloo":
            advantages_R = groups.leave_one_out(paid_R - settings.beta * kl_R, self.copies)
        else:
            advantages_R = groups.advantages(paid_R, self.copies, settings.scale_rewards, spread)
        lengths_R = torch.tensor([len(episode.sampled) for episode in episodes], dtype=torch.float64)
        alike = groups.alike(paid_R, self.copies).sum().item()
        sums = [lengths_R.sum().item(), (lengths_R * learns_R).sum().item(), kl_R.sum().item(), surprise, alike]
        tokens, learnt, kl, surprise, alike = processes.add_up(sums).tolist()
        batch = []
        for one in scored:
            counted_BG = one.pack.mask_BG * learns_R[one.pack.rows].to(one.pack.mask_BG)[:, None]
            weights_BG = groups.weights(counted_BG, settings.loss_type, count, learnt, settings.response_length)
            ref_logp_BG = None if settings.loss_type == "rloo" else one.ref_logp_BG
            advantages_B = advantages_R[one.pack.rows].float().to(one.scores_B.device)
            batch.append(Grouped(one.pack, None, ref_logp_BG, advantages_B, weights_BG))
        return batch, {
            "reward": mean,
            "reward_std": spread,
            "frac_reward_zero_std": alike * self.copies / count,
            "answer_length": tokens / count,
            "sampled_nll": surprise / tokens,
            **({"kl": kl / count} if settings.beta else {}),
        }

    def make_blank(self, pack: Pack) -> Learnt:
        zeros_BG = torch.zeros_like(pack.mask_BG)
        return Grouped(pack, zeros_BG, zeros_BG if self.settings.beta else None, zeros_BG[:, 0], pack.mask_BG)

    def backward(self, batch: Grouped, tokens: float) -> tuple[Tensor, Tensor]:
        """Add a pack's gradients for a minibatch of `tokens` answer tokens. Gives its share of loss, clip fraction, KL
        from the policy that wrote it, entropy and ratio, (5,) in float64; and the log-probabilities (B, G)."""
        settings, mask_BG = self.settings, batch.pack.mask_BG
        low, high = settings.epsilon, settings.epsilon_high or settings.epsilon
        logp_BG, entropy_BG, _ = self.actors.policy(batch.pack)
        now_BG = logp_BG.detach()
        old_BG = now_BG if batch.old_logp_BG is None else batch.old_logp_BG
        loss, ratio_BG = groups.policy_loss(
            logp_BG,
            old_BG,
            batch.advantages_B,
            batch.weights_BG,
            level=settings.ratio_level,
            clip=(low, high),
            delta=settings.delta,
            importance_BG=batch.importance_BG,
        )
        if batch.ref_logp_BG is not None:
            loss = loss + settings.beta * groups.kl_loss(logp_BG, batch.ref_logp_BG, batch.weights_BG)
        torch.autograd.backward(self.scale.value * loss)
        with torch.no_grad():
            gains_BG = batch.advantages_B[:, None]
            clipped_BG = ((ratio_BG < 1 - low) & (gains_BG < 0)) | ((ratio_BG > 1 + high) & (gains_BG > 0))
            moved_BG = maths.kl_per_token(old_BG, now_BG, "k3")
            parts = (clipped_BG * mask_BG, moved_BG * mask_BG, entropy_BG * mask_BG, ratio_BG * mask_BG)
            return torch.stack([loss.detach().double(), *(part.double().sum() / tokens for part in parts)]), now_BG
