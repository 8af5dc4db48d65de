"""PPO's passes when memory does not hold a pack: the same in parts, with the same sums."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from pipeline.data import render
from pipeline.models.out_of_memory import EPISODE, WhenSplit, gradients_aside, run_in_parts
from pipeline.models.sampling import Episode
from pipeline.ppo.actors import noted, packed

if TYPE_CHECKING:
    from pipeline.ppo.actors import Pack
    from pipeline.ppo.trainer import PPOTrainer

Tensor = torch.Tensor


def backward_in_parts(
    backward: Callable[[Pack], Tensor],
    pack: Pack,
    weights: list[torch.nn.Parameter],
    at_once: int | None,
    when_split: WhenSplit,
) -> Tensor:
    """`backward` of a pack, in parts of at most `at_once` episodes, or as memory asks for; their sum."""

    def part(rows: Sequence[int]) -> Tensor:
        with gradients_aside(weights):
            return backward(pack.part(rows[0], rows[-1] + 1))

    length = pack.ids_BT.shape[1]
    return sum_of(run_in_parts(part, range(len(pack.rows)), lambda _: length, EPISODE, at_once, when_split))


def forward_in_parts(forward: Callable[[Pack], list[Tensor]], pack: Pack) -> list[Tensor]:
    """`forward` of a pack, or of parts of it laid one below the other."""
    parts = run_in_parts(
        lambda rows: forward(pack.part(rows[0], rows[-1] + 1)),
        range(len(pack.rows)),
        lambda _: pack.ids_BT.shape[1],
        EPISODE,
    )
    return parts[0] if len(parts) == 1 else [torch.cat(columns) for columns in zip(*parts, strict=True)]


def probe(trainer: PPOTrainer) -> None:
    """Try the update's pass on the longest prompts with answers of full length, so that what does not fit is found
    before the first rollout. Leaves no gradient behind."""
    rows = heapq.nlargest(trainer.pack_size, trainer.rows, key=lambda row: len(str(row["prompt"])))
    filler = trainer.settings.response_length * [trainer.actors.pad_id]
    nothing = [0.0] * len(filler)
    episodes = [Episode(render.prompt(trainer.tokenizer, row), filler, nothing, False, nothing) for row in rows]
    (pack,) = packed(episodes, len(episodes), trainer.actors.pad_id, trainer.actors.device)
    pack.old_logp_BG = noted(pack, [nothing] * len(rows))
    pack.values_BG, pack.advantages_BG, pack.returns_BG = (torch.zeros_like(pack.mask_BG) for _ in range(3))
    trainer.backward_of([pack], float(len(rows) * len(filler)))
    for weight in trainer.weights():
        weight.grad = None


def sum_of(parts: object) -> Tensor:
    return torch.stack(list(parts)).sum(0)  # type: ignore[call-overload,no-any-return]
