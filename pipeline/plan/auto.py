"""`auto` in a recipe: the fastest setting that the planner finds room for. Plain Python: no torch.

per_device_train_batch_size: auto   gradient_accumulation_steps then says the rows of an optimizer step, which stay as
                                    many: it is divided by the batch that is chosen. For ppo mini_batch_size says it.
activation_checkpointing: auto      as few layers as there is room for, from none to all
max_length: auto                    the longest rows that fit one at a time, no longer than the rows are

What is chosen depends on the card, so it is no part of a stage's fingerprint: `auto` itself is. A choice is kept with
the stage (chosen.json), and a run that goes on uses it again, wherever it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.plan.cards import CARDS, GIB, Card
from pipeline.plan.lengths import Lengths
from pipeline.plan.memory import CONTEXT, Model, memory
from pipeline.plan.sizes import AUTO, AUTO_ARGUMENTS, BATCH, CHECKPOINTING, LENGTH
from pipeline.plan.stage import work_of
from pipeline.plan.time import step_seconds
from pipeline.plan.work import Work

if TYPE_CHECKING:
    from pipeline.models.spec import ModelSpec
    from pipeline.stages.stage import Stage, StageSpec

KEPT_FREE = 0.05
"""Of the card, for what the planner does not see."""
STEP = 64
UNKNOWN_LENGTH = 4096
"""The most that max_length: auto comes to where the rows are not on this disk to be looked at."""


def find_autos(section: StageSpec) -> list[str]:
    """The arguments that a stage leaves to the planner."""
    return [name for name in AUTO_ARGUMENTS if section.train.get(name) == AUTO]


def resolve(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None, card: Card
) -> StageSpec:
    """The section with a number wherever it says auto. Raises UserError if nothing fits."""
    return fill_in(section, choose(kind, section, model, spec, lengths, card))


def fill_in(section: StageSpec, chosen: dict[str, Any]) -> StageSpec:
    return section.model_copy(update={"train": {**section.train, **chosen}})


def choose(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None, card: Card
) -> dict[str, Any]:
    """What is put in place of each auto, gradient_accumulation_steps included where it changes.

    Raises UserError if nothing fits.
    """
    autos, sampling, rollouts = find_autos(section), section.sampling(), section.rollouts()
    if not autos:
        return {}
    room, layers = card.room * (1 - KEPT_FREE), model.shapes.layers
    least = {name: value for name, value in ((BATCH, 1), (CHECKPOINTING, True)) if name in autos}
    chosen: dict[str, Any] = {}

    def work_with(numbers: dict[str, Any]) -> Work:
        return work_of(kind, fill_in(section, {**least, **numbers}), model, spec, lengths, card)

    def refusal(work: Work) -> UserError:
        needs = memory(model, work)
        return UserError(
            f"auto finds nothing that fits {card.name} ({card.room / GIB:.3g} GiB, 5 % kept free): the smallest "
            f"setting needs {needs.total / GIB:.1f} GiB, {(needs.total - room) / GIB:.1f} GiB more than there is, "
            f"{needs.stays / GIB:.1f} of them "
            f"for weights, adapters and optimizer, {CONTEXT / GIB:.1f} for the CUDA context. Take a smaller model or "
            "r, a lower max_length, or optim: adamw_8bit."
        )

    if LENGTH in autos:
        answer = sampling.response_length if sampling else 0
        longest = min(lengths.longest + answer if lengths else UNKNOWN_LENGTH, model.shapes.window)
        shortest = answer + 1 if answer else min(STEP, longest)
        length = find_longest(model, lambda tokens: work_with({LENGTH: tokens}), longest, shortest, room)
        if length is None:
            raise refusal(work_with({LENGTH: shortest}))
        chosen[LENGTH] = length
    work = work_with(chosen)
    batches, rows = [work], 0
    if BATCH in autos:
        rows = rollouts.mini if rollouts else int(section.train["gradient_accumulation_steps"])
        sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
        batches = [replace(work, rows=work.rows * size) for size in sizes]  # work.rows: of one row; two for a pair
    levels = range(layers + 1) if CHECKPOINTING in autos else [work.checkpointed]
    fitting = []
    for batch in batches:
        tries = (replace(batch, checkpointed=level) for level in levels)
        if fits := next((one for one in tries if memory(model, one).total <= room), None):
            fitting.append(fits)
    if not fitting:
        raise refusal(replace(batches[-1], checkpointed=max(levels)))
    timed = card if card.teraflops else CARDS["rtx3090"]  # only which of two settings is faster is asked of it
    best = min(fitting, key=lambda one: (step_seconds(model, one, timed) or 0.0) / one.tokens)
    if rows:
        chosen[BATCH] = best.rows // work.rows
        if not rollouts:
            chosen["gradient_accumulation_steps"] = rows // chosen[BATCH]
    if CHECKPOINTING in autos:
        chosen[CHECKPOINTING] = {0: False, layers: True}.get(best.checkpointed, best.checkpointed)
    return chosen


def find_longest(model: Model, at: Callable[[int], Work], longest: int, shortest: int, room: float) -> int | None:
    """The most tokens of a row, from `longest` down to `shortest` in steps of STEP, that need no more than `room`
    bytes; `at` gives the work with rows of so many. None if even the shortest do not fit."""
    lengths = [longest, *range((longest - 1) // STEP * STEP, shortest - 1, -STEP), shortest]
    return next((length for length in lengths if memory(model, at(length)).total <= room), None)
