"""Held-out prompts answered by sampling, and what the reward says of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch

from pipeline.data.contracts import Row
from pipeline.measure import intervals
from pipeline.measure.metric import Estimate
from pipeline.models import processes
from pipeline.ppo import rewards
from pipeline.ppo.actors import POLICY, REFERENCE, Actors
from pipeline.ppo.batch import Pack, pack_episodes, run_forward

if TYPE_CHECKING:
    from pipeline.ppo.trainer import PPOTrainer

ANSWERS = 4
"""Sampled to each prompt: most of what one answer's reward tells of a policy is the luck of the draw."""


@dataclass(frozen=True)
class Rewarded:
    """A few sampled answers to each held-out prompt, those to one prompt beside each other."""

    scores: list[float]
    """What each answer is paid."""
    by_source: dict[str, list[float]]
    """What each source says of it, where there are several."""
    kl: list[float]
    """log pi(answer) - log reference(answer), in nats."""
    lengths: list[int]
    ended: list[bool]


def ask(trainer: PPOTrainer, prompts: Sequence[Row]) -> Rewarded:
    """The policy as it stands, sampled at the training temperature; the same random draws each time it is called.
    Several processes share the prompts."""
    parts = processes.gather(_ask(trainer, processes.share(prompts)))

    def together(of_parts: list[list[Any]]) -> list[Any]:
        rows = range(0, sum(map(len, of_parts)), ANSWERS)
        taken = [iter(values) for values in of_parts]
        return [next(taken[row // ANSWERS % len(parts)]) for row in rows for _ in range(ANSWERS)]

    lists = {name: together([getattr(part, name) for part in parts]) for name in ("scores", "kl", "lengths", "ended")}
    sources = {name: together([part.by_source.get(name, []) for part in parts]) for name in parts[0].by_source}
    return Rewarded(by_source=sources, **lists)


def _ask(trainer: PPOTrainer, prompts: Sequence[Row]) -> Rewarded:
    if not prompts:
        return Rewarded([], {}, [], [], [])
    rows = [row for row in prompts for _ in range(ANSWERS)]
    actors = trainer.actors
    rollout = trainer.answer(rows, "held-out" + (f"/{trainer.rank}" if trainer.rank else ""))
    episodes, by_source = rollout.episodes, trainer.ask_sources(rollout)
    kl = [0.0] * len(rows)
    for pack in pack_episodes(episodes, trainer.forward_size, actors.pad_id, actors.device) if trainer.step else []:
        # before the first step the policy is its reference
        (difference_BG,) = run_forward(lambda part: [_difference(actors, part)], pack)
        for row, nats in zip(pack.rows, difference_BG.sum(1).tolist(), strict=True):
            kl[row] = nats
    actors.act_as(POLICY)
    scores, several = rewards.total(trainer.sources, by_source), by_source if len(by_source) > 1 else {}
    return Rewarded(scores, several, kl, [len(e.answer_ids) for e in episodes], [e.ended for e in episodes])


@torch.no_grad()
def _difference(actors: Actors, pack: Pack) -> torch.Tensor:
    """log pi(token) - log reference(token), (B, G)."""
    return actors.policy(pack, POLICY)[0] - actors.policy(pack, REFERENCE)[0]


def numbers(held_out: Rewarded) -> dict[str, float]:
    """`reward`: mean score (raw, without KL), and `reward/<source>` of each source; `kl`: nats per answer;
    `answer_length` in tokens; `ended`: share."""
    if not held_out.scores:
        return {}
    count = len(held_out.scores)
    return {
        "reward": sum(held_out.scores) / count,
        **{f"reward/{name}": sum(values) / count for name, values in held_out.by_source.items()},
        "kl": sum(held_out.kl) / count,
        "answer_length": sum(held_out.lengths) / count,
        "ended": sum(held_out.ended) / count,
    }


def gain(before: Rewarded, after: Rewarded) -> dict[str, float]:
    """The mean rise of a prompt's reward, and of what each source says, with 95 % intervals as an evaluation has
    them."""
    if not before.scores:
        return {}
    found = _rise(before.scores, after.scores).numbers("reward_gain")
    for name, values in before.by_source.items():
        found |= _rise(values, after.by_source[name]).numbers(f"reward/{name}_gain")
    return found


def _rise(before: list[float], after: list[float]) -> Estimate:
    return intervals.difference(*(numpy.reshape(values, (-1, ANSWERS)).mean(1) for values in (after, before)))
