"""What earlier stages taught, learnt again in every update of PPO and GRPO (PPO-ptx, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.data.render import IGNORED, Encoded
from pipeline.models.out_of_memory import ROW, gradients_aside, run_in_parts
from pipeline.ppo.actors import Actors


@dataclass(frozen=True)
class Kept:
    """Rows of an earlier stage, and how much their loss counts beside the policy's own."""

    loss: str
    """The name of their loss in metrics.jsonl."""
    coef: float
    texts: Sequence[Encoded]


def count_predicted(texts: Sequence[Encoded]) -> int:
    """Tokens with loss. A text's first token follows nothing, so nothing predicts it."""
    return sum(label != IGNORED for text in texts for label in text.labels[1:])


def learn_again(
    actors: Actors,
    texts: Sequence[Encoded],
    weight: float,
    at_once: int,
    trained: Sequence[torch.nn.Parameter],
    advice: str = ROW,
) -> float:
    """Add to the policy's gradients `weight` times those of the texts' summed loss, in passes of so many texts as
    memory holds. Gives that sum, in nats."""

    def backward(part: Sequence[Encoded]) -> float:
        with gradients_aside(trained):
            loss = -actors.texts(part).sum()
            torch.autograd.backward(weight * loss)
        return loss.item()

    in_order = sorted(texts, key=lambda text: len(text.ids))  # those of like length together: less padding
    return sum(run_in_parts(backward, in_order, lambda text: len(text.ids), advice, at_once))
