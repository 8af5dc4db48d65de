"""Continued pretraining: next-token loss on whole documents, packed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import field_validator

from pipeline.data import render
from pipeline.data.contracts import LANGUAGE_MODELING, Row
from pipeline.errors import complaint
from pipeline.measure.metric import CORPUS_LOSS, QUESTION_ACCURACY
from pipeline.plan.sizes import BATCH, TOKENS
from pipeline.stages.stage import Context, PolicySpec, Result, Stage

HOUSE = {"packing": True, "packing_strategy": "bfd_split"}
"""Documents longer than max_length are split rather than cut: nothing of the corpus is lost."""


class PretrainSpec(PolicySpec):
    kind: Literal["pretrain"] = "pretrain"
    config_class = "SFTConfig"

    @field_validator("train")
    @classmethod
    def _packs(cls, train: dict[str, Any]) -> dict[str, Any]:
        if train.get(TOKENS) and train.get("packing", HOUSE["packing"]):
            problem = "is for batches of whole rows, and this stage packs its rows: set packing: false"
            raise complaint(f"{problem}, or use {BATCH} instead, which counts packed rows of max_length tokens", TOKENS)
        return train


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [render.document(tokenizer, row["text"])]


def run(spec: PretrainSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from pipeline.measure import answers, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.training import invariants, sequences
    from pipeline.training import trainer as shared

    result = Result()
    args = shared.arguments(SFTConfig, spec, ctx, **HOUSE)
    tokenizer = bases.load_tokenizer(ctx.model)
    sequences.askable(ctx, tokenizer)
    fit = sequences.keep_whole
    if not args.packing:
        fit = partial(sequences.fit_texts, max_length=args.max_length, too_long="cut")
    train_set, test_set = sequences.store_both(ctx, spec, lambda row: encode(tokenizer, row)[0], sequences.TEXTS, fit)
    result.counts, result.refused = train_set.tally.counts, [*train_set.tally.refused, *test_set.tally.refused]

    # base
    set_seed(ctx.seed)
    ctx.tell_loading()
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)

    # adapter
    model = shared.policy(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    if not ctx.parents:
        result.invariants |= invariants.starts_as_identity(model, train_set[0].ids)

    if args.packing:
        result.invariants |= invariants.packed_rows_are_apart(model, ctx.out.name, train_set[0].ids)

    # trainer
    trainer = shared.build(SFTTrainer, model, args=args, train_dataset=train_set.dataset, processing_class=tokenizer)
    result.invariants |= invariants.only_adapter_trains(model)

    # train, with the held-out numbers before and after
    ctx.tell_measuring("before")
    result.before = scoring.language_model(model, tokenizer, test_set)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    ctx.tell_measuring("after")
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
    held_out_loss=CORPUS_LOSS,
    headlines=(replace(CORPUS_LOSS, name="loss"), QUESTION_ACCURACY),
    numbers=("loss", "loss_low", "loss_high", "perplexity", "question_accuracy", "stopped"),
    encode=encode,
    run=run,
    learns="reads documents, so that it knows what stands in them",
    colour="#4c7fc4",
)
