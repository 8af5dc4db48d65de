"""Proximal policy optimization (arXiv 1707.06347): policy, reference, reward and critic are adapters of one base."""

from __future__ import annotations

from pipeline.data.contracts import PROMPT_ONLY
from pipeline.stages.stage import Context, Headline, Result, Stage, StageSpec


def run(spec: StageSpec, ctx: Context) -> Result:
    from transformers import set_seed

    from pipeline.evaluate import answers
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.models.forward import checkpoint_first
    from pipeline.ppo import actors as roles
    from pipeline.ppo import held_out, loop, rewards
    from pipeline.ppo import invariants as handovers
    from pipeline.ppo.settings import PPOSettings
    from pipeline.ppo.trainer import PPOTrainer
    from pipeline.training import invariants, sequences
    from pipeline.training import trainer as shared

    result = Result()
    settings = PPOSettings(**spec.train)
    sources = [rewards.source(term.source, term.weight, term.truth) for term in spec.reward_terms()]
    ctx = loop.fill_columns(ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    models = {parent.name: parent for role, parent in ctx.parents.items() if role.startswith("reward")}
    for parent in models.values():
        handovers.same_tokenizer(tokenizer, parent)
    loop.warn_of_length(models)
    sequences.askable(ctx, tokenizer)
    skip, config = spec.data.on_bad_row == "skip", bases.load_config(ctx.model)
    ctx, result.counts, result.refused = loop.leave_out_unrenderable(ctx, tokenizer, settings, config, skip)

    # base
    set_seed(ctx.seed)
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)

    # adapters: the policy, itself again as reference, the reward models, the critic
    model = shared.policy(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    heads = loop.add_roles(model, models, settings)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.checkpointing is not True:
            checkpoint_first(model, settings.checkpointing)
    actors = roles.Actors(model, tokenizer.pad_token_id, settings.temperature, settings.critic, heads)

    # trainer
    trainer = PPOTrainer(actors, tokenizer, ctx.data.train, sources, settings, ctx.seed)
    result.invariants |= handovers.policy_is_reference(trainer)
    for name, parent in models.items():
        result.invariants |= handovers.scores_as_it_did(actors, rewards.adapter_name(name), parent, ctx.model.dtype)
    result.invariants |= handovers.one_copy_of_the_base(model)

    # train, with the held-out numbers before and after
    start = held_out.ask(trainer, ctx.data.test or [])
    result.before = held_out.numbers(start)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")
    result.counts |= loop.train(trainer, ctx)
    result.invariants |= invariants.processes_agree(actors.trained("policy") | actors.trained("value"))
    end = held_out.ask(trainer, ctx.data.test or [])
    result.after = held_out.numbers(end) | held_out.gain(start, end, ctx.seed)
    result.invariants |= loop.judge_end(trainer, ctx, end)
    actors.act_as(roles.POLICY)
    result.after |= answers.ask(model, tokenizer, ctx, result.samples, "after")

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    for name in adapters.others(model):
        model.delete_adapter(name)
    shared.save(model, tokenizer, ctx)
    return result


STAGE = Stage(
    name="ppo",
    config_class="PPOSettings",
    contract=PROMPT_ONLY,
    headlines=(
        Headline("reward", "reward of held-out answers", "higher"),
        Headline("question_accuracy", "questions answered right", "higher", percent=True),
    ),
    numbers=(
        *("reward", "reward_gain", "reward_gain_low", "reward_gain_high"),
        *("kl", "answer_length", "ended", "question_accuracy", "stopped"),
    ),
    run=run,
    answers=True,
)
