"""From a recipe's section to what its stage puts through the model. Plain Python: no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.load import read_split
from pipeline.errors import UserError
from pipeline.models.environments import with_tools
from pipeline.models.spec import SEGMENTS
from pipeline.plan.batches import take
from pipeline.plan.cards import Card
from pipeline.plan.memory import ANSWER_ROW, Memory, Model, Work, memory
from pipeline.plan.shapes import Adapter, Shapes
from pipeline.plan.sizes import ANSWER_TOKENS, TOKENS
from pipeline.plan.time import ppo_seconds, step_seconds

if TYPE_CHECKING:
    from pipeline.data.contracts import Contract, Row
    from pipeline.models.spec import ModelSpec
    from pipeline.stages.stage import Stage, StageSpec

READ_AT_MOST = 50 << 20
"""Bytes of a data file that is read to estimate the lengths of its rows."""
TOKEN_BYTES = 4.0
"""Of UTF-8 in a token, on average over English text and, at three bytes a character, over Chinese; the longest row is
taken to have only LONGEST_TOKEN_BYTES in each."""
LONGEST_TOKEN_BYTES = 3.0
TEMPLATE = 32
"""Tokens that a chat template adds to a row."""
TOOLS_BYTES = 400
"""Of what a template says of tools besides their descriptions: how to call them."""
ENDED = 0.4
"""Of the longest answer that is allowed, what an answer takes on average, as it ends by itself."""
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
class Lengths:
    """Tokens of a stage's rows, estimated from their bytes."""

    rows: list[int]
    again: list[list[int]] = field(default_factory=list)
    """Of each earlier stage whose rows it learns again, as that stage cut them."""

    @property
    def longest(self) -> int:
        return round(max(self.rows) * TOKEN_BYTES / LONGEST_TOKEN_BYTES) + TEMPLATE


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


def lengths_of(
    section: StageSpec, contract: Contract, seed: int, again: Iterable[tuple[Stage, StageSpec]] = ()
) -> Lengths | None:
    """None where the rows are not on this disk, or are too many to be read for an estimate. `again`: the earlier stages
    whose rows are learnt again."""
    own, earlier = _read_lengths(section, contract, seed), list[list[int]]()
    for kind, of in again:
        if (tokens := _read_lengths(of, kind.contract, seed)) is None:
            return None
        earlier.append(cut_again(kind, of, tokens))
    return None if own is None else Lengths(mixed(section, own, earlier), earlier)


def mixed(section: StageSpec, own: list[int], earlier: list[list[int]]) -> list[int]:
    """Tokens of a stage's rows, with those of earlier stages that it mixes in: the first ones, for want of the draw."""
    shares, found = section.mixed_in().values(), list(own)
    for share, tokens in zip(shares, earlier, strict=False):
        count = max(1, round(len(own) * share / (1 - sum(shares))))
        found += (tokens * (count // len(tokens) + 1))[:count]
    return found


def cut_again(kind: Stage, section: StageSpec, tokens: list[int]) -> list[int]:
    """Tokens of rows that an earlier stage was trained on, no longer than it takes them."""
    limit = kind.arguments(section).get("max_length")
    return [min(length, limit) if isinstance(limit, int) else length for length in tokens]


def _read_lengths(section: StageSpec, contract: Contract, seed: int) -> list[int] | None:
    paths = [Path(part.path) for part in section.data.parts()]
    if not all(os.path.isfile(path) and path.stat().st_size <= READ_AT_MOST for path in paths):
        return None
    rows = read_split(section.data, contract, seed).train
    if environment := section.asked_with():
        rows = with_tools(rows, environment)
    return tokens_of(rows)


def tokens_of(rows: Iterable[Row]) -> list[int]:
    """Of each row, estimated."""
    return [max(1, round(_text_bytes(row) / TOKEN_BYTES)) for row in rows]


def _question_tokens(section: StageSpec, longest: int) -> int:
    """Tokens of the questions that a stage answers at once; without a file of them, of three held-out prompts."""
    file = section.question_file()
    if file is None:
        return min(ANSWER_TOKENS, 3 * (longest + ANSWER_ROW))
    if not os.path.isfile(file):
        return ANSWER_TOKENS
    text = Path(file).read_bytes()
    return min(ANSWER_TOKENS, round(len(text) / TOKEN_BYTES) + ANSWER_ROW * text.count(b"\n"))


def work_of(kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None) -> Work:
    """The most that a stage puts through the model at a time."""
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
        "answering": _question_tokens(section, longest),
    }
    frozen, sampled = int(kind.reference), None
    if sampling := section.sampling():
        answer, rollouts = sampling.response_length, section.rollouts()
        prompt = lengths.longest if lengths else (arguments.get("max_length") or 2 * answer) - answer
        longest, mini = min(limit, prompt + answer), rollouts.mini if rollouts else rows
        frozen = 1 + sum(term.is_stage for term in section.reward_terms())
        sampled = Work(
            min(rows, mini), longest, checkpointed, trained=1 + (sampling.critic == "adapter"),
            frozen=frozen, accumulates=mini > rows, answer=answer,
            episodes=sampling.rollout_batch_size or sampling.batch_size,
            dequantized_rollout=sampling.dequantize_rollout,
            again=tuple(Lengths(rows).longest for rows in lengths.again) if lengths else (), **common,
        )  # fmt: skip
        if rollouts:
            return sampled
    return Work(
        rows * kind.sequences,
        limit if packed else longest,
        checkpointed,
        packed=packed,
        accumulates=int(arguments.get("gradient_accumulation_steps", 1)) > 1,
        optimizer_bytes=optimizer_bytes(arguments.get("optim")),
        frozen=frozen,
        sampled=sampled,
        score_head=kind.score_head,
        reference=kind.reference,
        mismatched=min(limit, 2 * longest) if section.mismatches() else 0,  # one row's prompt, another row's answer
        held_out=lengths.longest if lengths else longest,
        **common,
    )


def plan_stage(
    kind: Stage, section: StageSpec, model: Model, spec: ModelSpec, lengths: Lengths | None, card: Card | None
) -> Planned:
    work = work_of(kind, section, model, spec, lengths)
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
    speed = tokens / seconds if seconds else None
    minutes = ((before or 0.0) + passes * seconds) / 60 if seconds and passes is not None else None
    return Planned(work, memory(model, work), card, speed, minutes, disk)


def learnt_lengths(section: StageSpec, lengths: Lengths | None) -> Lengths | None:
    """Of the rows that it trains on: of prompts whose answers are sampled first, with as many answers as may be kept,
    each as long as answers are on average."""
    first = section.samples_first()
    if lengths is None or first is None:
        return lengths
    answer, kept = round(ENDED * first.response_length), 1 if first.keep == "best" else first.num_generations
    return Lengths([tokens + answer for tokens in lengths.rows for _ in range(kept)])


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


def _text_bytes(value: Any) -> int:
    """Of a row's longest reading: prompt and answer, or of two answers the longer."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list):
        return sum(_text_bytes(item) for item in value)
    if not isinstance(value, dict):
        return 0
    if "content" in value:
        calls = json.dumps(value["tool_calls"]) if value.get("tool_calls") else ""
        return _text_bytes(value["content"]) + len(str(value.get("role", ""))) + len(calls)
    either = max(_text_bytes(value.get("chosen")), _text_bytes(value.get("rejected")))
    tools = TOOLS_BYTES + len(json.dumps(value["tools"])) if value.get("tools") else 0
    return tools + either + sum(_text_bytes(value.get(key)) for key in ("prompt", "completion", "messages", "text"))
