"""Rows of stages that a policy comes from, as token ids, to be learnt again beside a stage's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.data.render import Encoded
from pipeline.errors import UserError
from pipeline.plan.sizes import LENGTH

if TYPE_CHECKING:
    from datasets import Dataset

    from pipeline.data.contracts import Row
    from pipeline.stages.stage import Context
    from pipeline.training.sequences import Stored, Tally


def mix_in(
    ctx: Context, tokenizer: Any, own: Stored[Encoded], shares: Mapping[str, float], max_length: int | None
) -> tuple[Dataset, dict[str, int]]:
    """A stage's own rows with those of earlier stages beside them, in so many that each has its share of all; and
    counts of them for the manifest. Where a stage has too few rows, they are taken again.

    Raises UserError as those stages would.
    """
    from datasets import concatenate_datasets

    from pipeline.ppo.batch import take_in_turn

    datasets, counts = [own.dataset], dict[str, int]()
    for name, share in shares.items():
        texts, _ = store(ctx, tokenizer, name, max_length)
        count = max(1, round(len(own) * share / (1 - sum(shares.values()))))
        drawn = take_in_turn(texts, 0, count, f"{ctx.seed}/replay/{name}")
        datasets.append(own.form.write(drawn))
        counts |= {f"{name}_rows_again": count, f"{name}_tokens_again": sum(len(text.ids) for text in drawn)}
    return concatenate_datasets(datasets) if shares else own.dataset, counts


def store(
    ctx: Context, tokenizer: Any, name: str, max_length: int | None = None
) -> tuple[Stored[Encoded], dict[str, int]]:
    """The rows of an earlier stage, cut as that stage cut them and to `max_length` at most, and counts of them for the
    manifest. Documents are in pieces.

    Raises UserError as that stage would.
    """
    from pipeline.training import sequences

    earlier = ctx.data.earlier[name]
    spec, kind = earlier.section, earlier.kind
    limit = kind.arguments(spec).get(LENGTH)
    limits = [length for length in (limit, max_length) if isinstance(length, int)]  # and not auto
    limit = min(limits, default=None)
    fit: Any = partial(sequences.fit_texts, max_length=limit, too_long=spec.data.too_long)
    if kind.every_token:
        fit = partial(_in_pieces, max_length=limit)
    tally = sequences.Tally(name, spec.data.on_bad_row == "skip")
    try:
        stored = sequences.store(earlier.rows, lambda row: kind.encode(tokenizer, row)[0], sequences.TEXTS, tally, fit)
    except UserError as error:
        raise UserError(f"rows of '{name}', to be learnt again in '{ctx.out.name}': {error}") from error
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
