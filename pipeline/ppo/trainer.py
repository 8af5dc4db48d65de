"""The PPO loop: one step is a rollout and the updates learnt from it.

Everything random in a step is drawn from generators seeded by (seed, step, process), and which prompts it takes follows
from the step's number. A run that goes on from a checkpoint therefore needs no generator state to be the same run.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.tokens import stop_ids
from pipeline.errors import UserError
from pipeline.models import processes
from pipeline.models.computed import take_computed
from pipeline.models.forward import plain_layers
from pipeline.models.out_of_memory import CHECKPOINT, EPISODE, ROLLOUT, WhenSplit, gradients_aside, run_in_parts
from pipeline.models.sampling import Episode, sample
from pipeline.ppo import algorithm as maths
from pipeline.ppo import rewards
from pipeline.ppo.actors import POLICY, Actors
from pipeline.ppo.batch import Advantaged, Rollout, Scored, pack_episodes
from pipeline.ppo.health import Health
from pipeline.ppo.optimizer import make_optimizers, take_step, trained_weights
from pipeline.ppo.scoring import WhenScored, score, take_advantages
from pipeline.ppo.settings import PPOSettings

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
        rows: Sequence[Row],
        sources: list[rewards.Source],
        settings: PPOSettings,
        seed: int,
    ) -> None:
        self.actors, self.tokenizer, self.rows, self.sources = actors, tokenizer, rows, sources
        self.settings, self.seed = settings, seed
        self.rank, self.processes = PartialState().process_index, PartialState().num_processes
        self.stops = stop_ids(tokenizer)
        self.kl = maths.KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.health = Health(settings.kl_stop)
        self.scale = maths.LossScale(actors.model.get_input_embeddings().weight.dtype is torch.float16)
        self.score_scale = rewards.ScoreScale(settings.normalize_reward)
        self.step = self.tokens = 0
        self.at_once: dict[Literal["sampled", "learnt"], int] = {}
        """Episodes of a rollout's and of an update's pass, once more have been found too many for memory."""
        self.split_at = 0
        """The step in which that was found last."""
        self.when_split: WhenSplit = lambda episodes, left: None
        self.when_scored: WhenScored = lambda *_: None
        share, rest = divmod(settings.mini, self.processes)
        if rest or share % min(settings.per_device_train_batch_size, share):
            raise UserError(
                f"a minibatch of {settings.mini} episodes on {self.processes} process(es) cannot be divided into "
                f"batches of per_device_train_batch_size {settings.per_device_train_batch_size}: change one of them"
            )
        self.pack_size = min(settings.per_device_train_batch_size, share)
        self.packs_per_minibatch = share // self.pack_size
        self.forward_size = 2 * self.pack_size
        """Sequences of a pass that keeps no gradients."""
        self.optimizers = make_optimizers(actors, settings)

    def steps(self) -> Iterator[Numbers]:
        """Train from where it stands to the last step, giving the numbers of each."""
        if self.probes:
            self.try_longest()
        while self.step < self.settings.steps:
            if self.step - self.split_at >= WHOLE_AGAIN:
                self.at_once.clear()
            started = time.monotonic()
            take_computed(self.actors.model)  # what was measured between two steps is none of this one
            # 1. prompts and answers
            rollout = self.rollout(self.step)
            rolled_out = time.monotonic()
            # 2. what the answers are worth; log-probabilities of policy and reference, values of the critic
            by_source = self.ask_sources(rollout)
            totals = rewards.total(self.sources, by_source)
            scored = self.score(rollout.episodes, totals)
            self.when_scored(rollout, by_source, totals, scored)
            # 3. per-token rewards, advantages
            batch, numbers = take_advantages(scored, self.settings, self.kl.coef)
            scored_at = time.monotonic()
            # 4. the updates
            numbers |= self.update(batch)
            # 5. steer, count, judge
            numbers |= self._account(rollout, by_source, totals) | take_computed(self.actors.model)
            self.kl.update(numbers["kl"], self.settings.batch_size)
            self.step += 1
            numbers |= {
                "seconds_rollout": rolled_out - started,
                "seconds_scoring": scored_at - rolled_out,
                "seconds_update": time.monotonic() - scored_at,
            }
            yield numbers

    def rollout(self, step: int) -> Rollout:
        """This process's share of a step's prompts, answered by the policy. All prompts stand in an endless row of
        shuffled epochs, from which each step takes the next."""
        count = self.settings.batch_size // self.processes
        first = step * self.settings.batch_size + self.rank * count
        places = (divmod(place, len(self.rows)) for place in range(first, first + count))
        rows = [self.rows[_shuffled(len(self.rows), self.seed, epoch)[index]] for epoch, index in places]
        return self.answer(rows, f"{step}/{self.rank}")

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], name: str) -> Rollout:
        """An answer to each row's prompt by the policy as it stands; equal under an equal name of the draw. No more are
        sampled at once than in training."""
        settings, actors = self.settings, self.actors
        at_once = self.at_once.get("sampled") or settings.rollout_batch_size or settings.batch_size // self.processes
        actors.act_as(POLICY)
        actors.model.eval()
        draw = random.Random(f"{self.seed}/answers/{name}").getrandbits(63)
        with plain_layers(actors.model, fold_adapter=True) if settings.dequantize_rollout else contextlib.nullcontext():
            episodes = sample(
                actors,
                [render.prompt(self.tokenizer, row) for row in rows],
                new_tokens=settings.response_length,
                temperature=settings.temperature,
                stops=self.stops,
                generator=torch.Generator(actors.device).manual_seed(draw),
                batch_size=at_once,
                critic=actors.state_values if actors.value_adapter == POLICY else None,
                advice=ROLLOUT,
                when_split=partial(self._take_fewer, "sampled"),
            )
        answers = [episode.answer_ids[:-1] if episode.ended else episode.answer_ids for episode in episodes]
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]
        return Rollout(rows, episodes, texts)

    def ask_sources(self, rollout: Rollout) -> dict[str, list[float]]:
        """What every source of reward says of each answer, by the source's name."""
        return rewards.scores(self.sources, self.actors, self.tokenizer, rollout.rows, rollout.texts, self.forward_size)

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
        return score(self.actors, episodes, scores_R, self.pack_size, settings)

    def update(self, batch: list[Advantaged]) -> Numbers:
        """All epochs over a batch, a minibatch of whole packs at a time."""
        settings, batch = self.settings, list(batch)
        shuffle = random.Random(f"{self.seed}/{self.step}/minibatches/{self.rank}")
        totals: dict[str, list[float]] = {}
        for _ in range(settings.num_ppo_epochs):
            order = shuffle.sample(range(len(batch)), len(batch))
            for start in range(0, len(order), self.packs_per_minibatch):
                places = order[start : start + self.packs_per_minibatch]
                numbers, learnt = self.update_minibatch([batch[place] for place in places])
                for place, one in zip(places, learnt, strict=True):
                    batch[place] = one
                if not math.isfinite(numbers["loss"]):
                    return {key: values[-1] for key, values in totals.items()} | numbers
                for key, value in numbers.items():
                    totals.setdefault(key, []).append(value)
                if settings.early_stop_kl is not None and numbers["update_kl"] > settings.early_stop_kl:
                    return _means(totals) | {"stopped_early": 1.0}
        return _means(totals) | {"stopped_early": 0.0}

    def update_minibatch(self, batch: list[Advantaged]) -> tuple[Numbers, list[Advantaged]]:
        """One optimizer step of policy and critic. Also gives the packs for the next epoch, in which the policy that
        wrote the answers has a probability for each token."""
        tokens = processes.add_up(sum(len(one.pack.token_N) for one in batch)).item()
        sums, logps = self.run_backward(batch, tokens)
        names = ("policy_loss", "value_loss", "clip_fraction", "update_kl", "entropy", "ratio")
        shares = dict(zip(names, processes.add_up(sums.cpu()).tolist(), strict=True))
        numbers = {"loss": shares["policy_loss"] + self.settings.vf_coef * shares["value_loss"], **shares}
        numbers |= take_step(self.optimizers, self.scale, self.settings, self.step, math.isfinite(numbers["loss"]))
        learnt = [
            replace(one, old_logp_BG=logp_BG) if one.old_logp_BG is None else one
            for one, logp_BG in zip(batch, logps, strict=True)
        ]
        return numbers, learnt

    def run_backward(self, batch: list[Advantaged], tokens: float) -> tuple[Tensor, list[Tensor]]:
        """Add the gradients of packs: the sum of what `backward` gives, and each pack's log-probabilities (B, G)."""
        self.actors.model.train()  # activation checkpointing works in training mode only; dropout is off by now
        sums, logps = zip(*(self._backward_in_parts(one, tokens) for one in batch), strict=True)
        self.actors.model.eval()
        self.actors.act_as(POLICY)
        return torch.stack(sums).sum(0), list(logps)

    def _backward_in_parts(self, one: Advantaged, tokens: float) -> tuple[Tensor, Tensor]:
        """`backward` of a pack, in as many parts as memory asks for."""
        length, advice = one.pack.ids_BT.shape[1], EPISODE + ("" if self.settings.checkpointing else CHECKPOINT)

        def backward(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            with gradients_aside(trained_weights(self.optimizers)):
                return self.backward(one.part(rows[0], rows[-1] + 1), tokens)

        rows = range(len(one.pack.rows))
        when_split = partial(self._take_fewer, "learnt")
        parts = run_in_parts(backward, rows, lambda _: length, advice, self.at_once.get("learnt"), when_split)
        sums, logps = zip(*parts, strict=True)
        return torch.stack(sums).sum(0), torch.cat(logps)

    def _take_fewer(self, what: Literal["sampled", "learnt"], episodes: int, left: int) -> None:
        self.at_once[what], self.split_at = left, self.step
        self.when_split(episodes, left)

    def backward(self, batch: Advantaged, tokens: float) -> tuple[Tensor, Tensor]:
        """Add a pack's gradients for a minibatch of `tokens` answer tokens. Gives its share of policy loss, value loss,
        clip fraction, KL from the policy that wrote it, entropy and ratio, (6,) in float64; and the policy's
        log-probabilities (B, G)."""
        settings, actors, mask_BG = self.settings, self.actors, batch.pack.mask_BG
        weights_BG = maths.weights(mask_BG, settings.loss_normalization, tokens, settings.mini)
        logp_BG, entropy_BG, values_BG = actors.policy(batch.pack)
        now_BG = logp_BG.detach()
        old_BG = now_BG if batch.old_logp_BG is None else batch.old_logp_BG
        policy_loss, ratio_BG = maths.policy_loss(logp_BG, old_BG, batch.advantages_BG, weights_BG, settings.cliprange)
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

    def try_longest(self) -> None:
        """Try the update's pass on the longest prompts with answers of full length, so that what does not fit is found
        before the first rollout. Leaves no gradient behind."""
        rows = heapq.nlargest(self.pack_size, self.rows, key=lambda row: len(str(row["prompt"])))
        filler = self.settings.response_length * [self.actors.pad_id]
        episodes = [Episode(render.prompt(self.tokenizer, row), filler, [], ended=False) for row in rows]
        (pack,) = pack_episodes(episodes, len(episodes), self.actors.pad_id, self.actors.device)
        zeros = [torch.zeros_like(pack.mask_BG) for _ in range(4)]
        self.run_backward([Advantaged(pack, *zeros)], float(len(rows) * len(filler)))
        for weight in trained_weights(self.optimizers):
            weight.grad = None

    def _account(self, rollout: Rollout, by_source: dict[str, list[float]], totals: list[float]) -> Numbers:
        self.tokens += sum(len(episode) for episode in rollout.episodes)
        scores_R = torch.tensor(totals, dtype=torch.float64)
        mean, std = maths.mean_and_std(processes.add_up(maths.moments(scores_R, torch.ones_like(scores_R))))
        ended, empty = sum(e.ended for e in rollout.episodes), sum(not text for text in rollout.texts)
        sums = processes.add_up([ended, empty, *map(sum, by_source.values())]) / self.settings.batch_size
        ended, empty, *means = sums.tolist()
        scores = {f"score/{name}": value for name, value in zip(by_source, means, strict=True)}
        return {
            "score": mean,
            "score_std": std,
            "eos_share": ended,
            "empty_share": empty,
            "num_tokens": float(self.tokens),
            **(scores if len(scores) > 1 else {}),
        }


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/prompts/{epoch}").sample(range(count), count)


def _means(totals: dict[str, list[float]]) -> Numbers:
    none = {"grad_norm": 0.0, "value_grad_norm": 0.0}  # of a step whose every update was skipped
    return none | {key: sum(values) / len(values) for key, values in totals.items()}
