"""The reward model: Bradley-Terry on comparisons, the policy's trunk under a new one-label score head."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pipeline.data import render
from pipeline.data.contracts import PREFERENCE, Row
from pipeline.measure.metric import Metric
from pipeline.stages.stage import Context, Result, Stage, StageSpec


class RewardSpec(StageSpec):
    kind: Literal["reward"] = "reward"
    config_class = "RewardConfig"


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [render.Encoded.without_loss(render.conversation(tokenizer, row, key)) for key in ("chosen", "rejected")]


def run(spec: RewardSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from pipeline.measure import scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.training import invariants, sequences
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
    base = bases.load_base(ctx.model, tokenizer, num_labels=1)
    result.base_digest = bases.frozen_digest(base)

    # adapter
    model = shared.headed(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    head_at_start = invariants.head(model)

    # trainer
    trainer = shared.build(RewardTrainer, model, args=args, train_dataset=train_set.dataset, processing_class=tokenizer)
    result.invariants |= invariants.only_adapter_trains(model, head=True)

    # train, with the held-out numbers before and after
    ctx.tell_measuring("before")
    result.before = scoring.reward_model(model, tokenizer, test_set)
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    ctx.tell_measuring("after")
    result.after = scoring.reward_model(model, tokenizer, test_set)

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
    numbers=("accuracy", "margin", "over_longer", "over_longer_low", "over_longer_high"),
    encode=encode,
    run=run,
    learns="learns from pairs of answers to score the better one higher",
    colour="#9a7a1c",
)
