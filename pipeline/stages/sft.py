"""Supervised fine-tuning on dialogues: loss on what the assistant says, its end-of-turn token included."""

from __future__ import annotations

from typing import Literal

from pipeline.data.contracts import DEMONSTRATION
from pipeline.stages.stage import Context, Headline, PolicySpec, Result, Stage


class SFTSpec(PolicySpec):
    kind: Literal["sft"] = "sft"
    config_class = "SFTConfig"


def run(spec: SFTSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from pipeline.data import render
    from pipeline.evaluate import answers, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.stages import invariants, sequences
    from pipeline.stages import trainer as shared

    def encode(row: dict) -> render.Encoded:
        return render.demonstration(tokenizer, row)

    result = Result()
    args = shared.arguments(SFTConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    sequences.askable(ctx, tokenizer)
    skip = spec.data.on_bad_row == "skip"
    rows, train_set, unfit = sequences.encoded(ctx.data.train, encode, ctx, skip)
    _, test_set, unfit_test = sequences.encoded(ctx.data.test or [], encode, ctx, skip)
    train_set, result.counts, result.refused = sequences.fitted(
        rows, train_set, args.max_length, spec.data.too_long, stop=not skip
    )
    result.invariants |= invariants.ends_are_learnt(train_set, result.counts, tokenizer)
    result.counts["rows_unrendered"] = len(unfit)
    result.refused = [*unfit, *unfit_test, *result.refused]

    # base
    set_seed(ctx.seed)
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)

    # adapter
    model = shared.policy(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    if not ctx.parents:
        result.invariants |= invariants.starts_as_identity(model, train_set[0].ids)

    # trainer
    trainer = shared.build(
        SFTTrainer, model, args=args, train_dataset=sequences.demonstrations(train_set), processing_class=tokenizer
    )
    result.invariants |= invariants.only_adapter_trains(model)

    # train, with the held-out numbers before and after
    result.before = scoring.language_model(model, tokenizer, test_set)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    result.after = scoring.language_model(model, tokenizer, test_set)
    result.after |= answers.ask(model, tokenizer, ctx, result.samples, "after")

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    shared.save(model, tokenizer, ctx)
    return result


STAGE = Stage(
    section=SFTSpec,
    contract=DEMONSTRATION,
    held_out_loss="dialogue_loss",
    headlines=(
        Headline("question_accuracy", "questions answered right", "higher", percent=True),
        Headline("loss", "dialogue loss", "lower"),
    ),
    numbers=("loss", "loss_low", "loss_high", "perplexity", "question_accuracy", "stopped"),
    run=run,
)
