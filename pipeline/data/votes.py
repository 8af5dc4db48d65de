"""What people said of answers side by side, one line a vote: `labels/<annotator>.jsonl`, which is only appended to.

`choice`, `ranking`, `guidelines`, `edit` and `gold` name answers by their index in `candidates`, whatever side they
stood on; `shown` is the order on the screen. A vote is taken back by a further line whose `undoes` names it.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.disk.atomic import digest, sha256_of_file
from pipeline.errors import UserError

Choice = int | Literal["tie", "both_bad", "skip"]
Choose = Literal["random", "gap", "uncertain", "disagree"]
TIE, BOTH_BAD, SKIP = "tie", "both_bad", "skip"
ANNOTATOR = re.compile(r"\w[\w -]{0,39}")
"""Of a person: it becomes a file, so it has letters (of any script), digits, - and _ and blanks alone."""


class Candidate(BaseModel):
    """One answer, and how it came about."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: str
    stage: str
    adapter: str
    """The sha256 of the stage's adapter; empty for the base, and for a known answer."""
    seed: int
    temperature: float = Field(ge=0, allow_inf_nan=False)
    best_of: int = Field(default=1, ge=1)
    """Of so many draws it is the one that the run's reward model scored highest."""


class Edit(BaseModel):
    """The right answer, as a person wrote it out of a candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    candidate: int = Field(ge=0)
    text: str = Field(min_length=1)


class Vote(BaseModel):
    """One line. It is checked whole: a line changed by hand must still be a vote."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(min_length=1)
    time: AwareDatetime
    annotator: str
    pair: str
    """pair_of() its prompt and candidates: the same for all annotators."""
    prompt: str | list[dict[str, Any]]
    candidates: list[Candidate] = Field(min_length=2)
    shown: list[int]
    """The candidates in their order on the screen, the left one first; empty where another tool has not noted it."""
    choice: Choice
    ranking: list[int] | None = None
    """All candidates, the best first; of three or more."""
    strength: int | None = Field(default=None, ge=0, le=3)
    guidelines: dict[str, int | Literal["tie"]] | None = None
    """By guideline, which candidate follows it better."""
    reasons: list[str] = []
    edit: Edit | None = None
    gold: int | None = None
    """Of a pair whose better answer is known: which it is."""
    seconds: float = Field(ge=0, allow_inf_nan=False)
    """From when the pair was shown to the vote."""
    choose: Choose = "random"
    """How the pair was chosen."""
    share: bool = False
    """The pair was meant for two people; of a judge's vote, for a person to check."""
    judge: bool = False
    """A machine voted: a reward model, or a model behind an endpoint."""
    undoes: str | None = None
    """The id of the vote that this line takes back. Such a line is no vote; what else it says repeats the vote's."""

    @model_validator(mode="after")
    def _names_its_candidates(self) -> Vote:
        if not self.annotator.isprintable():  # a name is printed in the terminal
            raise ValueError(f"annotator is {self.annotator!r:.60}, which holds signs that cannot be shown")
        count = len(self.candidates)
        for name, order in (("shown", self.shown), ("ranking", self.ranking)):
            if order and sorted(order) != list(range(count)):
                raise ValueError(f"{name} is {order}; it names each of the {count} candidates once")
        named = [self.choice, self.gold, *(self.guidelines or {}).values()] + [self.edit and self.edit.candidate]
        for index in named:
            if isinstance(index, int) and not 0 <= index < count:
                raise ValueError(f"names candidate {index}, but there are {count}, counted from 0")
        if self.ranking and self.choice != self.ranking[0] and isinstance(self.choice, int):
            raise ValueError(f"choice is {self.choice}, but ranking begins with {self.ranking[0]}")
        if self.pair != pair_of(self.prompt, [candidate.text for candidate in self.candidates]):
            raise ValueError("pair is not that of this prompt and these candidates: one of them was changed")
        return self

    def named(self, given: int | str) -> str:
        """A choice as the same text for everybody, though their lines may name the answers in another order: the place
        of the text that was chosen among the texts in the order of the alphabet."""
        texts = [candidate.text for candidate in self.candidates]
        return given if isinstance(given, str) else str(sorted(texts).index(texts[given]))


def pair_of(prompt: str | list[dict[str, Any]], texts: list[str]) -> str:
    """The name of some answers to a prompt, the same whoever sees them in whatever order."""
    return digest([prompt, sorted(texts)])


def check_annotator(name: str) -> str:
    """A person's name as a file is named by it. Raises UserError for one that cannot name a file."""
    name = unicodedata.normalize("NFC", name).strip()
    if not ANNOTATOR.fullmatch(name):
        raise UserError(
            f"the name {name!r:.60} cannot name a file of votes: use letters, digits, blanks, - and _, at most 40"
        )
    return name


