"""Kahneman-Tversky optimization (arXiv 2402.01306): one answer at a time, with thumbs up or down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import field_validator

from pipeline.data import render
from pipeline.data.contracts import RATED, Row
from pipeline.errors import UserError, complaint
from pipeline.language.say import kept
from pipeline.measure.metric import QUESTION_ACCURACY, Metric
from pipeline.plan.sizes import AUTO, BATCH, TOKENS
from pipeline.stages.stage import Context, PolicySpec, Result, Stage

IMBALANCE = 1.33
"""Thumbs up for each thumbs down, both times their weights, are best between 1 and this (the paper's eq. 8, TRL)."""


class KTOSpec(PolicySpec):
    kind: Literal["kto"] = "kto"
    config_class = "KTOConfig"

    @field_validator("train")
    @classmethod
    def _trl_can(cls, train: dict[str, Any]) -> dict[str, Any]:
        loss = train.get("loss_type", "kto")
        if not any(train.get(f"{which}desirable_weight", 1) for which in ("", "un")):
            raise complaint("and undesirable_weight are 0: nothing would be learnt", "desirable_weight")
        if train.get("sync_ref_model"):
            raise complaint("TRL cannot do it with an adapter: leave it out", "sync_ref_model")
        if train.get(TOKENS):
            raise complaint(f"is not for kto, whose batches have so many rows: say {BATCH} instead", TOKENS)
        if loss != "kto":
            return train
        if (rows := train.get(BATCH, 8)) == AUTO or rows < 2:
            why = "loss_type kto estimates its KL term from the rows of a batch"
            raise complaint(f"is {rows}; {why}: write a number from 2 up, the same on every card", BATCH)
        if (order := train.get("train_sampling_strategy", "sequential")) != "sequential":
            why = "loss_type kto couples the rows of a batch, shuffled once before"
            raise complaint(f"is {order!r}; {why}: write sequential for this stage", "train_sampling_strategy")
        return train

    def mismatches(self) -> bool:
        return bool(self.train.get("loss_type", "kto") == "kto")

    def check_rows(self, train: Sequence[Row], test: Sequence[Row] | None) -> None:
        """Raises UserError where all answers have the same label."""
        labels = {row["label"] for row in train}
        if len(labels) < 2:
            told, other = ("up", "down") if True in labels else ("down", "up")
            raise UserError(
                f"{train[0]['_place']}: every answer has thumbs {told}, and kto learns from both. Add answers with "
                f"thumbs {other}, or use sft for good answers alone"
            )

    def warn_rows(self, train: Sequence[Row], test: Sequence[Row] | None) -> list[str]:
        """Where neither label's weight makes up for how rare it is: the weights that would, as TRL recommends them. And
        where held-out answers of one label cannot show which answers gain more."""
        alike = test and len({row["label"] for row in test}) < 2
        warnings = [kept("the held-out answers all have the same label, so the AUC has no value")] if alike else []
        up = sum(row["label"] for row in train)
        down = len(train) - up
        for_up, for_down = (float(self.train.get(f"{which}desirable_weight", 1.0)) for which in ("", "un"))
        if not (up and down) or up == down or 1 <= up * for_up / max(down * for_down, 1e-9) <= IMBALANCE:
            return warnings
        more, less = down * for_down / up, up * for_up / down
        return [
            *warnings,
            kept(
                "{up} answers have thumbs up and {down} thumbs down; set either desirable_weight from {more} to {most} "
                "or undesirable_weight from {least} to {less}, not both",
                up=up,
                down=down,
                more=f"{more:.2f}",
                most=f"{more * IMBALANCE:.2f}",
                least=f"{less / IMBALANCE:.2f}",
                less=f"{less:.2f}",
            ),
        ]


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [render.reply(tokenizer, row, "completion").sequence()]


def run(spec: KTOSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import KTOConfig, KTOTrainer

    from pipeline.measure import answers, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.training import invariants, rated, sequences
    from pipeline.training import trainer as shared
    from pipeline.training.progress import Snapshots

    def rate(row: Row) -> rated.Rated:
        return rated.Rated(render.reply(tokenizer, row, "completion"), row["label"])

    def likelihoods() -> list[float]:
        return scoring.log_likelihoods(model, tokenizer, [item.reply.sequence() for item in test_set])

    result = Result()
    args = shared.arguments(KTOConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    sequences.askable(ctx, tokenizer)
    for warning in spec.warn_rows(ctx.data.train, ctx.data.test):
        print(f"  {warning}", flush=True)
    shuffled = replace(ctx, data=replace(ctx.data, train=rated.shuffle(ctx.data.train, ctx.seed)))
    batch = args.per_device_train_batch_size if spec.mismatches() else None
    fit = partial(rated.couple, max_length=args.max_length, batch=batch)
    train_set, test_set = sequences.store_both(shuffled, spec, rate, rated.form(batch is not None), fit)
    result.counts, result.refused = train_set.tally.counts, [*train_set.tally.refused, *test_set.tally.refused]
    good = [item.good for item in test_set]

    # base
    set_seed(ctx.seed)
    ctx.tell_loading()
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)

    # adapter
    model = shared.policy(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)

    # trainer; it copies the adapter as it stands to a frozen one named "ref"
    trainer = shared.build(
        type("KTOTrainer", (shared.TakesEncoded, KTOTrainer), {}),
        model,
        args=args,
        train_dataset=train_set.dataset,
        processing_class=tokenizer,
        data_collator=rated.LearntAnswers(tokenizer.pad_token_id, args.max_length, args.pad_to_multiple_of),
    )
    result.invariants |= invariants.only_adapter_trains(model)
    result.invariants |= invariants.rated_reference_is_the_start(trainer)

    # train, with the held-out numbers before and after
    ctx.tell_measuring("before")
    at_start = likelihoods()
    result.before = scoring.ratings(at_start, at_start, good, args.beta)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")
    trainer.add_callback(Snapshots(ctx, model))
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    ctx.tell_measuring("after")
    result.after = scoring.ratings(likelihoods(), at_start, good, args.beta)
    result.after |= answers.ask(model, tokenizer, ctx, result.samples, "after")

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    shared.save(model, tokenizer, ctx)
    return result


STAGE = Stage(
    section=KTOSpec,
    contract=RATED,
    reference=True,
    raises="reward_auc",
    headlines=(Metric("reward_auc", "good answers gain more than bad ones, AUC"), QUESTION_ACCURACY),
    numbers=("reward_auc", "reward_margin", "sign_accuracy", "question_accuracy", "stopped"),
    encode=encode,
    run=run,
    learns="learns from answers with thumbs up or down to give more of the good ones",
    colour="#b5495b",
)
