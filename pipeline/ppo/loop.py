"""Around the PPO trainer: prompts that fit, adapters in their roles, progress, checkpoints, stopping."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerState

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.load import NAMED_AT_MOST
from pipeline.data.tokens import closes_turns
from pipeline.disk import metrics
from pipeline.disk.artifact import Artifact, mark_checkpoint
from pipeline.errors import Interrupted, UserError
from pipeline.language.say import in_english
from pipeline.measure.metric import SHARE, Estimate
from pipeline.models import adapters
from pipeline.models.base import load_config
from pipeline.models.forward import plain_on_cpu
from pipeline.models.processes import any_process
from pipeline.ppo import checkpoint as checkpoints
from pipeline.ppo import held_out, rewards
from pipeline.ppo.actors import POLICY, REFERENCE, VALUE
from pipeline.ppo.batch import Rollout, Scored
from pipeline.ppo.engine import EngineError
from pipeline.ppo.invariants import same_tokenizer
from pipeline.ppo.rewards import adapter_name
from pipeline.ppo.scoring import Scores, describe
from pipeline.ppo.settings import CHECKPOINTS_KEPT, RolloutSettings, Sampling
from pipeline.ppo.trainer import WHOLE_AGAIN, RolloutTrainer
from pipeline.training.progress import Progress, Snapshots, Stop, keep_newest, note_split, step_of
from pipeline.training.sequences import Refused, Tally, askable, encode_rows

if TYPE_CHECKING:
    from pipeline.stages.stage import Context


def prepare(
    ctx: Context, tokenizer: PreTrainedTokenizerBase, max_length: int | None, response_length: int, skip: bool
) -> tuple[Context, dict[str, Artifact], dict[str, Any], Refused]:
    """What a stage that is paid for its answers needs before its base is loaded: the context with the prompts that can
    be answered, the reward models by name, counts of the prompts, and those refused.

    Raises UserError for what would stop it later: a reward model of another tokenizer, questions or prompts that the
    template refuses.
    """
    ctx = fill_columns(ctx)
    models = {parent.name: parent for role, parent in ctx.parents.items() if role.startswith("reward")}
    for parent in models.values():
        same_tokenizer(tokenizer, parent)
    warn_of_length(models)
    askable(ctx, tokenizer)
    config = load_config(ctx.model)
    ctx, counts, refused = leave_out_unrenderable(ctx, tokenizer, max_length, response_length, config, skip)
    return ctx, models, counts, refused


def leave_out_unrenderable(
    ctx: Context,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    response_length: int,
    config: PretrainedConfig,
    skip: bool,
) -> tuple[Context, dict[str, Any], Refused]:
    """The context without prompts that the template refuses, counts of the others, and those refused.

    Raises UserError naming prompts that are refused, unless `skip`, or that leave no room for an answer; a prompt is
    never cut.
    """
    window = getattr(config, "max_position_embeddings", None)
    if any(isinstance(row["prompt"], list) for row in ctx.data.train) and not closes_turns(tokenizer):
        raise UserError(
            f"stage '{ctx.out.name}': the chat template does not close the assistant's turn with a token that the "
            "model could stop at, so no answer would end. Name another one as model.chat_template, for example "
            "recipes/templates/chatml.jinja"
        )
    room = min(limit for limit in (max_length, window, 1 << 62) if limit) - response_length

    def render_prompts(rows: Sequence[Row]) -> tuple[list[Row], Tally]:
        kept, long, tally = [], [], Tally(ctx.out.name, skip)
        for row, ids in encode_rows(rows, lambda row: render.prompt(tokenizer, row), tally):
            kept.append(row)
            tally.counts["prompt_tokens"] += len(ids)
            if len(ids) > room:
                long.append(f"  {row['_place']}: {len(ids)} tokens")
        if long:
            named = "\n".join(long[:NAMED_AT_MOST])
            raise UserError(
                f"{len(long)} prompts of stage '{ctx.out.name}' are longer than the {max(room, 0)} tokens that "
                f"max_length {max_length or window} leaves beside an answer of "
                f"{response_length}:\n{named}\nRaise max_length, allow shorter answers, or remove them."
            )
        return kept, tally

    train, counted = render_prompts(ctx.data.train)
    test, held_out_counted = render_prompts(ctx.data.test or [])
    rendered = replace(ctx, data=replace(ctx.data, train=train, test=ctx.data.test and test))
    return rendered, counted.counts, counted.refused + held_out_counted.refused


def fill_columns(ctx: Context) -> Context:
    """Every row with every column, None where it had none, so that a reward function always sees the same ones."""
    train, test = list(ctx.data.train), ctx.data.test and list(ctx.data.test)
    columns = {key for row in [*train, *(test or [])] for key in row}
    empty = dict.fromkeys(sorted(columns))
    filled = replace(ctx.data, train=[empty | row for row in train], test=test and [empty | row for row in test])
    return replace(ctx, data=filled)


def warn_of_length(models: dict[str, Artifact]) -> None:
    """Say so before a policy is trained on a reward model that ranks held-out pairs no better than their lengths do:
    PPO would learn to write long answers."""
    for name, artifact in models.items():
        numbers = artifact.finished().after
        rule = Estimate.among(numbers, "over_longer")
        if rule and not rule.above:
            with in_english():  # as all warnings of a training
                print(
                    f"  warning: the reward model '{name}' ranks {SHARE.written(numbers['accuracy'])} of held-out "
                    f"pairs right, {SHARE.written(rule.value, sign=True)} from choosing the longer answer (95 %: "
                    f"{SHARE.range(rule, sign=True)}): no better than length, as far as these pairs can tell",
                    flush=True,
                )


def add_roles(model: PeftModel, models: dict[str, Artifact], settings: Sampling) -> dict[str, torch.Tensor]:
    """Put reference, reward models and critic beside the policy; gives the score heads by adapter name."""
    adapters.twin(model, REFERENCE)
    heads: dict[str, torch.Tensor] = {}
    for name, artifact in models.items():
        head = adapters.borrowed(model, adapter_name(name), artifact.adapter)
        if head is None:
            raise UserError(f"{artifact.adapter} holds no score head: it is not a reward model")
        heads[adapter_name(name)] = head
    if settings.critic == "adapter":
        if models:
            adapters.borrowed(model, VALUE, next(iter(models.values())).adapter, trainable=True)
        else:
            adapters.twin(model, VALUE, trainable=True)
    return heads


def train(trainer: RolloutTrainer, ctx: Context) -> dict[str, Any]:
    """All steps, from the last whole checkpoint where there is one.

    Raises Interrupted after Ctrl-C or SIGTERM, once a checkpoint has been written, and UserError when the run has gone
    wrong by a rule of ppo/health.py; the last checkpoint before that stays.
    """
    settings = trainer.settings
    if ctx.trained:  # only to be measured again
        adapters.restore(trainer.actors.model, ctx.trained)
        trainer.step = settings.steps
        return {}
    checkpoint = ctx.claim()
    process = PartialState()
    if checkpoint:
        checkpoints.load(trainer, checkpoint)
    metrics.rewind(ctx.out.metrics, trainer.step)
    state = TrainerState(
        global_step=trainer.step, max_steps=settings.steps, is_world_process_zero=process.is_main_process
    )
    stop, progress, sizes = Stop(), Progress(ctx, resumed=checkpoint is not None), list[int]()
    snapshots = Snapshots(ctx, trainer.actors.model)

    def note(episodes: int, left: int) -> None:
        sizes.append(left)
        note_split(ctx, trainer.step, episodes, left, f", and with all once {WHOLE_AGAIN} steps have passed")

    def show(rollout: Rollout, by_source: Scores, totals: list[float], scored: list[Scored]) -> None:
        step = trainer.step + 1
        if step == 1 or _saves_at(step, settings):
            columns = rewards.columns(trainer.sources, by_source)
            rows = describe(rollout, columns, totals, scored, settings.kl_estimator)
            ctx.trackers.tell_table("rollouts", step, rows)

    trainer.when_split = note
    if ctx.trackers.open:
        trainer.when_scored = show
    progress.on_train_begin(None, state, None)
    seconds = 0.0
    with stop.listening(), plain_on_cpu(trainer.actors.model), contextlib.ExitStack() as stack:
        stack.callback(progress.on_train_end, None, state, None)
        for numbers in _steps(trainer, ctx):
            state.global_step = trainer.step
            seconds += sum(value for name, value in numbers.items() if name.startswith("seconds_"))
            reason, warnings = trainer.health.verdict(numbers)
            for warning in warnings if process.is_main_process and not reason else []:
                print(f"  warning: step {trainer.step}: {warning}", flush=True)
            progress.on_log(None, state, None, logs=numbers)
            if reason:
                raise UserError(_unhealthy(ctx, trainer.step, reason))
            progress.on_step_end(None, state, None)
            trainer.actors.act_as(POLICY)
            snapshots.on_step_end(None, state, None)
            stopped = any_process(stop.requested)
            if stopped or _saves_at(trainer.step, settings):
                save(trainer, ctx)
            if stopped:
                raise Interrupted(f"stopped at step {trainer.step} of {settings.steps}")
    done = {"steps": trainer.step, "episodes": trainer.step * settings.batch_size, "train_seconds": round(seconds, 1)}
    return {**done, "rows_at_once": sizes[-1]} if sizes else done


def _steps(trainer: RolloutTrainer, ctx: Context) -> Iterator[dict[str, float]]:
    """The numbers of each step. Where an engine fails, the steps before are saved first."""
    try:
        yield from trainer.steps()
    except EngineError:
        if trainer.step and not _saves_at(trainer.step, trainer.settings):
            save(trainer, ctx)
        raise


def _saves_at(step: int, settings: RolloutSettings) -> bool:
    # After the last one too: what is measured after training may be interrupted.
    return step == settings.steps or bool(settings.save_steps and step % settings.save_steps == 0)


def save(trainer: RolloutTrainer, ctx: Context) -> None:
    """A checkpoint that counts only once it is whole; the ones before it go."""
    process = PartialState()
    if process.is_main_process:
        folder = ctx.out.checkpoints / f"checkpoint-{trainer.step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoints.save(trainer, folder)
        mark_checkpoint(folder, ctx.fingerprint)
        keep_newest(folder, trainer.settings.save_total_limit or CHECKPOINTS_KEPT)
    process.wait_for_everyone()


def judge_end(trainer: RolloutTrainer, ctx: Context, answers: held_out.Answers) -> dict[str, Any]:
    """The last update is seen by no rollout. The held-out answers are its judge; where there are none, as many answers
    to training prompts as a rollout has. A stage that is only measured again has been judged."""
    if ctx.trained:
        return {}
    prompts = trainer.rows[: max(1, trainer.settings.batch_size // held_out.ANSWERS)]
    kl, limit = held_out.numbers(answers or held_out.ask(trainer, prompts))["kl"], trainer.settings.kl_stop
    if not kl <= limit:
        reason = f"answers by the finished policy are {kl:.1f} nats from the reference (kl_stop {limit:g})"
        raise UserError(_unhealthy(ctx, trainer.step + 1, reason))
    return {"kl_after_last_update": kl}


def _unhealthy(ctx: Context, step: int, reason: str) -> str:
    # What is wrong in a step's answers was done by the update before it, which the newest checkpoint may hold.
    steps = [step_of(folder) for folder in ctx.out.checkpoints.glob("checkpoint-*[0-9]")]
    good = max((number for number in steps if number < step - 1), default=min(steps, default=0))
    kept = ctx.out.checkpoints / f"checkpoint-{good}"
    where = f"The policy as it was at step {good} is in {kept / 'adapter'}." if good else "No checkpoint was written."
    where += (
        " If you change a setting or the reward, the stage starts anew and removes it: copy it to another place first."
    )
    return f"stage '{ctx.out.name}' was stopped at step {step}: {reason}. {where}"
