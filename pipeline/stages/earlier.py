"""Rows of stages that a policy comes from, as token ids, to be learnt again beside a stage's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.data.render import Encoded
from pipeline.plan.sizes import LENGTH

if TYPE_CHECKING:
    from pipeline.data.contracts import Row
    from pipeline.stages.stage import Context
    from pipeline.training.sequences import Stored, Tally


def store(ctx: Context, tokenizer: Any, name: str) -> tuple[Stored[Encoded], dict[str, int]]:
    """The rows of an earlier stage, cut as that stage cut them, and counts of them for the manifest. Documents are in
    pieces of at most its max_length.

    Raises UserError as that stage would.
    """
    from pipeline.training import sequences

    earlier = ctx.data.earlier[name]
    spec, kind = earlier.section, earlier.kind
    limit = kind.arguments(spec).get(LENGTH)
    limit = limit if isinstance(limit, int) else None  # auto
    fit: Any = partial(sequences.fit_texts, max_length=limit, too_long=spec.data.too_long)
    if kind.every_token:
        fit = partial(_in_pieces, max_length=limit)
    tally = sequences.Tally(name, spec.data.on_bad_row == "skip")
    stored = sequences.store(earlier.rows, lambda row: kind.encode(tokenizer, row)[0], sequences.TEXTS, tally, fit)
    return stored, {f"{name}_rows_again": len(stored), f"{name}_tokens_again": tally.counts["tokens"]}


def _in_pieces(encoded: Iterator[tuple[Row, Encoded]], tally: Tally, max_length: int | None) -> Iterator[Encoded]:
    """Each sequence in pieces of at most max_length. A piece of one token has nothing to predict. Counts: tokens."""
    for _, whole in encoded:
        size = max_length or len(whole.ids)
        for start in range(0, len(whole.ids), size):
            piece = slice(start, start + size)
            if len(whole.ids[piece]) > 1:
                tally.counts["tokens"] += len(whole.ids[piece])
                yield Encoded(whole.ids[piece], whole.labels[piece])
