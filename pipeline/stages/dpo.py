"""Direct preference optimization (arXiv 2305.18290): the policy goes on from SFT, and SFT is its reference."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from pydantic import field_validator

from pipeline.data import render
from pipeline.data.contracts import PREFERENCE, Row
from pipeline.errors import complaint
from pipeline.measure.metric import PREFERENCE_ACCURACY, QUESTION_ACCURACY
from pipeline.stages.stage import Context, PolicySpec, Result, Stage


class DPOSpec(PolicySpec):
    kind: Literal["dpo"] = "dpo"
    config_class = "DPOConfig"
    replay: dict[str, float] = {}
    """Learn rows of earlier stages again in every step, so that what these taught is kept: {sft: 0.1}. Each is a stage
    that this one comes from and that learnt documents or dialogues; the number is how much the mean loss of its tokens
    counts beside DPO's loss. A step takes as many of its rows as it has pairs, in an order that follows from the seed:
    its training rows, never those it held out, cut to this max_length."""

    @field_validator("replay")
    @classmethod
    def _counts(cls, replay: dict[str, float]) -> dict[str, float]:
        if not all(0 < weight < math.inf for weight in replay.values()):
            raise complaint("gives weights of losses: each above 0, as in {sft: 0.1}")
        return replay

    def replayed(self) -> dict[str, float]:
        return self.replay

    def further_parts(self) -> dict[str, Any]:
        return {"replay": self.replay} if self.replay else {}


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [answer.sequence() for answer in render.pair(tokenizer, row)]


def run(spec: DPOSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    from pipeline.measure import answers, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.ppo.keeping import Kept, Replay
    from pipeline.stages import earlier
    from pipeline.training import invariants, sequences
    from pipeline.training import trainer as shared
    from pipeline.training.progress import Snapshots

    result = Result()
    args = shared.arguments(DPOConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    sequences.askable(ctx, tokenizer)
    pair = partial(render.pair, tokenizer)
    fit = partial(sequences.fit_pairs, max_length=args.max_length)
    train_set, test_set = sequences.store_both(ctx, spec, pair, sequences.REPLY_PAIRS, fit)
    result.counts, result.refused = train_set.tally.counts, [*train_set.tally.refused, *test_set.tally.refused]
    kept = []
    for name, weight in spec.replay.items():
        texts, counts = earlier.store(ctx, tokenizer, name, args.max_length)
        result.counts |= counts
        kept.append(Kept(f"{name}_loss", weight, texts))

    # base
    set_seed(ctx.seed)
    ctx.tell_loading()
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
        train_dataset=train_set.dataset,
        processing_class=tokenizer,
        data_collator=shared.LearntTokens(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
    )
    result.invariants |= invariants.only_adapter_trains(model)
    result.invariants |= invariants.reference_is_the_start(trainer)

    # train, with the held-out numbers before and after
    ctx.tell_measuring("before")
    result.before = scoring.preferences(model, tokenizer, test_set)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")
    trainer.add_callback(Snapshots(ctx, model))
    if kept:
        trainer.add_callback(Replay(trainer, kept, tokenizer.pad_token_id))
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    ctx.tell_measuring("after")
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
    headlines=(PREFERENCE_ACCURACY, QUESTION_ACCURACY),
    numbers=("preference_accuracy", "preference_margin", "question_accuracy", "stopped"),
    encode=encode,
    run=run,
    learns="learns from pairs of answers to prefer the better one",
    colour="#d9822b",
)
