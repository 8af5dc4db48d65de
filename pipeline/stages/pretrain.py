"""Continued pretraining: next-token loss on whole documents, packed."""

from __future__ import annotations

from typing import Literal

from pipeline.data.contracts import LANGUAGE_MODELING
from pipeline.stages.stage import Context, Headline, PolicySpec, Result, Stage

HOUSE = {"packing": True, "packing_strategy": "bfd_split"}
"""Documents longer than max_length are split rather than cut: nothing of the corpus is lost."""


class PretrainSpec(PolicySpec):
    kind: Literal["pretrain"] = "pretrain"
    config_class = "SFTConfig"


def run(spec: PretrainSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from pipeline.data import render
    from pipeline.evaluate import answers, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.stages import invariants, sequences
    from pipeline.stages import trainer as shared

    def encode(row: dict) -> render.Encoded:
        return render.document(tokenizer, row["text"])

    result = Result()
    args = shared.arguments(SFTConfig, spec, ctx, **HOUSE)
    tokenizer = bases.load_tokenizer(ctx.model)
    sequences.askable(ctx, tokenizer)
    skip = spec.data.on_bad_row == "skip"
    rows, train_set, unfit = sequences.encoded(ctx.data.train, encode, ctx, skip)
    _, test_set, unfit_test = sequences.encoded(ctx.data.test or [], encode, ctx, skip)
    if not args.packing:
        train_set, result.counts, result.refused = sequences.fitted(
            rows, train_set, args.max_length, "cut", stop=not skip
        )
    else:
        result.counts = {"rows": len(train_set), "tokens": sum(len(sequence.ids) for sequence in train_set)}
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
    section=PretrainSpec,
    contract=LANGUAGE_MODELING,
    house=HOUSE,
    every_token=True,
    held_out_loss="corpus_loss",
    headlines=(
        Headline("loss", "corpus loss", "lower"),
        Headline("question_accuracy", "questions answered right", "higher", percent=True),
    ),
    numbers=("loss", "loss_low", "loss_high", "perplexity", "question_accuracy", "stopped"),
    run=run,
)
