"""Votes as rows to train on: comparisons, right answers that people wrote, or answers with thumbs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.data import judged
from pipeline.data.contracts import Row, RowKind
from pipeline.data.votes import BOTH_BAD, SKIP, TIE, Vote, files_in, read_files, standing

Voted = tuple[str, str, list[Row]]
"""A line's place, what it is, and the rows that it gives."""


def is_of_votes(path: str) -> bool:
    """Whether a file, or the first one of a folder, holds votes, told by its first line."""
    if not Path(path).exists():
        return False
    for file in files_in(Path(path)):
        with file.open("rb") as lines:
            first = lines.readline()
        if first.strip():
            return all(f'"{key}":'.encode() in first for key in ("annotator", "pair", "candidates", "shown", "choice"))
    return False


def read_voted(path: str, kind: RowKind, rounds: int | None = None, judge_agreement: float = 0.0) -> Iterator[Voted]:
    """Every line of the files, or of those of rounds 1 to `rounds`: none is passed over without being counted as
    something.

    judge_agreement: the share of checked pairs on which a judge has to agree with people; 0 asks nothing. A pair that
    people voted on counts by their votes alone.

    Raises UserError naming file and line of one that is no vote, and for a judge that agrees with people too rarely.
    """
    read = read_files(files_in(Path(path), rounds))
    all_standing = [vote for placed, _ in read.values() for vote in standing([vote for _, vote in placed])]
    people = judged.by_people(all_standing)
    if kind in ("preference", "rated"):  # a judge corrects nothing
        judged.hold(path, all_standing, judge_agreement)
    for file, (placed, cut) in read.items():
        stands = {vote.id for vote in standing([vote for _, vote in placed])}
        for place, vote in placed:
            if vote.undoes is not None:
                yield place, "undo", []
            elif vote.id not in stands:
                yield place, "vote taken back", []
            elif vote.gold is not None:  # it is there to see attention by, and is not trained on
                yield place, "vote on a known answer", []
            elif vote.judge and vote.pair in people:
                yield place, "vote of a judge on a pair that people voted on", []
            else:
                rows = list(rows_of(vote, kind))
                word = "" if rows else "without a correction" if kind == "demonstration" else str(vote.choice)
                whose = "vote of a judge" if vote.judge else "vote"
                yield place, f"{whose} {word}".replace("_", " ").strip(), rows
        if cut:
            yield f"{file}:{len(placed) + 1}", "vote cut short", []


def teaches(vote: Vote, kind: RowKind) -> bool:
    """Whether a stage that learns rows of this kind learns anything from a vote that stands."""
    return vote.gold is None and any(rows_of(vote, kind))


def rows_of(vote: Vote, kind: RowKind) -> Iterator[Row]:
    """What a vote gives of a kind of rows; a pair that was skipped is not trained on."""
    texts, choice = [candidate.text for candidate in vote.candidates], vote.choice
    shared: Row = {"prompt": vote.prompt, "annotator": vote.annotator}

    def answer(text: str) -> Any:
        return text if isinstance(vote.prompt, str) else [{"role": "assistant", "content": text}]

    if kind == "prompt":
        yield shared
    elif kind == "demonstration" and vote.edit:
        yield {**shared, "completion": answer(vote.edit.text)}
    elif kind == "preference":
        for better, worse in _comparisons(vote):
            yield {**shared, "chosen": answer(better), "rejected": answer(worse)}
    elif kind == "rated":
        best, worst = (vote.ranking[0], vote.ranking[-1]) if vote.ranking else (choice, None)
        for index, text in enumerate(texts):
            if choice == BOTH_BAD or (isinstance(choice, int) and index != best and worst in (None, index)):
                yield {**shared, "completion": answer(text), "label": False}
            elif index == best and choice not in (TIE, SKIP):
                yield {**shared, "completion": answer(text), "label": True}
        if vote.edit:
            yield {**shared, "completion": answer(vote.edit.text), "label": True}


def _comparisons(vote: Vote) -> dict[tuple[str, str], None]:
    """The better and the worse text of each: the chosen answer over the others, of a ranking every two; and a corrected
    answer over the one it corrects and over all that the vote puts below that one.

    Source: arXiv 2407.21783, section 4.2.1, whose order is edited > chosen > rejected.
    """
    texts, choice = [candidate.text for candidate in vote.candidates], vote.choice
    pairs: list[tuple[int, int]] = []
    if isinstance(choice, int):
        others = [(choice, other) for other in range(len(texts)) if other != choice]
        pairs = list(combinations(vote.ranking, 2)) if vote.ranking else others
    found = [(texts[better], texts[worse]) for better, worse in pairs]
    if vote.edit:
        corrected = vote.edit.candidate
        below = range(len(texts)) if choice == BOTH_BAD else [worse for better, worse in pairs if better == corrected]
        found += [(vote.edit.text, texts[worse]) for worse in (corrected, *below)]
    return dict.fromkeys((better, worse) for better, worse in found if better != worse)
