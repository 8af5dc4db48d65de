"""Argilla 2: a record for each prompt with its answers, and by question what each user has said.

What `records.to_json` and `Dataset.to_disk` write: {"fields": {"prompt", "answer1", "answer2"}, "metadata",
"responses": {"better": [{"value": "answer1", "user_id"}]}}. It holds neither times nor which responses were discarded.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pipeline.data.votes import Vote
from pipeline.disk.atomic import Json
from pipeline.errors import UserError
from pipeline.label.foreign import (
    FACTS,
    WITHOUT_WINNER,
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


def is_record(row: Json) -> bool:
    return "fields" in row and "responses" in row


def read(place: str, record: Json, reading: Reading) -> None:
    """The votes of a record. Raises UserError naming what is missing."""
    fields, responses, metadata = record["fields"], record["responses"], record.get("metadata") or {}
    if not all(isinstance(each, dict) for each in (fields, responses, metadata)):
        raise UserError(f"{place}: is no record as Argilla writes it: 'fields' and 'responses' are objects")
    prompt, answers = find_answers(fields, place)
    names, facts = list(answers), read_facts(metadata.get(FACTS), place)
    by_user: dict[str, Said] = {}
    for question, given in responses.items():
        for response in given if isinstance(given, list) else [None]:
            if not isinstance(response, dict) or "value" not in response or not response.get("user_id"):
                raise UserError(f"{place}: a response to '{question}' has no 'value' or no 'user_id'")
            said = by_user.setdefault(str(response["user_id"]), Said(str(response["user_id"])))
            value = response["value"]
            if not (_take_ranking(said, value, names) or said.take(question, value, names, place)):
                reading.left[say("answers to other questions")] += 1
    if not by_user:
        reading.left[say("tasks that nobody has answered")] += 1
    for user, said in by_user.items():
        reading.add(f"{place} user {user}", prompt, answers, facts, said)


def _take_ranking(said: Said, value: Any, names: list[str]) -> bool:
    """[{"value": name, "rank": 1}, ...], where answers may share a rank."""
    if not isinstance(value, list) or not all(isinstance(each, dict) and each.get("value") in names for each in value):
        return False
    ranks: dict[int, list[str]] = defaultdict(list)
    for each in value:
        if not isinstance(each.get("rank"), int):
            return False
        ranks[each["rank"]].append(each["value"])
    in_order = [ranks[rank] for rank in sorted(ranks)]
    if len(value) != len(names) or not in_order:
        return False
    if len(in_order) == 1:
        said.better = "tie"
    elif len(in_order) == len(names):
        said.better, said.ranking = in_order[0][0], [name for (name,) in in_order] if len(names) > 2 else []
    elif len(in_order[0]) == 1:
        said.better = in_order[0][0]  # how the others stand to each other, a vote cannot hold in part
    else:
        return False
    return True


def write(votes: Sequence[Vote]) -> dict[str, str]:
    """For each number of answers the files of a data set, as Dataset.from_disk reads them."""
    files = {}
    for width, tasks in by_task(votes).items():
        whole = {"records": [_record(same) for same in tasks], ".argilla/settings": _settings(width)}
        whole[".argilla/dataset"] = {"name": f"votes-{width}", "allow_extra_metadata": True}
        for name, value in whole.items():
            files[f"answers{width}/{name}.json"] = json.dumps(value, ensure_ascii=False, indent=1)
    return files


def _record(votes: list[Vote]) -> Json:
    first = votes[0]
    responses: dict[str, list[Json]] = defaultdict(list)
    for vote in votes:
        said = {"better": better(vote), FACTS: facts_of_vote(vote)}
        if vote.edit:
            said[f"correction{vote.edit.candidate + 1}"] = vote.edit.text
        for question, value in said.items():
            responses[question].append({"value": value, "user_id": user_id(vote.annotator)})
    metadata = {FACTS: json.dumps(facts_of_task(first), ensure_ascii=False)}
    fields = {"prompt": as_text(first.prompt), **named(first)}
    return {
        "id": first.pair,
        "fields": fields,
        "metadata": metadata,
        "responses": responses,
        "suggestions": {},
        "vectors": {},
    }


def user_id(annotator: str) -> str:
    """The id under which Argilla must have a person: it takes responses of no others."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"onebase:{annotator}"))


def _settings(width: int) -> Json:
    names = [f"answer{number}" for number in range(1, width + 1)]
    options = [{"text": name, "value": name} for name in (*names, *WITHOUT_WINNER)]
    label = {"type": "label_selection", "options": options, "visible_options": len(options)}
    text = {"type": "text", "use_markdown": False}
    questions = [_question("better", label, required=True)]
    questions += [_question(name.replace("answer", "correction"), text) for name in names]
    fields = [_question(name, text, required=True) for name in ("prompt", *names)]
    shared = {"vectors": [], "metadata": [], "allow_extra_metadata": True, "guidelines": None, "mapping": None}
    distribution = {"strategy": "overlap", "min_submitted": 1}
    return {"questions": [*questions, _question(FACTS, text)], "fields": fields, "distribution": distribution, **shared}


def _question(name: str, settings: Json, required: bool = False) -> Json:
    return {"name": name, "title": name, "required": required, "settings": settings, "type": settings["type"]}
