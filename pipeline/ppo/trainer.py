"""The PPO loop: one step is a rollout and the updates learnt from it.

Everything random in a step is drawn from generators seeded by (seed, step, process), and which prompts it takes follows
from the step's number. A run that goes on from a checkpoint therefore needs no generator state to be the same run.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy
import torch

from pipeline.data import render
from pipeline.errors import UserError
from pipeline.models.forward import plain_layers
from pipeline.models.out_of_memory import ROLLOUT, WhenSplit, try_twice
from pipeline.models.sampling import Episode, sample
from pipeline.ppo import algorithm as maths
from pipeline.ppo import processes, rewards, splitting
from pipeline.ppo.actors import POLICY, REFERENCE, Actors, Pack, noted, packed
from pipeline.ppo.health import Health
from pipeline.ppo.order import place_of
from pipeline.ppo.settings import PPOSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.contracts import Row

Tensor = torch.Tensor
Numbers = dict[str, float]
WHOLE_AGAIN = 20
"""Steps after which what memory did not hold is tried at its full size again: other programs come and go."""


class PPOTrainer:
    """`rows` are prompt-only rows; every process is given all of them and takes its share of each batch."""

    probes = torch.cuda.is_available()
    """Whether the longest episodes there may be are tried before the first step. A CPU does not say that it is full."""

    def __init__(
        self,
        actors: Actors,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[Row],
        sources: list[rewards.Source],
        settings: PPOSettings,
        seed: int,
    ) -> None:
        self.actors, self.tokenizer, self.rows, self.sources = actors, tokenizer, rows, sources
        self.settings, self.seed = settings, seed
        self.rank, self.processes = processes.rank(), processes.count()
        self.stops = render.stop_ids(tokenizer)
        self.kl = maths.KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.health = Health(settings.kl_stop)
        self.scale = maths.LossScale(actors.model.get_input_embeddings().weight.dtype is torch.float16)
        self.score_moments = torch.zeros(3, dtype=torch.float64)
        self.tokens = 0
        self.step = 0
        self.sampled_at_once: int | None = None
        self.learnt_at_once: int | None = None
        """Episodes of a rollout's and of an update's pass, once more have been found too many for memory."""
        self.split_at = 0
        """The step in which that was found last."""
        self.when_split: WhenSplit = lambda episodes, left: None
        share, rest = divmod(settings.mini, self.processes)
        if rest or share % min(settings.per_device_train_batch_size, share):
            raise UserError(
                f"a minibatch of {settings.mini} episodes on {self.processes} process(es) is not a whole number of "
                f"per_device_train_batch_size {settings.per_device_train_batch_size}: change one of them"
            )
        self.pack_size = min(settings.per_device_train_batch_size, share)
        self.packs_per_minibatch = share // self.pack_size
        # On CUDA one kernel that changes everything in place: a step takes no memory that the probe did not see.
        self.optimizers = {
            role: torch.optim.AdamW(
                list(actors.trained(role).values()),
                eps=settings.adam_epsilon,
                weight_decay=settings.weight_decay,
                fused=actors.device.type == "cuda" or None,
            )
            for role in ("policy", "value")
        }
        for optimizer in self.optimizers.values():
            _reserve(optimizer)

    def steps(self) -> Iterator[Numbers]:
        """Train from where it stands to the last step, giving the numbers of each."""
        if self.probes:
            splitting.probe(self)
        while self.step < self.settings.steps:
            if self.step - self.split_at >= WHOLE_AGAIN:
                self.sampled_at_once = self.learnt_at_once = None
            started = time.monotonic()
            # 1. prompts and answers
            rows, episodes = self.rollout(self.step)
            rolled_out = time.monotonic()
            # 2. what the answers are worth
            texts = [self.text(episode) for episode in episodes]
            told = rewards.scores(self.sources, self.actors, self.tokenizer, rows, texts, self.at_once())
            raw = rewards.total(self.sources, told)
            packs = packed(episodes, self.pack_size, self.actors.pad_id, self.actors.device)
            self.normalize(raw, episodes, packs)
            # 3. log-probabilities of policy and reference, values of the critic
            self.score(packs, episodes)
            # 4. per-token rewards, advantages
            numbers = self.advantages(packs)
            scored = time.monotonic()
            # 5. the updates
            numbers |= self.update(packs)
            # 6. steer, count, judge
            numbers |= self._account(raw, told, episodes, texts)
            self.kl.update(numbers["kl"], self.settings.batch_size)
            self.step += 1
            numbers |= {
                "seconds_rollout": rolled_out - started,
                "seconds_scoring": scored - rolled_out,
                "seconds_update": time.monotonic() - scored,
            }
            yield numbers

    def rollout(self, step: int) -> tuple[list[Row], list[Episode]]:
        """This process's share of a step's prompts, answered by the policy."""
        count = self.settings.batch_size // self.processes
        first = step * self.settings.batch_size + self.rank * count
        rows = [self.rows[place_of(len(self.rows), self.seed, place)] for place in range(first, first + count)]
        return rows, self.answers(rows, f"{step}/{self.rank}")

    @torch.no_grad()
    def answers(self, rows: list[Row], name: str) -> list[Episode]:
        """An answer to each row's prompt by the policy as it stands; equal under an equal name of the draw. No more are
        sampled at once than in training."""
        settings, actors = self.settings, self.actors
        actors.act_as(POLICY)
        actors.model.eval()
        number = random.Random(f"{self.seed}/answers/{name}").getrandbits(63)
        with plain_layers(actors.model, fold_adapter=True) if settings.dequantize_rollout else contextlib.nullcontext():
            prompts = [render.prompt(self.tokenizer, row) for row in rows]
            share = settings.rollout_batch_size or settings.batch_size // self.processes
            return sample(
                actors,
                prompts,
                new_tokens=settings.response_length,
                temperature=settings.temperature,
                stops=self.stops,
                generator=torch.Generator(actors.device).manual_seed(number),
                at_once=self.sampled_at_once or share,
                critic=actors.state_values if actors.value_adapter == POLICY else None,
                advice=ROLLOUT,
                when_split=self._samples_fewer,
            )

    def text(self, episode: Episode) -> str:
        ids = episode.answer_ids[:-1] if episode.ended else episode.answer_ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def normalize(self, raw: list[float], episodes: list[Episode], packs: list[Pack]) -> None:
        """Put every pack's `scores_B` in place: normalised, bounded, less what a cut answer costs."""
        scores_B = torch.tensor(raw, dtype=torch.float64)
        how = self.settings.normalize_reward
        if how == "running" or (how == "start" and self.step == 0):
            self.score_moments += processes.summed(maths.moments(scores_B, torch.ones_like(scores_B)))
        if how != "none":
            mean, std = self._score_scale()
            scores_B = (scores_B - mean) / std
        if self.step == 0:
            self._start_critic()
        if self.settings.reward_clip is not None:
            scores_B = scores_B.clamp(-self.settings.reward_clip, self.settings.reward_clip)
        cut_B = torch.tensor([not episode.ended for episode in episodes])
        scores_B = scores_B - self.settings.missing_eos_penalty * cut_B
        for pack in packs:
            pack.scores_B = scores_B[pack.rows].float().to(self.actors.device)

    @torch.no_grad()
    def score(self, packs: list[Pack], episodes: list[Episode]) -> None:
        """Fill in `ref_logp_BG`, `old_logp_BG` and `values_BG`, one adapter after the other.

        Where a batch is one minibatch, its first update is still made by the policy that wrote the answers: the ratio
        is one by construction, and the pass that is differentiated gives the log-probabilities for the updates after
        it. For the KL penalty and the advantages the sampler's own figures will do, and a forward pass is saved.
        """
        trunk = self.actors.value_adapter == POLICY
        for pack in packs:
            (pack.ref_logp_BG,) = splitting.forward_in_parts(
                lambda part: [self.actors.policy(part, REFERENCE)[0]], pack
            )
        for pack in packs:
            if self.settings.mini == self.settings.batch_size:
                pack.old_logp_BG = noted(pack, [e.logp for e in episodes])
                pack.noted_B = numpy.ones(len(pack.rows), dtype=bool)
                if trunk:
                    pack.values_BG = noted(pack, [e.values for e in episodes])
                continue
            pack.old_logp_BG, *values = splitting.forward_in_parts(self.as_updates_see, pack)
            if values:
                (pack.values_BG,) = values
        if not trunk:
            for pack in packs:
                (pack.values_BG,) = splitting.forward_in_parts(lambda part: [self.actors.values(part)], pack)

    def as_updates_see(self, pack: Pack) -> list[Tensor]:
        """The policy's log-probabilities and with critic: trunk its values, by the very pass that an update is made of,
        so that the first ratio is exactly 1.

        In training mode and with gradients asked for, since kernels may be chosen by that. PyTorch's scaled dot product
        attention does so on CUDA: flash attention has no way back through heads of 193 to 224 on compute capability 8.6
        to 8.9 and 12.0 (aten/native/transformers/cuda/sdp_utils.cpp), where another kernel is taken once there is a
        gradient. bitsandbytes 0.50 calls one operator with and without (earlier ones took gemv for a single row
        without), and PEFT's layers, whose cast is off, compute alike.
        """
        self.actors.model.train()
        try:
            with torch.enable_grad():
                logp_BG, _, values_BG = self.actors.policy(pack, way_back=False)
        finally:
            self.actors.model.eval()
        return [logp_BG.detach()] if values_BG is None else [logp_BG.detach(), values_BG.detach()]

    def advantages(self, packs: list[Pack]) -> Numbers:
        """Fill in `advantages_BG` and `returns_BG`; whitening is over all processes' tokens."""
        settings = self.settings
        sums = torch.zeros(5, dtype=torch.float64)
        for pack in packs:
            kl_BG = maths.kl_per_token(pack.old_logp_BG, pack.ref_logp_BG, settings.kl_estimator) * pack.mask_BG
            rewards_BG = maths.shaped_rewards(pack.scores_B, kl_BG, pack.mask_BG, self.kl.coef)
            pack.advantages_BG, pack.returns_BG = maths.gae(
                rewards_BG, pack.values_BG, pack.mask_BG, settings.gamma, settings.lam
            )
            parts = (kl_BG, rewards_BG, pack.scores_B, -pack.old_logp_BG * pack.mask_BG, pack.mask_BG)
            sums += torch.stack([part.double().sum().cpu() for part in parts])
        advantage_moments = processes.summed(sum(maths.moments(p.advantages_BG, p.mask_BG).cpu() for p in packs))
        if settings.whiten_advantages:
            for pack in packs:
                pack.advantages_BG = maths.whitened(pack.advantages_BG, pack.mask_BG, advantage_moments)
        pairs = [maths.explained_variance(p.values_BG, p.returns_BG, p.mask_BG) for p in packs]
        returns = maths.mean_and_std(processes.summed(sum(pair[0].cpu() for pair in pairs)))
        unexplained = maths.mean_and_std(processes.summed(sum(pair[1].cpu() for pair in pairs)))
        kl, shaped, score, surprise, tokens = (processes.summed(sums) / settings.batch_size).tolist()
        return {
            "kl": kl,
            "reward": score,
            "reward_shaped": shaped,
            "answer_length": tokens,
            "sampled_nll": surprise / tokens,
            "explained_variance": 1 - (unexplained[1] / max(returns[1], 1e-8)) ** 2,
            "kl_coef": self.kl.coef,
        }

    def update(self, packs: list[Pack]) -> Numbers:
        """All epochs over a batch, a minibatch of whole packs at a time."""
        settings = self.settings
        shuffle = random.Random(f"{self.seed}/{self.step}/minibatches/{self.rank}")
        totals: dict[str, list[float]] = {}
        for _ in range(settings.num_ppo_epochs):
            order = shuffle.sample(packs, len(packs))
            for start in range(0, len(order), self.packs_per_minibatch):
                numbers = self._minibatch(order[start : start + self.packs_per_minibatch])
                if not math.isfinite(numbers["loss"]):
                    return {key: values[-1] for key, values in totals.items()} | numbers
                for key, value in numbers.items():
                    totals.setdefault(key, []).append(value)
                if settings.early_stop_kl is not None and numbers["update_kl"] > settings.early_stop_kl:
                    return _means(totals) | {"stopped_early": 1.0}
        return _means(totals) | {"stopped_early": 0.0}

    def _minibatch(self, packs: list[Pack]) -> Numbers:
        """One optimizer step of policy and critic."""
        settings = self.settings
        tokens = processes.summed(sum(len(pack.token_N) for pack in packs)).item()
        sums = self.backward_of(packs, tokens)
        policy_loss, value_loss, clipped, moved, entropy, ratio = processes.summed(sums.cpu()).tolist()
        numbers = {
            "loss": policy_loss + settings.vf_coef * value_loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": clipped,
            "update_kl": moved,
            "entropy": entropy,
            "ratio": ratio,
        }
        return numbers | self._optimizer_step(finite=math.isfinite(numbers["loss"]))

    def backward_of(self, packs: list[Pack], tokens: float) -> Tensor:
        """Add the gradients of packs, each in as many parts as memory asks for; the sum of what `backward` gives."""
        self.actors.model.train()  # activation checkpointing works in training mode only; dropout is off by now
        sums = splitting.sum_of(
            splitting.backward_in_parts(
                lambda part: self.backward(part, tokens), pack, self.weights(), self.learnt_at_once, self._learns_fewer
            )
            for pack in packs
        )
        self.actors.model.eval()
        self.actors.act_as(POLICY)
        return sums

    def weights(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return [weight for optimizer in self.optimizers.values() for weight in optimizer.param_groups[0]["params"]]

    def _samples_fewer(self, episodes: int, left: int) -> None:
        self.sampled_at_once, self.split_at = left, self.step
        self.when_split(episodes, left)

    def _learns_fewer(self, episodes: int, left: int) -> None:
        self.learnt_at_once, self.split_at = left, self.step
        self.when_split(episodes, left)

    def backward(self, pack: Pack, tokens: float) -> Tensor:
        """Add a pack's gradients for a minibatch of `tokens` answer tokens. Gives its share of policy loss, value loss,
        clip fraction, KL from the policy that wrote it, entropy and ratio, (6,) in float64."""
        settings, actors = self.settings, self.actors
        weights_BG = maths.weights(pack.mask_BG, settings.loss_normalization, tokens, settings.mini)
        # forward and backward under the policy's adapter
        logp_BG, entropy_BG, values_BG = actors.policy(pack)
        if pack.noted_B.any():
            pack.old_logp_BG.copy_(logp_BG.detach())  # in place, as a pack may be half of another
            pack.noted_B[:] = False
        old_BG = pack.old_logp_BG
        policy_loss, ratio_BG = maths.policy_loss(logp_BG, old_BG, pack.advantages_BG, weights_BG, settings.cliprange)
        if values_BG is None:
            (self.scale.value * policy_loss).backward()
            # and under the critic's
            values_BG = actors.values(pack)
            value_loss = self._value_loss(values_BG, pack, weights_BG)
            (self.scale.value * settings.vf_coef * value_loss).backward()
        else:
            value_loss = self._value_loss(values_BG, pack, weights_BG)
            (self.scale.value * (policy_loss + settings.vf_coef * value_loss)).backward()
        with torch.no_grad():
            clipped_BG = ((ratio_BG - 1).abs() > settings.cliprange) * pack.mask_BG
            moved_BG = maths.kl_per_token(old_BG, logp_BG.detach(), "k3") * pack.mask_BG
            parts = (clipped_BG, moved_BG, entropy_BG * pack.mask_BG, ratio_BG * pack.mask_BG)
            shares = [part.double().sum() / tokens for part in parts]
            return torch.stack([policy_loss.detach().double(), value_loss.detach().double(), *shares])

    def _value_loss(self, values_BG: Tensor, pack: Pack, weights_BG: Tensor) -> Tensor:
        return maths.value_loss(values_BG, pack.values_BG, pack.returns_BG, weights_BG, self.settings.cliprange_value)

    def _optimizer_step(self, finite: bool) -> Numbers:
        """Policy and critic both, or neither: where a gradient is not finite, no weight moves."""
        factor = self.settings.learning_rate_factor(self.step)
        rates = {"policy": self.settings.learning_rate, "value": self.settings.learning_rate}
        if self.settings.value_learning_rate is not None:
            rates["value"] = self.settings.value_learning_rate
        weights = self.weights()
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights]
        processes.reduce_(gradients)
        for gradient in gradients if self.scale.moves else []:
            gradient.div_(self.scale.value)
        norms = {
            role: torch.nn.utils.clip_grad_norm_(
                list(self.actors.trained(role).values()), self.settings.max_grad_norm
            ).item()
            for role in self.optimizers
        }
        fit = finite and all(map(math.isfinite, norms.values()))
        for role, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[role] * factor
            if fit:
                try_twice(optimizer.step)
            optimizer.zero_grad(set_to_none=True)
        numbers = {"learning_rate": rates["policy"] * factor}
        if self.scale.moves:
            numbers["loss_scale"] = self.scale.value
        # All processes have the same gradients by now, so they all skip and move the scale alike.
        skipped = finite and self.scale.overflowed(fit)
        if self.scale.moves:
            numbers["skipped_updates"] = float(skipped)
        if skipped:
            return numbers
        return numbers | {"grad_norm": norms["policy"], "value_grad_norm": norms["value"]}

    def _account(
        self, raw: list[float], told: dict[str, list[float]], episodes: list[Episode], texts: list[str]
    ) -> Numbers:
        self.tokens += sum(len(episode) for episode in episodes)
        scores_B = torch.tensor(raw, dtype=torch.float64)
        score, std = maths.mean_and_std(processes.summed(maths.moments(scores_B, torch.ones_like(scores_B))))
        sums = [sum(episode.ended for episode in episodes), sum(not text for text in texts), *map(sum, told.values())]
        shares = (processes.summed(torch.tensor(sums, dtype=torch.float64)) / self.settings.batch_size).tolist()
        ended, empty, *means = shares
        by_source = {f"score/{name}": mean for name, mean in zip(told, means, strict=True)}
        return {
            "score": score,
            "score_std": std,
            "eos_share": ended,
            "empty_share": empty,
            "num_tokens": float(self.tokens),
            **(by_source if len(by_source) > 1 else {}),
        }

    def _start_critic(self) -> None:
        model = next((source for source in self.sources if source.adapter is not None), None)
        if model is None or model.adapter is None or self.actors.value_adapter == POLICY:
            return
        mean, std = self._score_scale() if self.settings.normalize_reward != "none" else (0.0, 1.0)
        self.actors.start_values_from(model.adapter, mean, std, model.weight)

    def _score_scale(self) -> tuple[float, float]:
        """Mean and deviation of scores; where all were alike there is no scale to learn, and theirs is kept."""
        mean, std = maths.mean_and_std(self.score_moments)
        return mean, std if std > 1e-3 * max(1.0, abs(mean)) else 1.0

    def at_once(self) -> int:
        """Sequences of one forward pass that keeps no gradients."""
        return 2 * self.pack_size


def _means(totals: dict[str, list[float]]) -> Numbers:
    none = {"grad_norm": 0.0, "value_grad_norm": 0.0}  # of a step whose every update was skipped
    return none | {key: sum(values) / len(values) for key, values in totals.items()}


def _reserve(optimizer: torch.optim.AdamW) -> None:
    """The state that AdamW would make in its first step, made now, so that what is tried before the first rollout is
    tried beside it."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=weight.device if group["fused"] else "cpu")
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": step, **moments}
