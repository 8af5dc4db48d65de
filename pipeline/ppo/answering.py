"""Answers sampled from the policy as it stands, and what the sources of the reward say of them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.tokens import stop_ids
from pipeline.models import dialogue
from pipeline.models.forward import plain_layers
from pipeline.models.out_of_memory import ROLLOUT, WhenSplit
from pipeline.ppo import rewards
from pipeline.ppo.actors import POLICY, Actors
from pipeline.ppo.batch import Pack, Rollout, pack_episodes, run_forward
from pipeline.ppo.engine import Engine
from pipeline.ppo.scoring import Scores
from pipeline.ppo.settings import Sampling


class Answering:
    """Everything random is drawn from generators seeded by `seed` and the name of a draw. `forward_size`: sequences of
    a pass that keeps no gradients."""

    step = 0
    """Optimizer steps that the policy has been trained for; 0 while it is its own reference."""

    def __init__(
        self,
        actors: Actors,
        tokenizer: PreTrainedTokenizerBase,
        sources: list[rewards.Source],
        settings: Sampling,
        seed: int,
        forward_size: int,
    ) -> None:
        self.actors, self.tokenizer, self.sources = actors, tokenizer, sources
        self.settings, self.seed, self.forward_size = settings, seed, forward_size
        self.rank, self.processes = PartialState().process_index, PartialState().num_processes
        self.stops = stop_ids(tokenizer)
        self.at_once: dict[Literal["sampled", "learnt"], int] = {}
        """Episodes of a rollout's and of an update's pass, once more have been found too many for memory."""
        self.split_at = 0
        """The step in which that was found last."""
        self.engine: Engine | None = None
        """Who samples in place of the model itself."""
        self.when_split: WhenSplit = lambda episodes, left: None

    @torch.no_grad()
    def answer(self, rows: Sequence[Row], name: str, copies: int = 1, among: tuple[int, int] | None = None) -> Rollout:
        """Answers to each row's prompt, `copies` beside each other, by the policy as it stands; equal under an equal
        name of the draw. No more are sampled at once than in training. `among`: the first row's place in a step's rows,
        of which other processes answer the rest, and their number."""
        settings, actors = self.settings, self.actors
        at_once = self.at_once.get("sampled") or settings.rollout_batch_size or settings.batch_size // self.processes
        actors.act_as(POLICY)
        actors.model.eval()
        if self.engine:
            return self._ask_engine(self.engine, rows, name, copies)
        draw = random.Random(f"{self.seed}/answers/{name}").getrandbits(63)
        with plain_layers(actors.model, fold_adapter=True) if settings.dequantize_rollout else contextlib.nullcontext():
            told = dialogue.answer(
                actors,
                self.tokenizer,
                rows,
                new_tokens=settings.response_length,
                temperature=settings.temperature,
                stops=self.stops,
                generator=torch.Generator(actors.device).manual_seed(draw),
                batch_size=max(1, at_once // copies),
                copies=copies,
                among=among and (range(among[0], among[0] + len(rows)), among[1]),
                static=settings.cache_implementation == "static",
                critic=actors.state_values if actors.value_adapter == POLICY else None,
                advice=ROLLOUT,
                when_split=partial(self._take_fewer, "sampled"),
                iterations=settings.max_tool_calling_iterations,
                seconds=settings.tool_timeout,
            )
        return Rollout(told)

    def _ask_engine(self, engine: Engine, rows: Sequence[Row], name: str, copies: int) -> Rollout:
        """Answers by the engine, with log-probabilities and values by a pass of the model itself over their tokens.

        Raises EngineError where the two are further apart than the recipe allows.
        """
        settings, actors = self.settings, self.actors
        seeds = [
            [random.Random(f"{self.seed}/engine/{name}/{place}/{copy}").getrandbits(31) for copy in range(copies)]
            for place in range(len(rows))
        ]
        episodes = engine.answer(
            self.step,
            [render.prompt(self.tokenizer, row) for row in rows],
            seeds,
            new_tokens=settings.response_length,
            temperature=settings.temperature,
            stops=self.stops,
        )
        for pack in pack_episodes(episodes, self.forward_size, actors.pad_id, actors.device):
            for row, logp_G, values_G in zip(pack.rows, *self._read(pack), strict=True):
                count = len(episodes[row].answer_ids)
                episodes[row].logp = logp_G[:count]
                episodes[row].values = values_G[:count]
        engine.compare(self.step, episodes)
        asked = [row for row in rows for _ in range(copies)]
        pairs = zip(asked, episodes, strict=True)
        return Rollout([dialogue.Told(row, one, dialogue.decode(self.tokenizer, one, row)) for row, one in pairs])

    def _read(self, pack: Pack) -> list[list[list[float]]]:
        def forward(part: Pack) -> list[torch.Tensor]:
            logp_BG, nothing_BG, values_BG = self.actors.policy(part, way_back=False)
            return [logp_BG, nothing_BG[:, :0] if values_BG is None else values_BG]

        return [tensor.tolist() for tensor in run_forward(forward, pack)]

    def ask_sources(self, rollout: Rollout) -> Scores:
        """What every source of reward says of each answer, by the source's name."""
        return rewards.scores(self.sources, self.actors, self.tokenizer, rollout.told, self.forward_size)

    def _take_fewer(self, what: Literal["sampled", "learnt"], episodes: int, left: int) -> None:
        self.at_once[what], self.split_at = left, self.step
        self.when_split(episodes, left)
