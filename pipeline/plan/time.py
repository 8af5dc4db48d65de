"""How long a step takes: a roofline with stated utilisation. Plain Python: no torch.

Time = operations / (peak x reached) + bytes of dequantised weights / (bandwidth x STREAMED). The base is frozen, so a
backward pass makes no weight gradients: training costs 4 operations a parameter and token where full fine-tuning costs
6, and 6 with activation checkpointing.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.plan.cards import Card
from pipeline.plan.memory import Model
from pipeline.plan.work import Work

STREAMED = 0.85
"""Share of the bandwidth that reading and writing whole matrices reaches."""
ANSWERED = 0.5
"""Of a row of an earlier stage, the share of tokens that goes through the LM head."""
LAUNCHES = 0.030
"""Seconds of a decoding step below which no card gets: transformers launches each layer's kernels from Python; 24 to
35 ms in public reports of 7B models, here for 32 layers."""


def forward_operations(model: Model, length: int, head_share: float) -> float:
    """Operations of one token in a sequence of so many; `head_share` of the tokens go through the LM head."""
    s = model.shapes
    attention = 2 * s.layers * s.q * length  # causal: half of two products
    products = 2 * (s.linear_parameters + model.adapter.parameters(s))
    return products + attention + 2 * s.embedding_parameters * head_share


def training_operations(model: Model, work: Work, head_share: float) -> float:
    """Forward, backward and what is computed again, for one token."""
    s = model.shapes
    attention = 2 * s.layers * s.q * work.length
    head = 2 * s.embedding_parameters * head_share
    forward = forward_operations(model, work.length, head_share)
    backward = 2 * s.linear_parameters + 4 * model.adapter.parameters(s) + 2.5 * attention + head
    again = (forward - head) * work.checkpointed / s.layers + head  # the fused head always computes its logits again
    return forward + backward + again


def _dequantised(model: Model, passes: float) -> float:
    """Bytes moved to unpack all weights for so many passes: read 4 bits, write and read again in the compute dtype."""
    return passes * model.shapes.linear_parameters * (0.516 + 2 * model.bytes) if model.quantised else 0.0


def step_seconds(model: Model, work: Work, card: Card, head_share: float = 1.0) -> float | None:
    """One forward and backward pass of `work.tokens` tokens; None for a card of which only the memory is known."""
    if card.teraflops is None or card.bandwidth is None:
        return None
    passes = 2 + work.checkpointed / model.shapes.layers
    operations = work.tokens * training_operations(model, work, head_share)
    if work.reference:  # and its forward pass
        operations += work.tokens * forward_operations(model, work.length, head_share)
        passes += 1
    if work.mismatched:  # a forward pass of policy and reference each, of rows about as long
        operations += 2 * work.tokens * forward_operations(model, work.length, head_share)
        passes += 2
    return _seconds(card, operations, _dequantised(model, passes)) + passes * model.shapes.layers * card.layer


def seconds_again(model: Model, work: Work, card: Card, rows: float) -> float | None:
    """So many rows of each earlier stage, learnt again beside the own ones of a trainer of TRL's."""
    if card.teraflops is None or card.bandwidth is None:
        return None
    layers = model.shapes.layers
    passes = len(work.again) * rows / max(1, work.rows_again) * (2 + work.checkpointed / layers)
    operations = rows * _operations_again(model, work)
    return _seconds(card, operations, _dequantised(model, passes)) + passes * layers * card.layer


def _operations_again(model: Model, work: Work) -> float:
    """Of one row of each earlier stage."""
    return sum(length * training_operations(model, replace(work, length=length), ANSWERED) for length in work.again)


def forward_seconds(model: Model, card: Card, tokens: float, length: float, passes: float, head_share: float) -> float:
    """So many tokens, in sequences of `length`, through so many forward passes."""
    operations = tokens * forward_operations(model, round(length), head_share)
    return _seconds(card, operations, _dequantised(model, passes)) + passes * model.shapes.layers * card.layer


def ppo_seconds(model: Model, work: Work, card: Card, epochs: int) -> float | None:
    """One PPO step: sampling `work.episodes` answers, scoring them, and the epochs of updates."""
    if card.teraflops is None or card.bandwidth is None:
        return None
    s = model.shapes
    share = work.answer / work.length
    packs = max(1, work.episodes // work.rows)
    read = work.episodes * (work.answer + (work.length - work.answer) / work.copies)
    tokens = read if work.shares else work.episodes * work.length
    # sampling: each step reads all weights and the cache so far
    weights = model.weights(reward=False)[0] + s.embedding_parameters * model.bytes
    if work.dequantized_rollout or not model.quantised:
        weights += s.linear_parameters * model.bytes
    cache = work.episodes * (work.length - work.answer / 2) * model.cached
    decoding = work.answer * max((weights + cache) / (card.bandwidth * 1e9 * STREAMED), LAUNCHES * s.layers / 32)
    if card.layer:  # a CPU has no arithmetic to spare while it reads
        decoding += forward_seconds(model, card, read, work.length, 0, share) + work.answer * s.layers * card.layer
    scoring = tokens * work.scored * forward_operations(model, work.length, share)
    update = (epochs * tokens) * work.trained * training_operations(model, work, share)
    update += epochs * work.episodes * _operations_again(model, work)
    passes = packs * (work.scored + epochs * work.trained * (2 + work.checkpointed / s.layers))
    beside = passes * s.layers * card.layer
    return decoding + _seconds(card, scoring + update, _dequantised(model, passes)) + beside


def _seconds(card: Card, operations: float, moved: float) -> float:
    assert card.teraflops is not None and card.bandwidth is not None
    return operations / (card.teraflops * 1e12 * card.reached) + moved / (card.bandwidth * 1e9 * STREAMED)
