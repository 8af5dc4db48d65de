"""What to advise when a single row does not fit."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.plan.memory import Adapter, Model, Work, memory
from pipeline.plan.shapes import shapes_of
from pipeline.plan.stage import optimizer_bytes

STEP = 64


def longest_that_fits(model: Any, args: Any, length: int, sequences: int) -> int:
    """Tokens of one row, of so many sequences, that the planner finds room for on this GPU with its checkpointing
    as it is; half of what was tried where the planner does not know the architecture, or there is no GPU."""
    half = max(1, length // 2)
    if not torch.cuda.is_available():
        return half
    try:
        shapes = shapes_of(model.config.get_text_config().to_dict())
    except UserError:
        return half
    lora = model.peft_config["default"]
    reference = len(model.peft_config) > 1
    layers = args.checkpointed_layers
    work = Work(
        sequences,
        length=length,
        checkpointed=layers if isinstance(layers, int) and layers is not True else checkpoints(args) * shapes.layers,
        masked="flash" not in model.config._attn_implementation,
        eager=model.config._attn_implementation == "eager",
        accumulates=args.gradient_accumulation_steps > 1,
        optimizer_bytes=optimizer_bytes(args.optim),
        frozen=int(reference),
        score_head=lora.task_type == "SEQ_CLS",
        reference=reference,
        evaluates=False,
    )
    width = model.get_input_embeddings().weight.dtype.itemsize
    planned = Model(shapes, Adapter(lora.r, lora.lora_dropout), getattr(model, "is_loaded_in_4bit", False), width)
    room = torch.cuda.get_device_properties(model.device).total_memory
    return longest(planned, work, room, at_most=length - 1) or half


def checkpoints(args: Any) -> bool:
    """Whether a trainer's arguments ask for activation checkpointing, by its newer name or its older one."""
    newer = getattr(args, "activation_checkpointing", None)
    return bool(args.gradient_checkpointing if newer is None else newer)


def longest(model: Model, work: Work, room: int, at_most: int) -> int | None:
    """The most tokens, a multiple of STEP where there is one, of rows that need no more than `room` bytes."""
    from dataclasses import replace

    for length in [at_most, *range(at_most // STEP * STEP, 0, -STEP)]:
        if memory(model, replace(work, length=length)).total <= room:
            return length
    return None
