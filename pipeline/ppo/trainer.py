"""The loop of PPO and GRPO: one step is a rollout and the updates learnt from it.

Everything random in a step is drawn from generators seeded by (seed, step, process), and which prompts it takes follows
from the step's number. A run that goes on from a checkpoint therefore needs no generator state to be the same run.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.render import Encoded
from pipeline.errors import UserError
from pipeline.models import processes
from pipeline.models.computed import take_computed
from pipeline.models.out_of_memory import CHECKPOINT, EPISODE, ROW, gradients_aside, run_in_parts
from pipeline.models.sampling import Episode
from pipeline.ppo import algorithm as maths
from pipeline.ppo import importance, rewards
from pipeline.ppo.actors import POLICY, Actors
from pipeline.ppo.answering import Answering
from pipeline.ppo.batch import Learnt, Pack, Rollout, Scored, pack_episodes, take_in_turn
from pipeline.ppo.health import Health
from pipeline.ppo.keeping import Kept, count_predicted, learn_again
from pipeline.ppo.optimizer import make_optimizers, take_step, trained_weights
from pipeline.ppo.scoring import Scores, WhenScored
from pipeline.ppo.settings import RolloutSettings

Numbers = dict[str, float]
WHOLE_AGAIN = 20
"""Steps after which what memory did not hold is tried at its full size again: other programs come and go."""


class RolloutTrainer(Answering):
    """`rows` are prompt-only rows; every process is given all of them and takes its share of each batch. `kept`: what
    earlier stages taught and each update learns again. What is learnt from an answer, and how, PPOTrainer and
    GRPOTrainer say."""

    settings: RolloutSettings
    shares: tuple[str, ...]
    """The names of what `backward` gives."""

    copies = 1
    """Answers to each prompt of a rollout."""
    probes = torch.cuda.is_available()
    """Whether the longest episodes there may be are tried before the first step. A CPU does not say that it is full."""

    def __init__(
        self,
        actors: Actors,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        sources: list[rewards.Source],
        settings: RolloutSettings,
        seed: int,
        kept: Sequence[Kept] = (),
    ) -> None:
        processes = PartialState().num_processes
        share, rest = divmod(settings.mini, processes)
        if rest or share % min(settings.per_device_train_batch_size, share):
            raise UserError(
                f"a minibatch of {settings.mini} episodes on {processes} process(es) cannot be divided into "
                f"batches of per_device_train_batch_size {settings.per_device_train_batch_size}: change one of them"
            )
        self.pack_size = min(settings.per_device_train_batch_size, share)
        self.packs_per_minibatch = share // self.pack_size
        super().__init__(actors, tokenizer, sources, settings, seed, 2 * self.pack_size)
        self.rows, self.kept = rows, kept
        self.kl = maths.KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.health = Health(settings)
        self.scale = maths.LossScale(actors.model.get_input_embeddings().weight.dtype is torch.float16)
        self.score_scale = rewards.ScoreScale(settings.normalize_reward)
        self.step = self.tokens = 0
        self.when_scored: WhenScored = lambda *_: None
        actors.drop_nothing()
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
            rollout, by_source = self.choose(rollout, self.ask_sources(rollout))
            totals = rewards.total(self.sources, by_source)
            scored = self.score(rollout.episodes, totals)
            self.when_scored(rollout, by_source, totals, scored)
            # 3. advantages
            batch, numbers = self.take_advantages(rollout.episodes, scored)
            if self.engine:
                batch, apart = importance.correct(rollout.episodes, batch, settings=self.settings)
                numbers |= apart
            scored_at = time.monotonic()
            # 4. the updates
            numbers |= self.update(batch)
            # 5. steer, count, judge
            numbers |= self._account(rollout, by_source, totals) | take_computed(self.actors.model)
            self.kl.update(numbers.get("kl", 0.0), self.settings.batch_size)
            self.step += 1
            numbers |= {
                "seconds_rollout": rolled_out - started,
                "seconds_scoring": scored_at - rolled_out,
                "seconds_update": time.monotonic() - scored_at,
            }
            del rollout, scored, batch  # with an answer ends what its environment holds, such as a server's session
            yield numbers

    def rollout(self, step: int) -> Rollout:
        """This process's share of a step's prompts, answered by the policy. All prompts stand in an endless row of
        shuffled epochs, from which each step takes the next."""
        prompts = self.settings.batch_size // self.copies
        count = prompts // self.processes
        first = self.rank * count
        return self.answer(self.take_rows(step * prompts + first, count), f"{step}/0", self.copies, (first, prompts))

    def take_rows(self, first: int, count: int, order: str = "prompts") -> list[Row]:
        """So many of the endless row of shuffled epochs, from its place `first` on."""
        return take_in_turn(self.rows, first, count, f"{self.seed}/{order}")

    def choose(self, rollout: Rollout, by_source: Scores) -> tuple[Rollout, Scores]:
        """The answers that are learnt from: all of them, unless a subclass takes others."""
        return rollout, by_source

    def score(self, episodes: list[Episode], totals: list[float]) -> list[Scored]:
        """The episodes in packs, with what they are paid and what the adapters say of them. `totals`: what the sources
        say."""
        raise NotImplementedError

    def take_advantages(self, episodes: list[Episode], scored: list[Scored]) -> tuple[Sequence[Learnt], Numbers]:
        """What the update learns from, and the numbers of the batch."""
        raise NotImplementedError

    def backward(self, batch: Any, tokens: float) -> tuple[Tensor, Tensor]:
        """Add a pack's gradients for a minibatch of `tokens` answer tokens. Gives its `shares`, in float64, and the
        policy's log-probabilities (B, G)."""
        raise NotImplementedError

    def make_blank(self, pack: Pack) -> Learnt:
        """A pack to try the update's pass on."""
        raise NotImplementedError

    def update(self, batch: Sequence[Learnt]) -> Numbers:
        """All epochs over a batch, a minibatch of whole packs at a time."""
        settings, batch = self.settings, list(batch)
        shuffle = random.Random(f"{self.seed}/{self.step}/minibatches/{self.rank}")
        totals: dict[str, list[float]] = {}
        turn = self.step * settings.epochs * (settings.batch_size // settings.mini)
        for _ in range(settings.epochs):
            order = shuffle.sample(range(len(batch)), len(batch))
            for start in range(0, len(order), self.packs_per_minibatch):
                places = order[start : start + self.packs_per_minibatch]
                numbers, learnt = self.update_minibatch([batch[place] for place in places], turn)
                turn += 1
                for place, one in zip(places, learnt, strict=True):
                    batch[place] = one
                if not math.isfinite(numbers["loss"]):
                    return {key: values[-1] for key, values in totals.items()} | numbers
                for key, value in numbers.items():
                    totals.setdefault(key, []).append(value)
                if settings.early_stop_kl is not None and numbers["update_kl"] > settings.early_stop_kl:
                    return _means(totals) | {"stopped_early": 1.0}
        return _means(totals) | {"stopped_early": 0.0}

    def update_minibatch(self, batch: list[Learnt], turn: int = 0) -> tuple[Numbers, list[Learnt]]:
        """One optimizer step, the run's `turn`-th where none was left out before. Also gives the packs for the next
        epoch, in which the policy that wrote the answers has a probability for each token."""
        tokens = processes.add_up(sum(len(one.pack.token_N) for one in batch)).item()
        sums, logps = self.run_backward(batch, tokens)
        shares = dict(zip(self.shares, processes.add_up(sums.cpu()).tolist(), strict=True))
        numbers = {"loss": shares["policy_loss"] + self.settings.vf_coef * shares.get("value_loss", 0.0), **shares}
        for one in self.kept:
            numbers[one.loss] = self.keep(one, turn)
            numbers["loss"] += one.coef * numbers[one.loss]
        numbers |= take_step(self.optimizers, self.scale, self.settings, self.step, math.isfinite(numbers["loss"]))
        learnt = [
            replace(one, old_logp_BG=logp_BG) if one.old_logp_BG is None else one
            for one, logp_BG in zip(batch, logps, strict=True)
        ]
        return numbers, learnt

    def run_backward(self, batch: Sequence[Learnt], tokens: float) -> tuple[Tensor, list[Tensor]]:
        """Add the gradients of packs: the sum of what `backward` gives, and each pack's log-probabilities (B, G)."""
        self.actors.model.train()  # activation checkpointing works in training mode only; dropout is off by now
        sums, logps = zip(*(self._backward_in_parts(one, tokens) for one in batch), strict=True)
        self.actors.model.eval()
        self.actors.act_as(POLICY)
        return torch.stack(sums).sum(0), list(logps)

    def keep(self, one: Kept, turn: int) -> float:
        """Add the gradients of an earlier stage's rows: as many as a minibatch has episodes, in turn, of which each
        process takes its share. Gives their mean loss, in nats a token."""
        share = self.settings.mini // self.processes
        first = turn * self.settings.mini + self.rank * share
        texts = take_in_turn(one.texts, first, share, f"{self.seed}/{one.loss}")
        tokens = processes.add_up(count_predicted(texts)).item()
        return processes.add_up(self._learn_again(one, texts, tokens)).item() / tokens

    def _learn_again(self, one: Kept, texts: Sequence[Encoded], tokens: float) -> float:
        weight, advice = self.scale.value * one.coef / tokens, ROW + ("" if self.settings.checkpointing else CHECKPOINT)
        self.actors.model.train()
        total = learn_again(self.actors, texts, weight, self.pack_size, trained_weights(self.optimizers), advice)
        self.actors.model.eval()
        return total

    def _backward_in_parts(self, one: Learnt, tokens: float) -> tuple[Tensor, Tensor]:
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

    def try_longest(self) -> None:
        """Try the update's pass on the longest prompts with answers of full length, so that what does not fit is found
        before the first rollout. Leaves no gradient behind."""
        rows = heapq.nlargest(self.pack_size, self.rows, key=lambda row: len(str(row["prompt"])))
        filler = self.settings.response_length * [self.actors.pad_id]
        episodes = [Episode(render.prompt(self.tokenizer, row), filler, [], ended=False) for row in rows]
        (pack,) = pack_episodes(episodes, len(episodes), self.actors.pad_id, self.actors.device)
        self.run_backward([self.make_blank(pack)], float(len(rows) * len(filler)))
        for one in self.kept:
            longest = heapq.nlargest(self.pack_size, one.texts, key=lambda text: len(text.ids))
            self._learn_again(one, longest, count_predicted(longest))
        for weight in trained_weights(self.optimizers):
            weight.grad = None

    def _account(self, rollout: Rollout, by_source: dict[str, list[float]], totals: list[float]) -> Numbers:
        self.tokens += sum(len(episode) for episode in rollout.episodes)
        scores_R = torch.tensor(totals, dtype=torch.float64)
        mean, std = maths.mean_and_std(processes.add_up(maths.moments(scores_R, torch.ones_like(scores_R))))
        ended, empty = sum(e.ended for e in rollout.episodes), sum(not text for text in rollout.texts)
        calls, failures = sum(one.calls for one in rollout.told), sum(one.failures for one in rollout.told)
        columns = rewards.columns(self.sources, by_source)
        sums = processes.add_up([ended, empty, calls, failures, *map(sum, columns.values())])
        ended, empty, calls, failures, *means = (sums / self.settings.batch_size).tolist()
        tools = {"tools/call_frequency": calls, "tools/failure_frequency": failures / calls if calls else 0.0}
        return {
            "score": mean,
            "score_std": std,
            "eos_share": ended,
            "empty_share": empty,
            "num_tokens": float(self.tokens),
            **dict(zip(columns, means, strict=True)),
            **(tools if self.rows[0].get("environment") else {}),
        }


def _means(totals: dict[str, list[float]]) -> Numbers:
    return {"grad_norm": 0.0} | {  # 0 of a step whose every update was skipped
        key: sum(values) / len(values) for key, values in totals.items()
    }
