"""What to advise when a single row does not fit."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.plan.memory import Adapter, Model, Work, memory
from pipeline.plan.shapes import shapes_of

STEP = 64


def longest_that_fits(model: Any, args: Any, length: int) -> int:
    """Tokens of one row that the planner finds room for on this GPU with activation checkpointing as it is; where the
    planner does not know the architecture, or there is no GPU, half of what was tried."""
    half = max(1, length // 2)
    if not torch.cuda.is_available():
        return half
    try:
        shapes = shapes_of(model.config.get_text_config().to_dict())
    except UserError:
        return half
    lora = model.peft_config["default"]
    pairs = not hasattr(args, "packing")
    work = Work(
        "dpo" if pairs else "sft",
        rows=2 if pairs else 1,
        length=length,
        checkpointed=shapes.layers if args.gradient_checkpointing else 0,
    )
    planned = Model(shapes, Adapter(lora.r, lora.lora_dropout), quantised=getattr(model, "is_loaded_in_4bit", False))
    room = torch.cuda.get_device_properties(model.device).total_memory
    return longest(planned, work, room, at_most=length - 1) or half


def longest(model: Model, work: Work, room: int, at_most: int) -> int | None:
    """The most tokens, a multiple of STEP where there is one, of rows that need no more than `room` bytes."""
    from dataclasses import replace

    for length in [at_most, *range(at_most // STEP * STEP, 0, -STEP)]:
        if memory(model, replace(work, length=length)).total <= room:
            return length
    return None
