"""Votes of other tools: a prompt and its answers as named fields, and what a person said of them.

No tool has a place for all that a vote of ours holds. The answers, the choice and the correction stand where the tool
shows them; everything else travels as JSON under the name FACTS, and comes back with them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from pipeline.data.votes import BOTH_BAD, SKIP, TIE, Vote, check_annotator, pair_of
from pipeline.disk.atomic import Json, digest
from pipeline.errors import UserError
from pipeline.language.say import say

FACTS = "onebase"
PROMPTS = ("prompt", "instruction", "question", "input")
NUMBERED = re.compile(r"(.*?)[ _-]*(\d+|(?<![a-z])[a-h]|left|right)", re.IGNORECASE)
"""The name of one of several answers: answer1, response_b, left."""
CORRECTION = re.compile(r"correction(\d+)")
WITHOUT_WINNER = {"tie": TIE, "equal": TIE, "same": TIE, "both bad": BOTH_BAD, "skip": SKIP}
IMPORTED = {"stage": "imported", "adapter": "", "seed": 0, "temperature": 0.0}
"""How a candidate came about whose maker nobody has noted."""
OF_THE_TASK = {"prompt", "candidates", "gold"}


@dataclass
class Said:
    """What a person said, by the names that the answers have there."""

    person: str
    """Who it was, in the tool's words."""
    better: str = ""
    """The name of an answer, or a key of WITHOUT_WINNER; empty where nothing was chosen."""
    ranking: list[str] = field(default_factory=list)
    """All answers, the best first."""
    corrections: list[Json] = field(default_factory=list)
    """{"candidate", "text"}: an answer, counted from 0, and what it should be."""
    facts: Json = field(default_factory=dict)
    time: str | None = None
    seconds: float = 0.0
    sides: bool = False
    """Whether the tool shows the first answer on the left."""

    def take(self, question: str, given: Any, names: Sequence[str], place: str) -> bool:
        """Note an answer to a question, where a vote has a place for it."""
        if not isinstance(given, str):
            return False
        plain = given if given in names else given.lower().replace("_", " ")
        if question == FACTS:
            self.facts = read_facts(given, place)
        elif found := CORRECTION.fullmatch(question):
            self.corrections.append({"candidate": int(found[1]) - 1, "text": given})
        elif not self.better and (plain in names or plain in WITHOUT_WINNER):
            self.better = plain
        else:
            return False
        return True


@dataclass
class Reading:
    """The votes of a file so far, and how often something had no place in a vote."""

    votes: dict[str, Vote] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)
    people: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By the name of a person here, that in the tool and the place where it stands."""

    def add(self, place: str, prompt: Any, answers: Mapping[str, str], facts: Json, said: Said) -> None:
        """Take what a person said of some answers as a vote. Raises UserError naming the place of what is none."""
        names = list(answers)
        choice: Any = names.index(said.better) if said.better in answers else WITHOUT_WINNER.get(said.better)
        if choice is None:
            self.left[say("answers of people who chose nothing")] += 1
            return
        self.left[say("corrections after the first of a vote")] += max(0, len(said.corrections) - 1)
        drawn = facts.get("candidates") or [IMPORTED] * len(names)
        asked = facts.get("prompt", prompt)
        row: Json = {
            "time": said.time or datetime.now(UTC).isoformat(),
            "prompt": asked if isinstance(asked, list) or facts else [{"role": "user", "content": asked}],
            "shown": list(range(len(names))) if said.sides else [],
            "choice": choice,
            "ranking": [names.index(name) for name in said.ranking] or None,
            "edit": said.corrections[0] if said.corrections else None,
            "gold": facts.get("gold"),
            "seconds": said.seconds,
        }
        whole = all(said.facts.get(key) == row[key] for key in ("choice", "edit"))
        # What was chosen anew in the tool is a vote of its own: how strong it is and why, nobody has said.
        kept = said.facts if whole else {key: said.facts[key] for key in ("shown",) if key in said.facts}
        try:
            row["candidates"] = [{**how, "text": text} for how, text in zip(drawn, answers.values(), strict=True)]
            row["pair"] = pair_of(row["prompt"], list(answers.values()))
            row |= {**kept, "annotator": self._name(place, said.facts.get("annotator", said.person))}
            row.setdefault("id", digest([FACTS, row["annotator"], row["pair"]]))
            vote = Vote.model_validate_json(json.dumps(row))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{place}: gives no vote: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{place}: gives no vote: {error}") from None
        earlier = self.votes.get(vote.id)
        if earlier:
            self.left[say("votes of one person on one pair before their last")] += 1
        if earlier is None or earlier.time <= vote.time:
            self.votes[vote.id] = vote

    def _name(self, place: str, person: Any) -> str:
        """A person's name as a file can have it; two people never get the same."""
        name = re.sub(r"[^\w -]+", "-", unicodedata.normalize("NFC", str(person))).strip(" -")[:40].strip()
        if not name:
            raise UserError(f"{place}: names no person ({person!r:.60}), and a vote is somebody's")
        first, where = self.people.setdefault(check_annotator(name), (str(person), place))
        if first != str(person):
            raise UserError(
                f"{place}: {person!r:.60} and {first!r:.60} ({where}) would both be the person {name!r}: rename one"
            )
        return name


def find_answers(fields: Mapping[str, Any], place: str) -> tuple[Any, dict[str, str]]:
    """The prompt, and the answers by name, the left or first one first. Raises UserError where names do not tell."""
    alike: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, value in fields.items():
        if isinstance(value, str) and (found := NUMBERED.fullmatch(name)):
            alike[found[1].lower()].append((found[2].lower().zfill(3), name))
    several = [sorted(names) for names in alike.values() if len(names) > 1]
    prompts = [fields[name] for name in PROMPTS if isinstance(fields.get(name), str | list)]
    if len(several) != 1 or not prompts:
        raise UserError(
            f"{place}: cannot tell the prompt and its answers among {', '.join(fields) or 'no fields'}: name them "
            "prompt, answer1 and answer2"
        )
    return prompts[0], {name: fields[name] for _, name in several[0]}


def read_facts(text: Any, place: str) -> Json:
    """What we wrote under FACTS; nothing where there is none."""
    try:
        facts = json.loads(text) if isinstance(text, str) and text else text or {}
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{place}: what stands under '{FACTS}' is not as it was written: restore it, or take it out")
    return facts


def facts_of_task(vote: Vote) -> Json:
    return {
        "prompt": vote.prompt,
        "candidates": [candidate.model_dump(exclude={"text"}) for candidate in vote.candidates],
        "gold": vote.gold,
    }


def facts_of_vote(vote: Vote) -> str:
    return vote.model_dump_json(exclude=OF_THE_TASK | {"pair", "undoes"})


def named(vote: Vote) -> dict[str, str]:
    """The answers by the names that they have in a tool."""
    return {f"answer{number}": candidate.text for number, candidate in enumerate(vote.candidates, 1)}


def better(vote: Vote) -> str:
    """The choice in these names."""
    return f"answer{vote.choice + 1}" if isinstance(vote.choice, int) else vote.choice.replace("_", " ")


def by_task(votes: Sequence[Vote]) -> dict[int, list[list[Vote]]]:
    """By how many answers are compared, the votes on the same ones: a project of a tool shows as many in each task."""
    tasks: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        tasks[digest([facts_of_task(vote), named(vote)])].append(vote)
    found: dict[int, list[list[Vote]]] = defaultdict(list)
    for same in tasks.values():
        found[len(same[0].candidates)].append(same)
    return found


def as_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as a person reads it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content"))
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in prompt)
