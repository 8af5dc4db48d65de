"""Around the PPO trainer: prompts that fit, adapters in their roles, progress, checkpoints, stopping."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from pipeline import metrics
from pipeline.artifact import Artifact, mark_checkpoint
from pipeline.data import render
from pipeline.data.load import NAMED_AT_MOST
from pipeline.errors import Interrupted, UserError
from pipeline.models import adapters
from pipeline.ppo import checkpoint as checkpoints
from pipeline.ppo.actors import REFERENCE, VALUE
from pipeline.ppo.rewards import adapter_name
from pipeline.stages.progress import Progress, Stop, any_rank, keep_newest
from pipeline.stages.trainer import encoded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pipeline.ppo.settings import PPOSettings
    from pipeline.ppo.trainer import PPOTrainer
    from pipeline.stages.stage import Context


def fitting(
    ctx: Context, tokenizer: PreTrainedTokenizerBase, settings: PPOSettings, config: PretrainedConfig
) -> dict[str, Any]:
    """Counts of prompts. Raises UserError naming those that leave no room for an answer; a prompt is never cut."""
    window = getattr(config, "max_position_embeddings", None)
    room = min(limit for limit in (settings.max_length, window, 1 << 62) if limit) - settings.response_length
    tokens = 0
    for rows in (ctx.data.train, ctx.data.test or []):
        prompts = encoded(rows, lambda row: render.prompt(tokenizer, row), ctx)
        long = [(row["_place"], len(ids)) for row, ids in zip(rows, prompts, strict=True) if len(ids) > room]
        if long:
            named = "\n".join(f"  {place}: {length} tokens" for place, length in long[:NAMED_AT_MOST])
            raise UserError(
                f"{len(long)} prompts of stage '{ctx.out.name}' are longer than the {max(room, 0)} tokens that "
                f"max_length {settings.max_length or window} leaves beside response_length "
                f"{settings.response_length}:\n{named}\nRaise max_length, lower response_length, or remove them."
            )
        tokens = tokens or sum(len(ids) for ids in prompts)
    return {"rows": len(ctx.data.train), "prompt_tokens": tokens}


def cast(model: PeftModel, models: dict[str, Artifact], settings: PPOSettings) -> dict[str, torch.Tensor]:
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


def train(trainer: PPOTrainer, ctx: Context) -> dict[str, Any]:
    """All steps, from the last whole checkpoint where there is one.

    Raises Interrupted after Ctrl-C or SIGTERM, once a checkpoint has been written, and UserError when the run has gone
    wrong by a rule of ppo/health.py; the last checkpoint before that stays.
    """
    settings = trainer.settings
    checkpoint = ctx.claim()
    everyone = PartialState()
    if checkpoint:
        checkpoints.load(trainer, checkpoint)
    metrics.rewind(ctx.out.metrics, trainer.step)
    state = SimpleNamespace(
        global_step=trainer.step, max_steps=settings.steps, is_world_process_zero=everyone.is_main_process
    )
    stop, progress = Stop(), Progress(ctx, resumed=checkpoint is not None)
    progress.on_train_begin(None, state, None)
    seconds = 0.0
    with stop.listening():
        for numbers in trainer.steps():
            state.global_step = trainer.step
            seconds += sum(value for name, value in numbers.items() if name.startswith("seconds_"))
            reason, warnings = trainer.health.verdict(numbers)
            if reason:
                progress.on_train_end(None, state, None)
                raise UserError(_unhealthy(ctx, trainer.step, reason))
            if everyone.is_main_process:
                for warning in warnings:
                    print(f"  warning: step {trainer.step}: {warning}", flush=True)
            progress.on_log(None, state, None, logs=numbers)
            progress.on_step_end(None, state, None)
            asked = any_rank(stop.asked)
            due = settings.save_steps and trainer.step % settings.save_steps == 0
            if (due or asked) and trainer.step < settings.steps:
                save(trainer, ctx)
            if asked and trainer.step < settings.steps:
                progress.on_train_end(None, state, None)
                raise Interrupted(f"stopped at step {trainer.step} of {settings.steps}")
    progress.on_train_end(None, state, None)
    return {"steps": trainer.step, "episodes": trainer.step * settings.batch_size, "train_seconds": round(seconds, 1)}


def save(trainer: PPOTrainer, ctx: Context) -> None:
    """A checkpoint that counts only once it is whole; the ones before it go."""
    everyone = PartialState()
    if everyone.is_main_process:
        folder = ctx.out.checkpoints / f"checkpoint-{trainer.step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoints.save(trainer, folder)
        mark_checkpoint(folder, ctx.fingerprint)
        keep_newest(folder, trainer.settings.save_total_limit or 1)
    everyone.wait_for_everyone()


def _unhealthy(ctx: Context, step: int, reason: str) -> str:
    kept = ctx.out.last_checkpoint(ctx.fingerprint)
    where = f"The policy as it was at {kept.name} is in {kept / 'adapter'}." if kept else "No checkpoint was written."
    return f"stage '{ctx.out.name}' was stopped at step {step}: {reason}. {where}"
