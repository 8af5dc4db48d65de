"""From a recipe's section to what its stage puts through the model. Plain Python: no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.models.spec import SEGMENTS
from pipeline.plan.batches import take
from pipeline.plan.cards import Card
from pipeline.plan.lengths import ENDED, TEMPLATE, Lengths, learnt_lengths, question_tokens
from pipeline.plan.memory import CONTEXT, Memory, Model, memory
from pipeline.plan.shapes import Adapter, Shapes
from pipeline.plan.sizes import TOKENS
from pipeline.plan.time import ppo_seconds, seconds_again, step_seconds
from pipeline.plan.work import Work

if TYPE_CHECKING:
    from pipeline.models.spec import ModelSpec
    from pipeline.stages.stage import Stage, StageSpec

ANSWER_SHARE = 0.5
"""Of a dialogue's tokens, those that carry loss and so go through the LM head."""
OPTIMIZER_BYTES = {
    # optim: bytes of state for each parameter; whatever is not named here is planned as AdamW in float32
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "ademamix_8bit"), 2.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), 1.0),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "sgd_momentum"), 4.0),
    **dict.fromkeys(("sgd", "adafactor"), 0.0),
}
NOT_KNOWN_OF_LORA = (
    "use_dora", "rank_pattern", "layers_to_transform", "layer_replication", "target_parameters", "exclude_modules",
    "trainable_token_indices", "lora_bias", "bias",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A stage on a card. Times are None where the card's speed, or how much there is to do, is not known."""

    work: Work
    memory: Memory
    card: Card | None
    tokens_per_second: float | None
    minutes: float | None
    disk: int
    """Bytes of adapter and checkpoints."""

    @property
    def fits(self) -> bool | None:
        return None if self.card is None else self.memory.total <= self.card.room


def planned_model(spec: ModelSpec, shapes: Shapes) -> Model:
    """Raises UserError for an adapter whose memory is not known."""
    lora = spec.lora
    for argument in NOT_KNOWN_OF_LORA:
        if lora.get(argument) not in (None, False, "none"):
            raise UserError(f"model.lora.{argument}: how much memory it needs is not known here")
    targets = lora.get("target_modules", "all-linear")
    names = {linear.name for linear in shapes.linears()}
    if targets != "all-linear" and not (isinstance(targets, list) and targets and names >= set(targets)):
        raise UserError(
            f"model.lora.target_modules: how much memory {targets} needs is not known here; known are all-linear "
            f"and a list of {', '.join(sorted(names))}"
        )
    adapter = Adapter(
        r=int(lora.get("r", 8)),
        dropout=float(lora.get("lora_dropout", 0.0)),
        targets=None if targets == "all-linear" else tuple(targets),
    )
    return Model(shapes, adapter, spec.quantize != "none", 4 if spec.dtype == "float32" else 2)


def optimizer_bytes(optim: Any) -> float:
    """State for each trained parameter, of an optimizer by transformers' name for it."""
    return OPTIMIZER_BYTES.get(str(getattr(optim, "value", optim)), 8.0)


def checkpointed_layers(arguments: Mapping[str, Any], layers: int) -> int:
    """How many layers a trainer checkpoints: `activation_checkpointing` (true, false, a number), or its older name."""
    value = arguments.get("activation_checkpointing")
    value = arguments.get("gradient_checkpointing", False) if value is None else value
    return (layers if value else 0) if isinstance(value, bool) else min(int(value), layers)


def attention(name: str) -> dict[str, Any]:
    """What Work is told of an attn_implementation."""
    segments = name == SEGMENTS
    return {"masked": "flash" not in name and not segments, "eager": name == "eager", "segments": segments}


def work_of(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None, card: Card | None = None
) -> Work:
    """The most that a stage puts through the model at a time. `card`: of which an engine takes its share."""
    arguments = kind.arguments(section)
    if arguments.get("label_smoothing_factor") and not kind.score_head:
        raise UserError(f"{section.kind}: label_smoothing_factor makes all logits at once, which is not planned")
    if arguments.get("activation_offloading"):
        raise UserError(f"{section.kind}: activation_offloading keeps activations in RAM, which is not planned")
    rows = int(arguments.get("per_device_train_batch_size", 1))
    checkpointed = checkpointed_layers(arguments, model.shapes.layers)
    limit = arguments.get("max_length") or model.shapes.window
    longest = min(limit, lengths.longest) if lengths else limit
    packed = bool(arguments.get("packing"))
    if budget := arguments.get(TOKENS):
        # What is counted are real tokens; where a batch is not packed, padding comes on top.
        groups = _batches(arguments, longest, kind.sequences, lengths) if lengths else []
        heaviest = max([budget // kind.sequences, *(max(group) * len(group) for group in groups)])
        rows = max(1, math.ceil(heaviest / longest))
    common: dict[str, Any] = {
        **attention(spec.attn_implementation),
        "answering": question_tokens(section, longest),
    }
    frozen, sampled = int(kind.reference), None
    again = tuple(Lengths(rows).longest for rows in lengths.again) if lengths else ()
    if sampling := section.sampling():
        answer, rollouts = sampling.response_length, section.rollouts()
        prompt = lengths.longest if lengths else (arguments.get("max_length") or 2 * answer) - answer
        longest, mini = min(limit, prompt + answer), rollouts.mini if rollouts else rows
        models = sum(term.is_stage for term in section.reward_terms())
        frozen = 1 + models
        sampled = Work(
            min(rows, mini), longest, checkpointed, trained=1 + (sampling.critic == "adapter"),
            frozen=frozen, accumulates=mini > rows, answer=answer,
            episodes=sampling.rollout_batch_size or sampling.batch_size,
            copies=sampling.num_generations, shares=bool(card and card.layer) or spec.attn_implementation == SEGMENTS,
            scored=sampling.scoring_passes + models + bool(section.engine()),
            dequantized_rollout=sampling.dequantize_rollout,
            again=again, **common,
        )  # fmt: skip
        sampled = with_engine(section, sampled, model, card)
        if rollouts:
            return sampled
    again = () if section.mixed_in() else again  # those are among its own rows
    return Work(
        rows * kind.sequences,
        limit if packed else longest,
        checkpointed,
        packed=packed,
        accumulates=int(arguments.get("gradient_accumulation_steps", 1)) > 1 or bool(again),
        again=tuple(min(limit, length) for length in again),
        rows_again=rows if again else 0,
        optimizer_bytes=optimizer_bytes(arguments.get("optim")),
        frozen=frozen,
        sampled=sampled,
        score_head=kind.score_head,
        reference=kind.reference,
        mismatched=min(limit, 2 * longest) if section.mismatches() else 0,  # one row's prompt, another row's answer
        held_out=lengths.longest if lengths else longest,
        **common,
    )


def with_engine(section: StageSpec, work: Work, model: Model, card: Card | None) -> Work:
    """What vLLM takes, where it samples: on a GPU its share of the card, and its CUDA context while it sleeps; on a CPU
    (or of no card) the dequantised base and the keys and values of all answers, for as long as the stage runs.

    Raises UserError where the share does not hold the base and one answer.
    """
    engine = section.engine()
    if engine is None:
        return work
    base, cached = model.shapes.parameters * model.bytes, work.length * model.cached
    if card is None or card.layer:
        taken = base + (work.episodes + 1) * cached
        return replace(work, engine=taken, engine_asleep=taken)
    share, least = round(engine.gpu_memory_utilization * card.memory), base + cached + CONTEXT
    if share < least:
        enough = math.ceil(100 * least / card.memory) / 100
        fix = f"Say {enough:g} or more, or leave rollout out" if enough <= 1 else "Leave rollout out"
        raise UserError(
            f"{section.kind}: rollout.gpu_memory_utilization: {engine.gpu_memory_utilization:g} of {card.name} is "
            f"{share / 2**30:.1f} GiB, and vLLM takes at least {least / 2**30:.1f} GiB for the dequantised base, one "
            f"answer and its CUDA context. {fix}"
        )
    return replace(work, engine=share, engine_asleep=CONTEXT)


def plan_stage(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None, card: Card | None
) -> Planned:
    work = work_of(kind, section, model, spec, lengths, card)
    arguments = kind.arguments(section)
    adapter = 4 * model.adapter.parameters(model.shapes)
    kept = arguments.get("save_total_limit") or kind.checkpoints
    disk = round(adapter * (1 + (kept + 1) * (1 + work.optimizer_bytes / 4) * work.trained))
    before: float | None = 0.0
    if rollouts := section.rollouts():
        seconds = ppo_seconds(model, work, card, rollouts.epochs) if card else None
        tokens = work.episodes * work.length
        passes: float | None = rollouts.steps * rollouts.batch_size / work.episodes
    else:
        seconds = step_seconds(model, work, card, 1.0 if kind.every_token else ANSWER_SHARE) if card else None
        tokens = work.tokens
        passes = _passes(arguments, work, kind.sequences, learnt_lengths(section, lengths))
        if work.sampled and (before := _sampled_seconds(section, work.sampled, model, lengths, card)) is None:
            passes = None
        if lengths and work.again and card:
            before = seconds_again(model, _of_mean_length(work, lengths), card, _rows_learnt(arguments, lengths))
    speed = tokens / seconds if seconds else None
    minutes = ((before or 0.0) + passes * seconds) / 60 if seconds and passes is not None else None
    return Planned(work, memory(model, work), card, speed, minutes, disk)


def _sampled_seconds(
    section: StageSpec, work: Work, model: Model, lengths: Lengths | None, card: Card | None
) -> float | None:
    """Of the answers that are sampled and scored before the training."""
    first = section.samples_first()
    if lengths is None or first is None or card is None:
        return None
    answer = round(ENDED * work.answer)
    work = replace(work, length=round(sum(lengths.rows) / len(lengths.rows)) + answer, answer=answer)
    seconds = ppo_seconds(model, work, card, epochs=0)
    return None if seconds is None else seconds * len(lengths.rows) * first.num_generations / work.episodes


def _batches(arguments: Mapping[str, Any], limit: int, sequences: int, lengths: Lengths) -> list[list[int]]:
    """The lengths of an epoch's rows, batch by batch. They are taken in the order of the file, for want of the one in
    which they will be drawn."""
    tokens = [min(length, limit) for length in lengths.rows]
    if arguments.get("train_sampling_strategy") == "group_by_length":
        tokens.sort()
    if budget := arguments.get(TOKENS):
        groups = take(range(len(tokens)), [sequences * length for length in tokens], budget)
        return [[tokens[row] for row in group] for group in groups]
    per_device = int(arguments.get("per_device_train_batch_size", 1))
    return [tokens[start : start + per_device] for start in range(0, len(tokens), per_device)]


def _passes(arguments: dict[str, Any], work: Work, sequences: int, lengths: Lengths | None) -> float | None:
    """Forward and backward passes of the longest batch that take as long as all of a stage's."""
    accumulated = int(arguments.get("gradient_accumulation_steps", 1))
    steps = int(arguments.get("max_steps") or -1)
    if lengths is None:
        return steps * accumulated if steps > 0 else None
    if work.packed:
        batches = math.ceil(sum(lengths.rows) / work.tokens)
        longest_batches = float(batches)
    else:
        groups = _batches(arguments, work.length, sequences, lengths)
        batches = len(groups)
        computed = sum(sum(group) if work.segments else max(group) * len(group) for group in groups)
        longest_batches = computed * sequences / work.tokens
    passes = steps * accumulated if steps > 0 else float(arguments.get("num_train_epochs", 1)) * batches
    return longest_batches / batches * passes


def _of_mean_length(work: Work, lengths: Lengths) -> Work:
    """With the mean in place of the longest of the rows that it learns again."""
    return replace(work, again=tuple(round(sum(rows) / len(rows)) + TEMPLATE for rows in lengths.again))


def _rows_learnt(arguments: Mapping[str, Any], lengths: Lengths) -> float:
    """Of its own, in all steps."""
    steps = int(arguments.get("max_steps") or -1)
    if steps <= 0:
        return float(arguments.get("num_train_epochs", 1)) * len(lengths.rows)
    per_device = int(arguments.get("per_device_train_batch_size", 1))
    return steps * per_device * int(arguments.get("gradient_accumulation_steps", 1))
