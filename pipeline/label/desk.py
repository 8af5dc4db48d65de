"""Who sees which pair, and what they said: every vote goes to the disk before anyone is told that it is saved."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.data import votes as files
from pipeline.data.prompts import prompt_key
from pipeline.data.votes import SKIP, Vote, check_annotator, standing
from pipeline.disk.atomic import digest, read_json
from pipeline.errors import UserError
from pipeline.label.drawing import AHEAD, Drawer, Pair
from pipeline.language.say import say, say_again
from pipeline.recipe.waiting import Progress

GONE = 900.0
"""Seconds with one pair after which a person is taken to have gone, and others are shown it."""
GOLD_EVERY = 10
"""One pair in so many has a known answer, where there are such pairs."""


class NotNow(Exception):
    """A vote on a pair that this person does not have before them any more; nothing is lost, the next one is shown."""


@dataclass
class Desk:
    """The state of all people's work. One thread calls it, so nothing here happens at once."""

    folder: Path
    drawer: Drawer
    gold: list[Pair] = field(default_factory=list)
    share: float = 0.0
    """The part of the pairs that two people see."""
    anew: bool = False
    """A prompt comes again to a person once other answers to it are drawn, as in an arena after a stage was trained
    again: a test holds out few prompts."""
    told: list[str] = field(default_factory=list)
    count: Callable[[list[Vote]], Progress] | None = None
    """How far people are with the round that these votes are of, told from those that stand; None where there are no
    rounds."""
    earlier: list[Path] = field(default_factory=list)
    """The folders of the rounds before."""

    def __post_init__(self) -> None:
        self._lines: dict[str, list[Vote]] = {}
        self._long_ago = [vote for folder in self.earlier for vote in files.read_votes(folder)[0]]
        self._screens = self.folder / ".screens"
        """By person, the pair before them and since when: kept, so that after a crash nobody is shown what another is
        reading."""
        self._asks: dict[str, str] = {}
        """By the id of a vote, what its prompt asks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._before: dict[str, tuple[str, float]] = read_json(self._screens) or {}
        for file in files.files_in(self.folder):
            self._open(file)
        self.round = self._count()
        machines = [vote for vote in self._standing() if vote.judge]
        self._judged = {vote.pair for vote in machines}
        self._checks = list({vote.pair: Pair(vote.prompt, vote.candidates) for vote in machines if vote.share}.values())
        """Pairs on which a judge has voted and that people are to check: they come first."""

    @property
    def full(self) -> bool:
        """The round has all its votes."""
        return self.round is not None and self.round.full

    def _open(self, file: Path) -> None:
        lines, cut = files.read_lines(file)
        if cut:
            # No vote that was reported as saved. It is kept, elsewhere: else the next line would go on from it.
            aside = file.with_suffix(".cut")
            with aside.open("a", encoding="utf-8") as kept:
                kept.write(cut + "\n")
                kept.flush()
                os.fsync(kept.fileno())
            os.truncate(file, file.stat().st_size - len(file.read_bytes().rpartition(b"\n")[2]))
            self.told.append(say("{file}: its last line was cut short; it is now in {aside}", file=file, aside=aside))
        self._lines[file.stem] = lines
        self._asks |= {line.id: _asked(line) for line in lines}

    def asked(self, annotator: str) -> set[str]:
        """What this person has been asked, in this round or an earlier one: no prompt comes to one person twice."""
        shown = {pair.name for pair in self._pairs()} if self.anew else None
        before = {_asked(vote) for vote in self._long_ago if vote.annotator == annotator}
        mine = (vote for vote in self.votes(annotator) if shown is None or vote.pair in shown)
        return before | {self._asks[vote.id] for vote in mine}

    def votes(self, annotator: str) -> list[Vote]:
        return standing(self._lines.get(annotator, []))

    def next(self, annotator: str, again: str = "") -> Pair | None:
        """The pair that this person is to see now; None where there is none, or none yet. `again`: the name of one
        whose vote was taken back, which comes first."""
        mine, asked = self.votes(annotator), self.asked(annotator)
        for pair in (pair for pair in self._pairs() if pair.name == again):
            return self._show(annotator, pair)
        if self.full:
            return self._show(annotator, None)
        known = [pair for pair in self.gold if pair.asks not in asked]
        rated = sum(vote.gold is None for vote in mine)
        if known and rated >= (GOLD_EVERY - 1) * (len(mine) - rated + 1):
            return self._show(annotator, known[0])
        free = self._free(annotator)
        self.drawer.need(len(self.drawer.pairs) - len(free) + AHEAD)
        return self._show(annotator, free[0] if free else None)

    def _pairs(self) -> list[Pair]:
        return [*self._checks, *self.drawer.pairs, *self.gold]

    def _free(self, annotator: str) -> list[Pair]:
        """The pairs that are left for this person: neither seen by them nor labelled or being read by enough others."""
        asked, now = self.asked(annotator), time.time()
        taken = Counter(
            vote.pair
            for other in self._lines
            if other != annotator
            for vote in self.votes(other)
            if vote.choice != SKIP and not vote.judge
        )
        for other, (name, since) in self._before.items():
            if other != annotator and now - since < GONE:
                taken[name] += 1
        return [
            pair
            for pair in [*self._checks, *(pair for pair in self.drawer.pairs if pair.name not in self._judged)]
            if pair.asks not in asked and taken[pair.name] < (2 if self.shared(pair) else 1)
        ]

    def _show(self, annotator: str, pair: Pair | None) -> Pair | None:
        name = "" if pair is None else pair.name
        if self._before.get(annotator, ("", 0.0))[0] != name:
            self._before[annotator] = (name, time.time())
            new = self._screens.with_suffix(".new")  # not synced: it outlives a crash of this process, which is enough
            new.write_text(json.dumps(self._before), encoding="utf-8")
            os.replace(new, self._screens)
        return pair

    def shared(self, pair: Pair) -> bool:
        """Whether two people are to see it, decided by its name alone."""
        return self.share > 0 and int(digest(["two people", pair.name]), 16) < self.share * 16**16

    def order(self, annotator: str, pair: Pair) -> list[int]:
        """On which side each answer stands for this person: by chance, and the same after a restart."""
        order = list(range(len(pair.candidates)))
        random.Random(digest([annotator, pair.name])).shuffle(order)
        return order

    def vote(self, annotator: str, given: dict[str, Any]) -> Vote:
        """Save a vote. `given` names answers by their place on the screen. One that was saved already, whose reply got
        lost, is not saved twice.

        Raises NotNow for a pair that is not this person's to vote on, and UserError for what is no vote.
        """
        for line in self._lines.get(annotator, []):
            if line.id == given.get("id"):
                return line
        pair = next((one for one in self._pairs() if one.name == given.get("pair")), None)
        if pair is None:
            raise NotNow(say("This pair is not shown any more: the stage has been trained again. Here is another."))
        if pair.asks in self.asked(annotator):
            raise NotNow(say("You have voted on this one already. Here is the next."))
        return self._save(annotator, self._read(annotator, pair, given))

    def _read(self, annotator: str, pair: Pair, given: dict[str, Any]) -> Vote:
        order = self.order(annotator, pair)

        def named(place: Any) -> Any:
            return order[place] if isinstance(place, int) and 0 <= place < len(order) else place

        ranking, edit, guidelines = given.get("ranking"), given.get("edit"), given.get("guidelines")
        if given.get("id") in self._asks:  # else one vote could be taken for the other
            raise UserError("what the page sent is no vote: its id is that of another person's vote")
        try:
            vote = Vote(
                id=given["id"],
                time=datetime.now(UTC),
                annotator=annotator,
                pair=pair.name,
                prompt=pair.prompt,
                candidates=pair.candidates,
                shown=order,
                choice=named(given["choice"]),
                ranking=[named(place) for place in ranking] if ranking else None,
                strength=given.get("strength"),
                guidelines={key: named(value) for key, value in guidelines.items()} if guidelines else None,
                reasons=given.get("reasons") or [],
                edit=files.Edit(candidate=named(edit["candidate"]), text=edit["text"].strip()) if edit else None,
                gold=pair.gold,
                seconds=given["seconds"],
                choose=self.drawer.choose,
                share=pair.gold is None and self.shared(pair),
            )
        except ValidationError as error:
            raise UserError(f"what the page sent is no vote: {files.first_problem(error)}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"what the page sent is no vote: {error}") from error
        self._check_edit(vote)
        return vote

    def _check_edit(self, vote: Vote) -> None:
        """Raises UserError for a corrected answer that training would refuse."""
        from pipeline.data.tokens import marks

        if vote.edit and self.drawer.bench and (spelt := marks(self.drawer.bench.tokenizer, vote.edit.text)):
            raise UserError(
                f"the corrected answer holds {spelt[0]!r}, a special token that would end or forge a turn: "
                "write it otherwise"
            )

    def undo(self, annotator: str, id: str) -> Vote | None:
        """Take back this person's last vote, which is returned; None where there is none. `id` is the undo's own."""
        lines = self._lines.get(annotator, [])
        done = next((line for line in lines if line.id == id), None)
        if done is not None:
            return next(line for line in lines if line.id == done.undoes)
        mine = self.votes(annotator)
        if not mine:
            return None
        back = {"id": id, "time": datetime.now(UTC), "choice": SKIP, "ranking": None, "undoes": mine[-1].id}
        self._save(annotator, mine[-1].model_copy(update=back))
        return mine[-1]

    def _save(self, annotator: str, vote: Vote) -> Vote:
        files.append(self.folder / f"{check_annotator(annotator)}.jsonl", vote)
        self._lines.setdefault(annotator, []).append(vote)
        self._asks[vote.id] = _asked(vote)
        self.round = self._count()
        return vote

    def _standing(self) -> list[Vote]:
        return [vote for lines in self._lines.values() for vote in standing(lines)]

    def _count(self) -> Progress | None:
        return self.count(self._standing()) if self.count else None

    def favourite(self, vote: Vote) -> str:
        """What the reward model thinks of the answers just compared, for the person who has voted."""
        pair = next((one for one in self.drawer.pairs if one.name == vote.pair), None)
        if pair is None or pair.scores is None or not isinstance(vote.choice, int):
            return ""
        best = pair.scores.index(max(pair.scores))
        if best == vote.choice:
            return say("The reward model preferred the same answer.")
        return say("The reward model preferred another answer.")

    def progress(self, annotator: str) -> dict[str, Any]:
        """How far this person is: votes, seconds for each, and what is left as far as that is known."""
        mine, left = self.votes(annotator), len(self._free(annotator))
        seconds = sum(vote.seconds for vote in mine) / len(mine) if mine else 0.0
        of_all = {"done": len(mine), "seconds": seconds, "left": left, "more": not self.drawer.finished}
        return {**of_all, "round": say_again(self.round.told) if self.round else ""}


def _asked(vote: Vote) -> str:
    return digest(prompt_key({"prompt": vote.prompt}))
