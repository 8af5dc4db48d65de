"""PPO: an advantage for each token, by a critic that is trained along (arXiv 1707.06347)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.models.sampling import Episode
from pipeline.ppo import algorithm as maths
from pipeline.ppo import scoring
from pipeline.ppo.actors import POLICY
from pipeline.ppo.batch import Advantaged, Learnt, Pack, Scored
from pipeline.ppo.settings import PPOSettings
from pipeline.ppo.trainer import Numbers, RolloutTrainer


class PPOTrainer(RolloutTrainer):
    settings: PPOSettings
    shares = ("policy_loss", "value_loss", "clip_fraction", "update_kl", "entropy", "ratio")

    def score(self, episodes: list[Episode], totals: list[float]) -> list[Scored]:
        """The episodes in packs, with what they are paid and what every adapter says of them. `totals`: what the
        sources say; normalised, bounded, and less what a cut answer costs, it is what they are paid."""
        settings = self.settings
        scores_R = self.score_scale.normalize(totals, self.step)
        if settings.reward_clip is not None:
            scores_R = scores_R.clamp(-settings.reward_clip, settings.reward_clip)
        scores_R -= settings.missing_eos_penalty * torch.tensor([not episode.ended for episode in episodes])
        model = next((source for source in self.sources if source.adapter is not None), None)
        if self.step == 0 and model and model.adapter and self.actors.value_adapter != POLICY:
            self.actors.start_values_from(model.adapter, *self.score_scale.mean_and_std(), model.weight)
        return scoring.score(self.actors, episodes, scores_R, self.pack_size, settings)

    def take_advantages(self, episodes: list[Episode], scored: list[Scored]) -> tuple[Sequence[Learnt], Numbers]:
        return scoring.take_advantages(scored, self.settings, self.kl.coef)

    def make_blank(self, pack: Pack) -> Learnt:
        return Advantaged(pack, *(torch.zeros_like(pack.mask_BG) for _ in range(4)))

    def backward(self, batch: Advantaged, tokens: float) -> tuple[Tensor, Tensor]:
        """Add a pack's gradients for a minibatch of `tokens` answer tokens. Gives its share of policy loss, value loss,
        clip fraction, KL from the policy that wrote it, entropy and ratio, (6,) in float64; and the policy's
        log-probabilities (B, G)."""
        settings, actors, mask_BG = self.settings, self.actors, batch.pack.mask_BG
        weights_BG = maths.weights(mask_BG, settings.loss_normalization, tokens, settings.mini)
        logp_BG, entropy_BG, values_BG = actors.policy(batch.pack)
        now_BG = logp_BG.detach()
        old_BG = now_BG if batch.old_logp_BG is None else batch.old_logp_BG
        policy_loss, ratio_BG = maths.policy_loss(
            logp_BG, old_BG, batch.advantages_BG, weights_BG, settings.cliprange, batch.importance_BG
        )
        not_yet_back: Tensor | float = policy_loss
        if values_BG is None:  # the policy's way back runs under its own adapter, the critic's under its own
            torch.autograd.backward(self.scale.value * policy_loss)
            values_BG, not_yet_back = actors.values(batch.pack), 0.0
        value_loss = maths.value_loss(
            values_BG, batch.old_values_BG, batch.returns_BG, weights_BG, settings.cliprange_value
        )
        torch.autograd.backward(self.scale.value * (not_yet_back + settings.vf_coef * value_loss))
        with torch.no_grad():
            clipped_BG = ((ratio_BG - 1).abs() > settings.cliprange) * mask_BG
            moved_BG = maths.kl_per_token(old_BG, now_BG, "k3") * mask_BG
            parts = (clipped_BG, moved_BG, entropy_BG * mask_BG, ratio_BG * mask_BG)
            shares = [part.double().sum() / tokens for part in parts]
            return torch.stack([policy_loss.detach().double(), value_loss.detach().double(), *shares]), now_BG
