"""PPO's passes when memory does not hold a pack: the same in halves, with the same sums."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pipeline.data import render
from pipeline.errors import UserError
from pipeline.models.halving import freed, out_of_memory
from pipeline.models.sampling import Episode
from pipeline.ppo.actors import noted, packed

if TYPE_CHECKING:
    from pipeline.ppo.actors import Pack
    from pipeline.ppo.trainer import PPOTrainer

Tensor = torch.Tensor
Told = Callable[[int, int], None]
"""Told the episodes that did not fit and those that are tried next."""


def backward_in_parts(
    backward: Callable[[Pack], Tensor], pack: Pack, weights: list[torch.nn.Parameter], at_once: int | None, told: Told
) -> Tensor:
    """`backward` of a pack, or of its halves; the gradients that were there are kept aside until it is through, so
    that a pass that fails half-way leaves nothing of itself. Gives the sum of what the parts give.

    Raises UserError if one episode does not fit.
    """
    if at_once and len(pack.rows) > at_once:
        return sum_of(backward_in_parts(backward, half, weights, at_once, told) for half in pack.halves())
    aside = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    result = None
    try:
        result = backward(pack)
    except RuntimeError as error:
        _check_can_split(error, pack)
        for weight in weights:
            weight.grad = None
    for weight, gradient in zip(weights, aside, strict=True):
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    if result is not None:
        return result
    freed()
    left = len(pack.rows) // 2
    told(len(pack.rows), left)
    return sum_of(backward_in_parts(backward, half, weights, left, told) for half in pack.halves())


def forward_in_parts(forward: Callable[[Pack], list[Tensor]], pack: Pack) -> list[Tensor]:
    """`forward` of a pack, or of its halves laid one below the other."""
    try:
        return forward(pack)
    except RuntimeError as error:
        _check_can_split(error, pack)
    freed()
    parts = [forward_in_parts(forward, half) for half in pack.halves()]
    return [torch.cat(both) for both in zip(*parts, strict=True)]


def sampled(sample: Callable[[int], list[Episode]], at_once: int, told: Told) -> tuple[list[Episode], int]:
    """Answers sampled `at_once` together, or from the start again with half as many; and how many it came to."""
    while True:
        try:
            return sample(at_once), at_once
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if at_once == 1:
                raise UserError(
                    "one answer does not fit in memory even alone, without gradients. Lower response_length, set "
                    "dequantize_rollout: false, leave out the longest prompts, or take a smaller model; "
                    "`onebase plan` shows what each part needs."
                ) from error
        freed()
        told(at_once, at_once // 2)
        at_once //= 2


def again_when_full(step: Callable[[], object]) -> None:
    """An optimizer's step, and once more where memory ran out, after what lies unused has been given back. A fused step
    changes weights and state in place, so what it can lack memory for comes before the first change."""
    try:
        step()
        return
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    freed()
    step()


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


def _check_can_split(error: RuntimeError, pack: Pack) -> None:
    if not out_of_memory(error):
        raise error
    if len(pack.rows) == 1:
        length = pack.ids_BT.shape[1]
        raise UserError(
            f"one episode of {length} tokens does not fit in memory even alone. Lower response_length or max_length to "
            f"{max(1, length // 2)} together, set gradient_checkpointing: true, or take a smaller model; "
            "`onebase plan` shows what each part needs."
        ) from error
