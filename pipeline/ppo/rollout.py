"""Which prompts a step takes, and the policy's answers to them.

Both follow from the seed and the step, so that a run that goes on from a checkpoint needs no generator's state.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from pipeline.data import render
from pipeline.models.forward import plain_layers
from pipeline.models.out_of_memory import ROLLOUT, WhenSplit
from pipeline.models.sampling import Episode, sample
from pipeline.ppo.actors import POLICY, Actors
from pipeline.ppo.batch import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.contracts import Row
    from pipeline.ppo.settings import PPOSettings


def place_of(count: int, seed: int, place: int) -> int:
    """Which of `count` prompts stands at a place of the endless row of shuffled epochs."""
    epoch, index = divmod(place, count)
    return _epoch(count, seed, epoch)[index]


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/prompts/{epoch}").sample(range(count), count)


@torch.no_grad()
def roll_out(
    actors: Actors,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: PPOSettings,
    *,
    draw: str,
    stops: list[int],
    at_once: int,
    when_split: WhenSplit,
) -> Rollout:
    """An answer to each row's prompt by the policy as it stands; equal under an equal name of the `draw`."""
    actors.act_as(POLICY)
    actors.model.eval()
    number = random.Random(draw).getrandbits(63)
    with plain_layers(actors.model, fold_adapter=True) if settings.dequantize_rollout else contextlib.nullcontext():
        episodes = sample(
            actors,
            [render.prompt(tokenizer, row) for row in rows],
            new_tokens=settings.response_length,
            temperature=settings.temperature,
            stops=stops,
            generator=torch.Generator(actors.device).manual_seed(number),
            at_once=at_once,
            critic=actors.state_values if actors.value_adapter == POLICY else None,
            advice=ROLLOUT,
            when_split=when_split,
        )
    return Rollout(rows, episodes, [_text(tokenizer, episode) for episode in episodes])


def _text(tokenizer: PreTrainedTokenizerBase, episode: Episode) -> str:
    ids = episode.answer_ids[:-1] if episode.ended else episode.answer_ids
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
