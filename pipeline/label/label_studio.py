"""Label Studio's pairwise template: a task for each prompt with its answers, an annotation for each vote.

Its JSON export: {"data": {"prompt", "answer1", "answer2"}, "annotations": [{"completed_by", "created_at", "lead_time",
"was_cancelled", "result": [{"from_name", "to_name", "type", "value"}]}]}. The annotations of an import belong to
whoever imports it, as its server refuses an e-mail address that it does not know; who voted stands under FACTS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipeline.data.votes import SKIP, Vote
from pipeline.disk.atomic import Json
from pipeline.errors import UserError
from pipeline.label.foreign import (
    FACTS,
    Reading,
    Said,
    as_text,
    better,
    by_task,
    facts_of_task,
    facts_of_vote,
    find_answers,
    named,
    read_facts,
)
from pipeline.language.say import say


def is_task(row: Json) -> bool:
    return "data" in row and "annotations" in row


def read(place: str, task: Json, reading: Reading) -> None:
    """The votes of a task. Raises UserError naming what is missing."""
    data, annotations = task["data"], task["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise UserError(f"{place}: is no task as Label Studio exports it: 'data' is an object, 'annotations' a list")
    prompt, answers = find_answers({key: value for key, value in data.items() if key != FACTS}, place)
    facts = read_facts(data.get(FACTS), place)
    if not annotations:
        reading.left[say("tasks that nobody has answered")] += 1
    for number, annotation in enumerate(annotations, 1):
        where = f"{place} annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            raise UserError(f"{where}: has no list 'result'")
        reading.add(where, prompt, answers, facts, _said(where, annotation, list(answers), reading))


def _said(place: str, annotation: Json, names: list[str], reading: Reading) -> Said:
    by = annotation.get("completed_by")
    person = by.get("email") or by.get("id") if isinstance(by, dict) else by
    said = Said("imported" if person is None else str(person), sides=len(names) == 2)
    said.time, said.seconds = annotation.get("created_at"), annotation.get("lead_time") or 0.0
    for region in annotation["result"]:
        question, given = _given(region, names)
        if not said.take(question, given, names, place):
            reading.left[say("answers to other questions")] += 1
    if annotation.get("was_cancelled"):
        said.better = SKIP
    return said


def _given(region: Any, names: list[str]) -> tuple[str, Any]:
    """The question that a region answers, and its answer where that is one text."""
    value = region.get("value") if isinstance(region, dict) else None
    if not isinstance(value, dict):
        return "", None
    if region.get("type") == "pairwise":
        sides = dict(zip(("left", "right"), names, strict=True)) if len(names) == 2 else {}
        return "", sides.get(str(value.get("selected")))
    texts = value.get("choices", value.get("text"))
    return str(region.get("from_name")), texts[0] if isinstance(texts, list) and len(texts) == 1 else texts


def write(votes: Sequence[Vote]) -> dict[str, str]:
    """The files of an import, by name: for each number of answers its tasks, and the labelling configuration."""
    files = {}
    for width, tasks in by_task(votes).items():
        files[f"answers{width}.json"] = json.dumps([_task(same) for same in tasks], ensure_ascii=False, indent=1)
        files[f"answers{width}.xml"] = _config(width)
    return files


def _task(votes: list[Vote]) -> Json:
    first = votes[0]
    data = {"prompt": as_text(first.prompt), **named(first), FACTS: facts_of_task(first)}
    return {"data": data, "annotations": [_annotation(vote) for vote in votes]}


def _annotation(vote: Vote) -> Json:
    said, wide = better(vote), len(vote.candidates) > 2
    result = [_region(FACTS, "prompt", "textarea", {"text": [facts_of_vote(vote)]})]
    if isinstance(vote.choice, int) and not wide:
        result.append(_region("better", "better", "pairwise", {"selected": "right" if vote.choice else "left"}))
    elif vote.choice != SKIP:
        result.append(_region("better" if wide else "neither", "prompt", "choices", {"choices": [said]}))
    if vote.edit:
        number = vote.edit.candidate + 1
        result.append(_region(f"correction{number}", f"answer{number}", "textarea", {"text": [vote.edit.text]}))
    cancelled = vote.choice == SKIP
    return {"result": result, "was_cancelled": cancelled, "ground_truth": False, "lead_time": vote.seconds}


def _region(name: str, of: str, kind: str, value: Json) -> Json:
    return {"id": name, "from_name": name, "to_name": of, "type": kind, "value": value}


def _config(width: int) -> str:
    names = [f"answer{number}" for number in range(1, width + 1)]
    chosen = [] if width == 2 else names
    choices = "".join(f'<Choice value="{value}"/>' for value in (*chosen, "tie", "both bad"))
    tags = ['<Text name="prompt" value="$prompt"/>']
    tags += ['<Pairwise name="better" toName="answer1,answer2"/>'] if width == 2 else []
    for number, name in enumerate(names, 1):
        tags.append(f'<Text name="{name}" value="${name}"/>')
        tags.append(
            f'<TextArea name="correction{number}" toName="{name}" maxSubmissions="1" placeholder="Correction"/>'
        )
    tags.append(f'<Choices name="{"neither" if width == 2 else "better"}" toName="prompt">{choices}</Choices>')
    tags.append(f'<View style="display: none"><TextArea name="{FACTS}" toName="prompt" maxSubmissions="1"/></View>')
    return "\n".join(["<View>", *(f"  {tag}" for tag in tags), "</View>", ""])