def append(file: Path, vote: Vote) -> None:
    """Add a line. When this returns, it is on the disk. Raises UserError or OSError where it could not be put there."""
    line = (vote.model_dump_json() + "\n").encode()
    new = not file.exists()
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        if before and os.pread(descriptor, 1, before - 1) != b"\n":  # an editor took the last one away
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, before)  # else the next line would go on from a part of this one
            raise UserError(f"{file}: the disk took only a part of a vote; make room on it")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def files_in(path: Path, rounds: int | None = None) -> list[Path]:
    """The files of votes in a folder; or the one that is named. `rounds`: those of its rounds 1 to this one."""
    if rounds:
        return [file for n in range(1, rounds + 1) for file in files_in(of_round(path, n)) if file.is_file()]
    files = [file for file in path.glob("*.jsonl") if file.is_file()] if path.is_dir() else [path]
    return sorted(file for file in files if not file.name.startswith("."))


def of_round(path: Path, number: int) -> Path:
    """The folder of one round's votes."""
    return path / f"round-{number}"


def hash_rounds(path: str, rounds: int) -> str:
    """What the votes of rounds 1 to this one are, for fingerprints."""
    listed = files_in(Path(path), rounds)
    return digest([[file.parent.name, file.name, sha256_of_file(file)] for file in listed])


def read_placed(file: Path) -> tuple[list[tuple[str, Vote]], str]:
    """Every line of a file with its place, those that were taken back and those that take back included; and the last
    line as far as it goes, where it was cut short: it was never reported as saved.

    Raises UserError naming file and line of one that is no vote, or that stands there twice.
    """
    whole, _, cut = file.read_bytes().rpartition(b"\n")
    if cut and _is_whole(cut):
        whole, cut = whole + b"\n" + cut, b""
    placed: list[tuple[str, Vote]] = []
    place_by_id: dict[str, str] = {}
    for number, line in enumerate(whole.split(b"\n"), 1):
        if line.strip():
            place = f"{file}:{number}"
            vote = parse(line, place)
            if first := place_by_id.get(vote.id):
                raise UserError(f"{place}: the same vote stands on {first}. Take one of the two lines out of the file")
            place_by_id[vote.id] = place
            placed.append((place, vote))
    return placed, cut.decode("utf-8", "replace")


def read_files(files: Iterable[Path]) -> dict[Path, tuple[list[tuple[str, Vote]], str]]:
    """By file, what read_placed() gives. Raises UserError also where a person's vote stands in two of them: a copy that
    somebody keeps in the folder would count as much as the votes themselves. In another round's folder a judge may have
    given the same vote anew."""
    read: dict[Path, tuple[list[tuple[str, Vote]], str]] = {}
    place_by_vote: dict[tuple[Path, str, str], str] = {}
    for file in files:
        read[file] = read_placed(file)
        for place, vote in read[file][0]:
            if first := place_by_vote.get(key := (file.parent, vote.annotator, vote.id)):
                raise UserError(f"{place}: the same vote stands on {first}. Take one of the two out of the folder")
            place_by_vote[key] = place
    return read


def read_lines(file: Path) -> tuple[list[Vote], str]:
    """The same without places."""
    placed, cut = read_placed(file)
    return [vote for _, vote in placed], cut


def parse(line: bytes | str, place: str) -> Vote:
    """A line as a vote. Raises UserError naming its place, the key and what is wrong."""
    try:
        return Vote.model_validate_json(line)
    except ValidationError as error:
        problem = first_problem(error)
    raise UserError(
        f"{place}: is no vote as `onebase label` wrote it: {problem}. Restore the line, or take it out of the file"
    )


def first_problem(error: ValidationError) -> str:
    """The key that is wrong in a vote, and what is."""
    first = error.errors()[0]
    key = ".".join(str(step) for step in first["loc"])
    return f"{key}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_votes(path: Path) -> tuple[list[Vote], list[str]]:
    """The votes that stand in a file, or in all files of a folder; and what there is to tell of them.

    Raises UserError naming file and line of a row that is no vote, or that stands there twice.
    """
    votes: list[Vote] = []
    told = []
    for file, (placed, cut) in read_files(files_in(path)).items():
        votes += standing([vote for _, vote in placed])
        if cut:
            told.append(f"{file}: its last line was cut short and is left out: it was never reported as saved")
    return votes, told


def standing(lines: Iterable[Vote]) -> list[Vote]:
    """The votes that nobody took back."""
    lines = list(lines)
    undone = {line.undoes for line in lines}
    return [line for line in lines if line.undoes is None and line.id not in undone]
