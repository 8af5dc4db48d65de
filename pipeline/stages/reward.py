"""The reward model: Bradley-Terry on comparisons, the policy's trunk under a new one-label score head."""

from __future__ import annotations

from typing import Literal

from pipeline.data.contracts import PREFERENCE
from pipeline.stages.stage import Context, Headline, Result, Stage, StageSpec


class RewardSpec(StageSpec):
    kind: Literal["reward"] = "reward"
    config_class = "RewardConfig"


def run(spec: RewardSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    from pipeline.data import render
    from pipeline.evaluate import scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.stages import invariants, sequences
    from pipeline.stages import trainer as shared

    def pair(row: dict) -> tuple[list[int], list[int]]:
        return render.conversation(tokenizer, row, "chosen"), render.conversation(tokenizer, row, "rejected")

    result = Result()
    args = shared.arguments(RewardConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    skip = spec.data.on_bad_row == "skip"
    rows, train_set, unfit = sequences.encoded(ctx.data.train, pair, ctx, skip)
    _, test_set, unfit_test = sequences.encoded(ctx.data.test or [], pair, ctx, skip)
    train_set, result.counts, result.refused = sequences.fitting_pairs(rows, train_set, args.max_length)
    result.counts["rows_unrendered"] = len(unfit)
    result.refused = [*unfit, *unfit_test, *result.refused]

    # base
    set_seed(ctx.seed)
    base = bases.load_base(ctx.model, tokenizer, reward=True)
    result.base_digest = bases.frozen_digest(base)

    # adapter
    parent = ctx.parents.get("policy")
    if parent is None:
        model = adapters.fresh(base, ctx.model.lora, reward=True)
    else:
        model = adapters.transplanted(base, parent.adapter)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    head_at_start = invariants.head(model)

    # trainer
    rows = sequences.scored_pairs(train_set)
    trainer = shared.build(RewardTrainer, model, args=args, train_dataset=rows, processing_class=tokenizer)
    result.invariants |= invariants.only_adapter_trains(model, head=True)

    # train, with the held-out numbers before and after
    result.before = scoring.reward_model(model, tokenizer, test_set)
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
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
    headlines=(Headline("accuracy", "comparisons ranked right", "higher", percent=True),),
    numbers=("accuracy", "margin", "over_longer", "over_longer_low", "over_longer_high"),
    run=run,
)
