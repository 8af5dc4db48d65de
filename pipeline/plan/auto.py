"""`auto` in a recipe: the fastest setting that the planner finds room for. Plain Python: no torch.

per_device_train_batch_size: auto   gradient_accumulation_steps then says the rows of an optimizer step, which stay as
                                    many: it is divided by the batch that is chosen. For ppo mini_batch_size says it.
activation_checkpointing: auto      as few layers as there is room for, from none to all
max_length: auto                    the longest rows that fit one at a time, no longer than the rows are

What is chosen depends on the card, so it is no part of a stage's fingerprint: the word is. A choice is kept with the
stage (chosen.json) and taken again by a run that goes on, wherever it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec
from pipeline.plan.cards import CARDS, Card
from pipeline.plan.memory import CONTEXT, Memory, Model, Work, memory
from pipeline.plan.stage import Lengths, work_of
from pipeline.plan.time import step_seconds
from pipeline.stages.arguments import AUTO, AUTO_WORDS
from pipeline.stages.stage import Stage, StageSpec

KEPT_FREE = 0.05
"""Of the card, for what the planner does not see."""
STEP = 64
UNKNOWN_LENGTH = 4096
"""The most that max_length: auto comes to where the rows are not on this disk to be looked at."""
GIB = 2**30


def asked(section: StageSpec) -> list[str]:
    """The words that a stage leaves to the planner."""
    return [word for word in AUTO_WORDS if section.train.get(word) == AUTO]


def resolved(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None, card: Card
) -> StageSpec:
    """The section with a number wherever it says auto. Raises UserError if nothing fits."""
    return taken(section, choices(kind, section, model, spec, lengths, card))


def taken(section: StageSpec, chosen: dict[str, Any]) -> StageSpec:
    return section.model_copy(update={"train": {**section.train, **chosen}})


def choices(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None, card: Card
) -> dict[str, Any]:
    """What is put in place of each auto, gradient_accumulation_steps included where it changes."""
    words = asked(section)
    if not words:
        return {}
    room = card.room * (1 - KEPT_FREE)
    layers = model.shapes.layers
    rows = effective_batch(section) if AUTO_WORDS[0] in words else None
    least = {**({AUTO_WORDS[0]: 1} if rows else {}), **({AUTO_WORDS[1]: True} if AUTO_WORDS[1] in words else {})}
    chosen: dict[str, Any] = {}
    if "max_length" in words:

        def at(length: int) -> Work:
            return work_of(kind, taken(section, {**least, "max_length": length}), model, spec, lengths)

        longest: int = min(lengths.longest if lengths else UNKNOWN_LENGTH, model.shapes.window)
        if section.sampling():
            longest = min(longest + at(longest).answer, model.shapes.window) if lengths else longest
        chosen["max_length"] = _longest(at, longest, model, room, card)
    work = work_of(kind, taken(section, {**least, **chosen}), model, spec, lengths)
    if rows:
        sequences = work.rows  # of one row: two for a pair
        batches = [replace(work, rows=sequences * count) for count in range(rows, 0, -1) if rows % count == 0]
    else:
        batches = [work]
    levels = range(layers + 1) if AUTO_WORDS[1] in words else [work.checkpointed]
    fitting = []
    for batch in batches:
        level = next((k for k in levels if _total(model, replace(batch, checkpointed=k)) <= room), None)
        if level is not None:
            fitting.append(replace(batch, checkpointed=level))
    if not fitting:
        raise UserError(_nothing_fits(memory(model, replace(batches[-1], checkpointed=max(levels))), card, room))
    timed = card if card.teraflops else CARDS["rtx3090"]  # only which of two settings is faster is asked of it
    best = min(fitting, key=lambda one: (step_seconds(model, one, timed) or 0.0) / one.tokens)
    if rows:
        chosen[AUTO_WORDS[0]] = best.rows // work.rows
        if not section.sampling():
            chosen["gradient_accumulation_steps"] = rows // chosen[AUTO_WORDS[0]]
    if AUTO_WORDS[1] in words:
        chosen[AUTO_WORDS[1]] = {0: False, layers: True}.get(best.checkpointed, best.checkpointed)
    return chosen


def effective_batch(section: StageSpec) -> int:
    """Rows of an optimizer step, where per_device_train_batch_size is auto."""
    sampling = section.sampling()
    return sampling.mini if sampling else int(section.train["gradient_accumulation_steps"])


def _longest(at: Callable[[int], Work], longest: int, model: Model, room: float, card: Card) -> int:
    """The longest rows that fit, from `longest` down; `at` gives the work at a max_length."""
    answer = at(longest).answer
    least = answer + 1 if answer else min(STEP, longest)
    lengths: list[int] = [longest, *range((longest - 1) // STEP * STEP, least - 1, -STEP), least]
    for length in lengths:
        if _total(model, at(length)) <= room:
            return length
    raise UserError(_nothing_fits(memory(model, at(least)), card, room))


def _total(model: Model, work: Work) -> int:
    return memory(model, work).total


def _nothing_fits(needs: Memory, card: Card, room: float) -> str:
    return (
        f"auto finds nothing that fits {card.name} ({card.room / GIB:.3g} GiB, 5 % kept free): the least needs "
        f"{needs.total / GIB:.1f} GiB, {(needs.total - room) / GIB:.1f} too many, {needs.stays / GIB:.1f} of them for "
        f"weights, adapters and optimizer, {CONTEXT / GIB:.1f} for the CUDA context. Take a smaller model or r, "
        "a lower max_length, or optim: adamw_8bit."
    )
