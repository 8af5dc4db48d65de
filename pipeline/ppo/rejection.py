"""Rejection sampling: several answers to each prompt, of which those that the reward passes become demonstrations.

Sources: [L] arXiv 2307.09288 (Llama 2, section 3.2.3), [R] arXiv 2304.06767 (RAFT).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from pipeline.data.contracts import Row
from pipeline.data.tokens import without_marks
from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import Json, digest, read_json, read_lines, sha256_of_file, write_json, write_text
from pipeline.errors import UserError
from pipeline.measure.metric import SHARE
from pipeline.models import processes
from pipeline.ppo import rewards
from pipeline.ppo.answering import Answering
from pipeline.ppo.rejection_settings import RejectionSettings
from pipeline.training.progress import clock

TOLD = 10
"""How often it says how far it is."""
Group = list[Row]
"""The answers to one prompt, each with its `prompt`, `completion`, `score`, `text` and whether it `ended`."""


def sample_or_find(
    answering: Answering, rows: Sequence[Row], settings: RejectionSettings, out: Artifact, fingerprint: str
) -> tuple[list[Row], Json]:
    """The kept rows, and counts of what was sampled. They are written to kept.jsonl; what an earlier start of this
    stage has kept is taken from there.

    Raises UserError where no answer is kept.
    """
    if found := _find(out, fingerprint):
        return found
    groups = sample_all(answering, rows, settings)
    kept = choose(groups, settings)
    if not kept:
        raise UserError(_nothing(out.name, groups, settings))
    counts = count(groups, kept)
    process = PartialState()
    if process.is_main_process:
        write_text(out.kept, (json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        write_json(_note(out), {"fingerprint": fingerprint, "sha256": sha256_of_file(out.kept), "counts": counts})
        print(
            f"  kept {len(kept)} of {counts['answers']} answers ({counts['answers_cut']} were cut), to "
            f"{SHARE.written(counts['kept_share'])} of the prompts; mean reward {counts['kept_reward']:.3f}, of all "
            f"answers {counts['sampled_reward']:.3f}",
            flush=True,
        )
    process.wait_for_everyone()
    return kept, counts


def _note(out: Artifact) -> Any:
    """Beside the checkpoints, with which it goes once the stage is finished."""
    return out.checkpoints / "kept.json"


def _find(out: Artifact, fingerprint: str) -> tuple[list[Row], Json] | None:
    noted = read_json(_note(out)) or {}
    if noted.get("fingerprint") != fingerprint or not out.kept.is_file():
        return None
    if noted.get("sha256") != sha256_of_file(out.kept):
        print(f"  warning: {out.kept} has been changed since it was written; the answers are sampled anew", flush=True)
        return None
    print(f"  the answers kept before are in {out.kept}; none is sampled anew", flush=True)
    return [json.loads(line) for line in read_lines(out.kept)], noted["counts"]


def sample_all(answering: Answering, rows: Sequence[Row], settings: RejectionSettings) -> list[Group]:
    """The answers to each prompt, in the order of the rows; several processes share each round of prompts and draw what
    one would."""
    at_once, groups, started = settings.batch_size // settings.num_generations, list[Group](), time.monotonic()
    rounds = range(0, len(rows), at_once)
    for number, start in enumerate(rounds):
        few = rows[start : start + at_once]
        for part in processes.gather(_answer(answering, few, number, settings.num_generations)):
            groups += part
        done = number + 1
        if PartialState().is_main_process and done * TOLD // len(rounds) > number * TOLD // len(rounds):
            left = (time.monotonic() - started) / done * (len(rounds) - done)
            sampled = [answer["score"] for group in groups for answer in group]
            print(f"  sampled {len(sampled)} answers  reward {fmean(sampled):+.2f}  {clock(left)} left", flush=True)
    return groups


def _answer(answering: Answering, rows: Sequence[Row], number: int, copies: int) -> list[Group]:
    """This process's share of a round."""
    mine = processes.range_of(len(rows))
    if not mine:
        return []
    rollout = answering.answer([rows[place] for place in mine], f"round {number}", copies, (mine.start, len(rows)))
    by_source = answering.ask_sources(rollout)
    columns = rewards.columns(answering.sources, by_source)
    answers = []
    for place, score in enumerate(rewards.total(answering.sources, by_source)):
        row, episode = rollout.rows[place], rollout.episodes[place]
        more = {name: values[place] for name, values in columns.items()}
        text = _as_text(answering.tokenizer, row, rollout.texts[place])
        answers.append({**_as_row(row, text), "score": score, **more, "text": text, "ended": episode.ended})
    return [answers[start : start + copies] for start in range(0, len(answers), copies)]


def _as_text(tokenizer: PreTrainedTokenizerBase, row: Row, said: str) -> str:
    return said if isinstance(row["prompt"], str) else without_marks(tokenizer, said)


def _as_row(row: Row, text: str) -> Row:
    """A prompt and its answer as a demonstration."""
    completion: Any = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"prompt": row["prompt"], "completion": completion, **tools, "_place": row["_place"]}


def choose(groups: Iterable[Group], settings: RejectionSettings) -> list[Row]:
    """The answers that are learnt from, as demonstrations with their scores: of those that ended by themselves and say
    something."""
    kept: dict[str, Row] = {}
    for group in groups:
        fit = [answer for answer in group if answer["ended"] and answer["text"].strip()]
        if settings.threshold is not None:
            fit = [answer for answer in fit if answer["score"] >= settings.threshold]
        if settings.keep == "best" and fit:
            fit = [max(fit, key=lambda answer: float(answer["score"]))]
        for answer in fit:
            row = {name: value for name, value in answer.items() if name not in ("text", "ended")}
            kept.setdefault(digest([row["prompt"], row["completion"]]), row)
    return list(kept.values())


def count(groups: Sequence[Group], kept: Sequence[Row]) -> Json:
    """Of all answers and of those kept; `kept_share`: of the prompts that have one. A prompt that stands in several
    rows is kept for all of them."""
    answers = [answer for group in groups for answer in group]
    prompts = {digest(row["prompt"]) for row in kept}
    return {
        "prompts": len(groups),
        "answers": len(answers),
        "answers_cut": sum(not answer["ended"] for answer in answers),
        "kept_share": fmean(digest(group[0]["prompt"]) in prompts for group in groups),
        "sampled_reward": fmean(answer["score"] for answer in answers),
        "kept_reward": fmean(row["score"] for row in kept),
    }


def _nothing(stage: str, groups: Sequence[Group], settings: RejectionSettings) -> str:
    answers = [answer for group in groups for answer in group]
    whole = [answer["score"] for answer in answers if answer["ended"] and answer["text"].strip()]
    none = f"stage '{stage}' kept none of its {len(answers)} answers"
    if not whole:
        return (
            f"{none}: all were empty, or cut at max_completion_length {settings.max_completion_length}. Raise "
            "sampling.max_completion_length, or begin from a policy that ends its answers (from:)."
        )
    return (
        f"{none}: the best score of a whole answer was {max(whole):g}, and the threshold is {settings.threshold:g}. "
        "Lower sampling.threshold, raise sampling.num_generations, choose easier prompts, or begin from a better "
        "policy (from:)."
    )
