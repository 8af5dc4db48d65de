"""Questions asked of a policy, greedily, and what share it answers right."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.tokens import Unrenderable, stop_ids
from pipeline.disk.atomic import read_lines
from pipeline.measure.matching import correct
from pipeline.measure.scoring import batches
from pipeline.models import dialogue, processes
from pipeline.models.forward import LanguageModel, plain_on_cpu
from pipeline.plan.sizes import ANSWER_TOKENS, NEW_TOKENS, TOOL_TOKENS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from pipeline.stages.stage import Context

SHOWN = 3
ASKED = ("prompt", "answer", "choices")
"""What a sample keeps of its question, as far as it has them."""


@dataclass(frozen=True)
class Answer:
    text: str
    stopped: bool
    """It ended with an end-of-turn token, not at the length limit."""


def ask(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, ctx: Context, samples: list[dict[str, Any]], when: str
) -> dict[str, float]:
    """Ask the stage's questions and note some answers under `when` ("before" or "after") in `samples`.

    `question_accuracy`: share answered right; `stopped`: share of answers the model ended by itself.
    """
    questions = list(ctx.data.questions)
    shown = questions[:: max(1, len(questions) // SHOWN)][:SHOWN] or list(
        itertools.islice(_prompts(tokenizer, ctx.data.test or []), SHOWN)
    )
    if when == "before":
        known = _parents_answers(ctx, shown)
        if known is not None:
            samples.extend(known[1])
            return known[0]
        samples.extend({key: row[key] for key in ASKED if key in row} for row in shown)
        with model.disable_adapter():
            _note(samples, "base", generate(model, tokenizer, shown))
    answers = generate(model, tokenizer, questions)
    told = {id(row): answer for row, answer in zip(questions, answers, strict=True)}
    _note(samples, when, [told[id(row)] for row in shown] if questions else generate(model, tokenizer, shown))
    if not questions:
        return {}
    right = sum(correct(row, answer.text) for row, answer in zip(questions, answers, strict=True))
    return {
        "question_accuracy": right / len(questions),
        "stopped": sum(answer.stopped for answer in answers) / len(answers),
    }


def _parents_answers(ctx: Context, shown: list[Row]) -> tuple[dict[str, float], list[dict[str, Any]]] | None:
    """What the parent answered to these very questions after its training, if it was asked them: it is this stage's
    policy before training, proven equal, so there is nothing to ask again."""
    parent = ctx.parents.get("policy")
    if parent is None or ctx.questions_hash is None:
        return None
    manifest = parent.finished()
    if manifest.data.measured_on.get("questions") != ctx.questions_hash:
        return None
    try:
        samples = [json.loads(line) for line in read_lines(parent.samples)]
        told = [sample["prompt"] for sample in samples if {"base", "after", "answer"} <= sample.keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if told != [row["prompt"] for row in shown]:
        return None
    numbers = {name: manifest.after[name] for name in ("question_accuracy", "stopped")}
    kept = (*ASKED, "base")
    return numbers, [
        {**{key: sample[key] for key in kept if key in sample}, "before": sample["after"]} for sample in samples
    ]


@torch.no_grad()
def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    new_tokens: int = NEW_TOKENS,
    alike: bool = False,
) -> list[Answer]:
    """A greedy answer to each row's prompt. `alike`: what all prompts begin with is read once for each batch. Several
    processes share the batches."""
    if not rows:
        return []
    model.eval()
    language_model = LanguageModel(model, tokenizer.pad_token_id)
    prompts = [render.prompt(tokenizer, row) for row in rows]
    limits = [TOOL_TOKENS if row.get("environment") else new_tokens for row in rows]
    shared = dialogue.common_start(prompts) if alike or any(row.get("environment") for row in rows) else 0

    answers: dict[int, Answer] = {}
    with plain_on_cpu(model):
        lengths = [len(ids) - shared + limit for ids, limit in zip(prompts, limits, strict=True)]
        for batch in processes.share(list(batches(lengths, tokens=ANSWER_TOKENS))):
            told = dialogue.answer(
                language_model,
                tokenizer,
                [rows[i] for i in batch],
                new_tokens=max(limits[i] for i in batch),
                limits=[limits[i] for i in batch],
                temperature=0,
                stops=stop_ids(tokenizer),
                generator=torch.Generator(model.device),
                alike=alike,
            )
            answers |= {i: Answer(one.text, one.episode.ended) for i, one in zip(batch, told, strict=True)}
    found = {index: answer for part in processes.gather(answers) for index, answer in part.items()}
    return [found[index] for index in range(len(rows))]


def _note(samples: list[dict[str, Any]], key: str, answers: list[Answer]) -> None:
    for sample, answer in zip(samples, answers, strict=True):
        sample[key] = answer.text.strip()


def _prompts(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> Iterator[Row]:
    """What held-out rows ask, without what they answer; documents ask nothing, and what the template refuses is left
    out as it is elsewhere."""
    for row in rows:
        if "prompt" not in row and "messages" in row:
            first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
            row = {"prompt": row["messages"][:first]}
        if row.get("prompt"):
            with contextlib.suppress(Unrenderable):
                render.prompt(tokenizer, row)
                yield row
