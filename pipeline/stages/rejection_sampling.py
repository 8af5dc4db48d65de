"""Rejection sampling (Llama 2, arXiv 2307.09288; RAFT, arXiv 2304.06767): SFT on its own best answers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field

from pipeline.data.contracts import PROMPT_ONLY
from pipeline.errors import complaint
from pipeline.ppo.rejection_settings import RejectionSettings
from pipeline.stages import sft
from pipeline.stages.ppo import HEADLINES, NUMBERS, PaidSpec, encode, read_sources
from pipeline.stages.stage import Context, Result, Stage


class RejectionSpec(PaidSpec):
    kind: Literal["rejection_sampling"] = "rejection_sampling"
    config_class = "SFTConfig"
    sampling_: RejectionSettings = Field(default=RejectionSettings(), alias="sampling")
    """How answers are sampled, and which of them are kept."""

    def samples_first(self) -> RejectionSettings:
        return self.sampling_

    def further_parts(self) -> dict[str, Any]:
        return {**super().further_parts(), "sampling": self.sampling_.model_dump()}

    def check_among(self, stages: dict[str, Stage], *place: str) -> None:
        super().check_among(stages, *place)
        if self.environment is not None:
            problem = "rejection sampling keeps answers of one turn only. Remove it, or use a grpo stage"
            raise complaint(problem, *place, "environment")
        checked = all(term.truth for term in self.reward_terms() if term.weight)
        if checked and self.sampling_.threshold is None:
            raise complaint(
                "is missing: the reward is the checked truth, and the best of wrong answers is wrong too. Say "
                "threshold: 1 to keep right answers only",
                *place,
                "sampling",
                "threshold",
            )


def run(spec: RejectionSpec, ctx: Context) -> Result:
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from pipeline.measure import answers
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.models.forward import plain_on_cpu
    from pipeline.ppo import actors as roles
    from pipeline.ppo import answering, engine, held_out, loop, rejection, rewards
    from pipeline.ppo import invariants as handovers
    from pipeline.training import invariants, sequences
    from pipeline.training import trainer as shared

    result = Result()
    engine.refuse_several(spec.rollout, ctx)
    args, settings = shared.arguments(SFTConfig, spec, ctx), spec.sampling_
    tokenizer = bases.load_tokenizer(ctx.model)
    limits = args.max_length, settings.response_length, spec.data.on_bad_row == "skip"
    ctx, models, result.counts, result.refused = loop.prepare(ctx, tokenizer, *limits)
    sources = read_sources(spec, models)

    # base
    set_seed(ctx.seed)
    ctx.tell_loading()
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)

    # adapters: the policy, itself again as reference, the reward models
    model = shared.policy(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    heads = loop.add_roles(model, models, settings)
    actors = roles.Actors(model, tokenizer.pad_token_id, settings.temperature, settings.critic, heads)
    for name, parent in models.items():
        result.invariants |= handovers.scores_as_it_did(actors, rewards.adapter_name(name), parent, ctx.model.dtype)
    result.invariants |= handovers.one_copy_of_the_base(model)

    # before: the held-out numbers
    sampler = answering.Answering(actors, tokenizer, sources, settings, ctx.seed, 2 * args.per_device_train_batch_size)
    sampler.engine = engine.start(ctx, spec.rollout, settings, model, tokenizer, result.base_digest)
    ctx.tell_measuring("before")
    start = held_out.ask(sampler, ctx.data.test or [])
    result.before = held_out.numbers(start)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")

    if ctx.trained:  # only to be measured again
        adapters.restore(model, ctx.trained)
    else:
        # answers, and those of them that are kept
        checkpoint = ctx.claim()
        with plain_on_cpu(model):
            found = rejection.sample_or_find(sampler, ctx.data.train, settings, ctx.out, ctx.fingerprint)
        kept, counts = found
        fit = partial(sequences.fit_texts, max_length=args.max_length, too_long=spec.data.too_long)
        tally = sequences.Tally(ctx.out.name, skip=True)
        train_set = sequences.store(kept, lambda row: sft.encode(tokenizer, row)[0], sequences.TEXTS, tally, fit)
        result.counts |= {**tally.counts, **counts}
        result.refused += tally.refused
        result.invariants |= invariants.ends_are_learnt(train_set, result.counts, tokenizer)
        if args.packing:
            result.invariants |= invariants.packed_rows_are_apart(model, ctx.out.name, train_set[0].ids)

        # train on them, as sft does
        trainer = shared.build(
            SFTTrainer, model, args=args, train_dataset=train_set.dataset, processing_class=tokenizer
        )
        result.invariants |= invariants.only_adapter_trains(model)
        result.counts |= shared.train(trainer, replace(ctx, claim=lambda: checkpoint), spec)
        result.invariants |= invariants.processes_agree(adapters.trainable(model))

    # after
    sampler.step = 1
    ctx.tell_measuring("after")
    end = held_out.ask(sampler, ctx.data.test or [])
    result.after = held_out.numbers(end) | held_out.gain(start, end)
    result.invariants |= engine.end(sampler.engine)
    actors.act_as(roles.POLICY)
    result.after |= answers.ask(model, tokenizer, ctx, result.samples, "after")

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    for name in adapters.others(model):
        model.delete_adapter(name)
    shared.save(model, tokenizer, ctx)
    return result


STAGE = Stage(
    section=RejectionSpec,
    contract=PROMPT_ONLY,
    raises="reward",
    headlines=HEADLINES,
    numbers=NUMBERS,
    encode=encode,
    run=run,
    learns="answers by itself several times, is scored, and learns from its best answers as from demonstrations",
    colour="#b8860b",
)
