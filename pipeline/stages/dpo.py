"""Direct preference optimization (arXiv 2305.18290): the policy goes on from SFT, and SFT is its reference."""

from __future__ import annotations

from typing import Literal

from pipeline.data.contracts import PREFERENCE
from pipeline.stages.stage import Context, Headline, PolicySpec, Result, Stage


class DPOSpec(PolicySpec):
    kind: Literal["dpo"] = "dpo"
    config_class = "DPOConfig"


def run(spec: DPOSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    from pipeline.data import render
    from pipeline.evaluate import answers, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.stages import invariants, sequences
    from pipeline.stages import trainer as shared
    from pipeline.stages.progress import Snapshots

    def pair(row: dict) -> tuple[render.Reply, render.Reply]:
        return render.pair(tokenizer, row)

    result = Result()
    args = shared.arguments(DPOConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    sequences.askable(ctx, tokenizer)
    skip = spec.data.on_bad_row == "skip"
    rows, train_set, unfit = sequences.encoded(ctx.data.train, pair, ctx, skip)
    _, test_set, unfit_test = sequences.encoded(ctx.data.test or [], pair, ctx, skip)
    train_set, result.counts, result.refused = sequences.fitting_pairs(rows, train_set, args.max_length)
    result.counts["rows_unrendered"] = len(unfit)
    result.refused = [*unfit, *unfit_test, *result.refused]

    # base
    set_seed(ctx.seed)
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)

    # adapter
    model = shared.policy(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)

    # trainer; it copies the adapter as it stands to a frozen one named "ref"
    trainer_class = type("DPOTrainer", (shared.TakesEncoded, DPOTrainer), {})
    trainer = shared.build(
        trainer_class,
        model,
        args=args,
        train_dataset=sequences.reply_pairs(train_set),
        processing_class=tokenizer,
        data_collator=shared.LearntTokens(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
    )
    result.invariants |= invariants.only_adapter_trains(model)
    result.invariants |= invariants.reference_is_the_start(trainer)

    # train, with the held-out numbers before and after
    result.before = scoring.preferences(model, tokenizer, test_set)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")
    trainer.add_callback(Snapshots(ctx, model))
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    result.after = scoring.preferences(model, tokenizer, test_set)
    result.after |= answers.ask(model, tokenizer, ctx, result.samples, "after")

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    shared.save(model, tokenizer, ctx)
    return result


STAGE = Stage(
    section=DPOSpec,
    contract=PREFERENCE,
    sequences=2,
    reference=True,
    raises="preference_accuracy",
    headlines=(
        Headline("preference_accuracy", "better answer is likelier", "higher", percent=True),
        Headline("question_accuracy", "questions answered right", "higher", percent=True),
    ),
    numbers=("preference_accuracy", "preference_margin", "question_accuracy", "stopped"),
    run=run,
)
