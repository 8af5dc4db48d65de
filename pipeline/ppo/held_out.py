"""Held-out prompts answered by sampling, and what the reward says of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from pipeline.data.contracts import Row
from pipeline.measure import intervals
from pipeline.models import processes
from pipeline.models.computed import is_packed
from pipeline.models.forward import plain_on_cpu
from pipeline.plan.sizes import HELD_OUT_ANSWERS
from pipeline.ppo import rewards
from pipeline.ppo.actors import POLICY, REFERENCE, Actors
from pipeline.ppo.answering import Answering
from pipeline.ppo.batch import Pack, pack_episodes, run_forward

ANSWERS = HELD_OUT_ANSWERS
Answers = dict[str, numpy.ndarray[Any, Any]]
"""Of the answers to P held-out prompts, each (P, ANSWERS), nothing where there are no prompts:

reward           what an answer is paid (raw, without KL)
reward/<source>  what each source says of it, where there are several, or where it is paid another number
score_...        what else rewards.columns gives of a source
kl               log pi(answer) - log reference(answer), in nats
answer_length    in tokens
ended            whether it ended by itself
"""


def ask(trainer: Answering, prompts: Sequence[Row]) -> Answers:
    """The policy as it stands, sampled at the training temperature; the same random draws each time it is called.
    Several processes share the prompts and draw what one would."""
    with plain_on_cpu(trainer.actors.model):
        parts = [part for part in processes.gather(_ask(trainer, prompts)) if part]
    return {name: numpy.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def _ask(trainer: Answering, prompts: Sequence[Row]) -> Answers:
    """This process's share."""
    mine, actors = processes.range_of(len(prompts)), trainer.actors
    if not mine:
        return {}
    rows = [prompts[place] for place in mine]
    rollout = trainer.answer(rows, "held-out", ANSWERS, (mine.start, len(prompts)))
    episodes, by_source = rollout.episodes, trainer.ask_sources(rollout)
    kl = [0.0] * len(episodes)
    if trainer.step:  # before the first step the policy is its reference
        together = ANSWERS if is_packed(actors.model) else 1
        for pack in pack_episodes(episodes, trainer.forward_size, actors.pad_id, actors.device, together):
            (difference_BG,) = run_forward(lambda part: [_difference(actors, part)], pack)
            for row, nats in zip(pack.rows, difference_BG.sum(1).tolist(), strict=True):
                kl[row] = nats
    actors.act_as(POLICY)
    columns = rewards.columns(trainer.sources, by_source)
    answers: dict[str, Sequence[float]] = {
        "reward": rewards.total(trainer.sources, by_source),
        **{f"reward/{name[6:]}" if name.startswith("score/") else name: said for name, said in columns.items()},
        "kl": kl,
        "answer_length": [len(episode.sampled) for episode in episodes],
        "ended": [episode.ended for episode in episodes],
    }
    return {name: numpy.reshape(values, (-1, ANSWERS)) for name, values in answers.items()}


@torch.no_grad()
def _difference(actors: Actors, pack: Pack) -> torch.Tensor:
    """log pi(token) - log reference(token), (B, G)."""
    return actors.policy(pack, POLICY)[0] - actors.policy(pack, REFERENCE)[0]


def numbers(answers: Answers) -> dict[str, float]:
    """The mean of each, over all answers."""
    return {name: float(sum(values.flat) / values.size) for name, values in answers.items()}


def gain(before: Answers, after: Answers) -> dict[str, float]:
    """The mean rise of a prompt's reward, and of what each source says, with 95 % intervals as an evaluation has
    them."""
    gains: dict[str, float] = {}
    for name in before:
        if name.startswith("reward"):
            rise = intervals.difference(after[name].mean(1), before[name].mean(1))
            gains |= rise.numbers(f"{name}_gain")
    return gains
