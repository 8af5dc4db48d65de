"""What a stage puts through the model, at the most."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.sizes import ANSWER_TOKENS


@dataclass(frozen=True)
class Work:
    """What a stage puts through the model at a time."""

    rows: int
    """Sequences of a forward pass that keeps gradients; a pair counts as two."""
    length: int
    """Tokens of the longest sequence, prompt and answer."""
    checkpointed: int
    """Layers with activation checkpointing, the first ones."""
    packed: bool = False
    """Rows are laid end to end in one, with a mask of (rows x length) squared."""
    masked: bool = True
    """Attention is given an explicit mask (sdpa and padding); flash attention takes none."""
    eager: bool = False
    """Attention keeps its scores: for each head a matrix of rows x length x length."""
    segments: bool = False
    """Rows lie end to end in the layers, as if none began alike; only batches for sampling have a mask."""
    accumulates: bool = True
    """An optimizer step has several passes: the gradients of those before wait aside while a pass makes its own."""
    optimizer_bytes: float = 8.0
    """Of the optimizer's state for each trained parameter."""
    trained: int = 1
    frozen: int = 0
    """Adapters in memory, trained (float32) and frozen (compute dtype)."""
    score_head: bool = False
    """A score head is trained; there is no LM head."""
    reference: bool = False
    """Each batch goes through the adapter as it was at the start as well, one of the frozen ones."""
    mismatched: int = 0
    """Most tokens of a prompt with another row's answer, where a stage puts these through as well (kto)."""
    answer: int = 0
    episodes: int = 0
    """Of a stage that samples (ppo): most tokens of an answer, and answers sampled at once."""
    copies: int = 1
    """Answers to one prompt, which is read once for all of them when they are sampled."""
    shares: bool = False
    """It is read once for all of them in the other passes too, as batches are packed."""
    scored: int = 0
    """Passes over an answer that score it, before it is learnt from."""
    dequantized_rollout: bool = False
    engine: int = 0
    """Bytes that a program which samples in its place takes while it does."""
    engine_asleep: int = 0
    """Bytes that it keeps while the stage trains."""
    again: tuple[int, ...] = ()
    """Tokens of the longest row of each earlier stage that its updates learn again: of a stage that samples, as many
    rows as episodes."""
    rows_again: int = 0
    """Rows of such a pass, where they are fewer than its own."""
    sampled: Work | None = None
    """Of a stage that samples all its answers before it trains: what it puts through the model then."""
    held_out: int = 0
    """Tokens of the longest held-out row; it is scored whole, whatever the rows of training are cut to."""
    answering: int = ANSWER_TOKENS
    """Tokens of the questions answered at once."""
    evaluates: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def scores(self) -> int:
        """Of eager attention for each head, in the largest pass."""
        return self.tokens * self.span if self.eager else 0

    @property
    def span(self) -> int:
        """Tokens that a row of the attention mask has."""
        return self.tokens if self.packed else self.length
