"""The reward model: Bradley-Terry on comparisons, the policy's trunk under a new score head, or several."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field

from pipeline.data import render
from pipeline.data.contracts import PREFERENCE, Row
from pipeline.measure.metric import Metric
from pipeline.stages.stage import Context, Result, Stage, StageSpec

OF_HEADS = ("deviation", "deviation_swapped", "agreed_over_disputed")
SCALED = 128
"""Training pairs, evenly spaced, of which the scale of the scores is told."""


class RewardSpec(StageSpec):
    kind: Literal["reward"] = "reward"
    config_class = "RewardConfig"
    heads: int = Field(default=1, ge=1)
    """Score heads on the one trunk; the score is their mean. Each starts from a draw of its own and learns its own
    bootstrap of the pairs (weights from Poisson(1), drawn from the seed), so that heads differ where pairs leave a
    choice."""

    @property
    def score_heads(self) -> int:
        return self.heads

    def further_parts(self) -> dict[str, Any]:
        return {"heads": self.heads} if self.heads > 1 else {}


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [render.Encoded.without_loss(render.conversation(tokenizer, row, key)) for key in ("chosen", "rejected")]


def run(spec: RewardSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from pipeline.measure import heads, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.training import bootstrap, invariants, sequences
    from pipeline.training import trainer as shared

    def pair(row: Row) -> tuple[list[int], list[int]]:
        chosen, rejected = encode(tokenizer, row)
        return chosen.ids, rejected.ids

    result = Result()
    args = shared.arguments(RewardConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    fit = partial(sequences.fit_pairs, max_length=args.max_length)
    train_set, test_set = sequences.store_both(ctx, spec, pair, sequences.SCORED_PAIRS, fit)
    result.counts, result.refused = train_set.tally.counts, [*train_set.tally.refused, *test_set.tally.refused]

    # base
    set_seed(ctx.seed)
    ctx.tell_loading()
    base = bases.load_base(ctx.model, tokenizer, num_labels=spec.heads)
    result.base_digest = bases.frozen_digest(base)

    # adapter
    model = shared.headed(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    head_at_start = invariants.head(model)

    # trainer
    trainer_class: type = RewardTrainer
    pairs: dict[str, Any] = {"train_dataset": train_set.dataset}
    if spec.heads > 1:
        pairs["train_dataset"] = bootstrap.draw_weights(train_set.dataset, spec.heads, ctx.seed)
        pairs["data_collator"] = bootstrap.WeighedPairs(tokenizer.pad_token_id, args.pad_to_multiple_of)
        trainer_class = type("RewardTrainer", (bootstrap.LearnsByHeads, RewardTrainer), {})
    trainer = shared.build(trainer_class, model, args=args, processing_class=tokenizer, **pairs)
    result.invariants |= invariants.only_adapter_trains(model, head=True)

    # train, with the held-out numbers before and after
    ctx.tell_measuring("before")
    result.before = scoring.reward_model(model, tokenizer, test_set)
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    ctx.tell_measuring("after")
    swapped = render.swapped(tokenizer, ctx.data.test or []) if spec.heads > 1 else []
    result.after = scoring.reward_model(model, tokenizer, test_set, swapped)

    # what later stages need to know of the score's scale, of training pairs: held-out ones may change without training
    some = [train_set[place] for place in range(0, len(train_set), -(-len(train_set) // SCALED))]
    scores_NK = scoring.head_scores(model, tokenizer, [ids for pair in some for ids in pair], together=2)
    margins_P = (scores_NK[0::2] - scores_NK[1::2]).mean(1)
    result.head_means = scores_NK.mean(0).tolist() if spec.heads > 1 else []
    result.length_slope = heads.length_slope(margins_P, [len(better) - len(worse) for better, worse in some])

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    result.invariants |= invariants.head_was_trained(model, head_at_start)
    result.invariants |= invariants.probe(model, tokenizer, (test_set or train_set)[:2])
    shared.save(model, tokenizer, ctx)
    result.invariants |= invariants.reloads_alike(model, tokenizer, ctx.out.adapter, (test_set or train_set)[:4])
    return result


STAGE = Stage(
    section=RewardSpec,
    contract=PREFERENCE,
    score_head=True,
    sequences=2,
    headlines=(Metric("accuracy", "comparisons ranked right", unit="%"),),
    numbers=(
        *("accuracy", "margin", "over_longer", "over_longer_low", "over_longer_high"),
        *(f"{name}{end}" for name in OF_HEADS for end in ("", "_low", "_high")),
    ),
    encode=encode,
    run=run,
    learns="learns from pairs of answers to score the better one higher",
    colour="#9a7a1c",
)
