"""What earlier stages taught, learnt again in every update: of PPO and GRPO (PPO-ptx, arXiv 2203.02155, eq. 2), and of
a trainer of TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from pipeline.data.render import IGNORED, Encoded
from pipeline.models import adapters, processes
from pipeline.models.out_of_memory import ROW, gradients_aside, run_in_parts
from pipeline.ppo.actors import Actors
from pipeline.ppo.batch import take_in_turn


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


class Replay(TrainerCallback):
    """Adds, before the passes of each optimizer step of a trainer of TRL's, the gradients of earlier stages' rows: as
    many as a step has rows of its own, in turn, of which each process takes its share. Their mean loss, in nats a
    token, is among the trainer's metrics."""

    def __init__(self, trainer: Any, kept: Sequence[Kept], pad_id: int) -> None:
        self.trainer, self.kept = trainer, kept
        self.actors = Actors(trainer.model, pad_id, 1.0, None, {})

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        size = args.per_device_train_batch_size
        share = size * args.gradient_accumulation_steps
        first = (state.global_step * args.world_size + args.process_index) * share
        scaler = self.trainer.accelerator.scaler  # of float16
        scale = (scaler.get_scale() if scaler else 1.0) * args.world_size  # gradients of processes are averaged
        trained = list(adapters.trainable(self.actors.model).values())
        self.actors.model.train()
        for one in self.kept:
            texts = take_in_turn(one.texts, first, share, f"{args.seed}/{one.loss}")
            tokens = processes.add_up(count_predicted(texts)).item()
            total = learn_again(self.actors, texts, scale * one.coef / tokens, size, trained)
            self.trainer._metrics["train"][one.loss].append(processes.add_up(total).item() / tokens)
