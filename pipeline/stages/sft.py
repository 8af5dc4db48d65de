"""Supervised fine-tuning on dialogues: loss on what the assistant says, its end-of-turn token included."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import field_validator

from pipeline.data import render
from pipeline.data.contracts import DEMONSTRATION, Row
from pipeline.errors import complaint
from pipeline.measure.metric import DIALOGUE_LOSS, QUESTION_ACCURACY
from pipeline.stages.stage import Context, PolicySpec, Result, Stage


class SFTSpec(PolicySpec):
    kind: Literal["sft"] = "sft"
    config_class = "SFTConfig"
    replay: dict[str, float] = {}
    """Mix in rows of earlier stages, so that what these taught is kept: {pretrain: 0.1}. Each is a stage that this one
    comes from and that learnt documents or dialogues; the number is the share of its rows among all rows of an epoch.
    They are drawn by the seed from its training rows, never from those it held out, and cut to this max_length."""

    @field_validator("replay")
    @classmethod
    def _leaves_room(cls, replay: dict[str, float]) -> dict[str, float]:
        if not all(share > 0 for share in replay.values()) or sum(replay.values()) >= 1:
            raise complaint("gives shares of all rows: each above 0, and together below 1, as in {pretrain: 0.1}")
        return replay

    def replayed(self) -> dict[str, float]:
        return self.replay

    def mixed_in(self) -> dict[str, float]:
        return self.replay

    def further_parts(self) -> dict[str, Any]:
        return {"replay": self.replay} if self.replay else {}


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [render.demonstration(tokenizer, row)]


def run(spec: SFTSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from pipeline.measure import answers, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.stages import earlier
    from pipeline.training import invariants, sequences
    from pipeline.training import trainer as shared

    result = Result()
    args = shared.arguments(SFTConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    sequences.askable(ctx, tokenizer)
    fit = partial(sequences.fit_texts, max_length=args.max_length, too_long=spec.data.too_long)
    train_set, test_set = sequences.store_both(ctx, spec, lambda row: encode(tokenizer, row)[0], sequences.TEXTS, fit)
    result.counts, result.refused = train_set.tally.counts, [*train_set.tally.refused, *test_set.tally.refused]
    result.invariants |= invariants.ends_are_learnt(train_set, result.counts, tokenizer)
    dataset, replayed = earlier.mix_in(ctx, tokenizer, train_set, spec.replay, args.max_length)
    result.counts |= replayed

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
    trainer = shared.build(SFTTrainer, model, args=args, train_dataset=dataset, processing_class=tokenizer)
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
    section=SFTSpec,
    contract=DEMONSTRATION,
    held_out_loss=DIALOGUE_LOSS,
    headlines=(QUESTION_ACCURACY, replace(DIALOGUE_LOSS, name="loss")),
    numbers=("loss", "loss_low", "loss_high", "perplexity", "question_accuracy", "stopped"),
    encode=encode,
    run=run,
    learns="learns from dialogues to answer as the assistant in them does",
    colour="#21867a",
)
