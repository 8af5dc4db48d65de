"""Votes: a line is checked whole, a cut last line is told, an undo takes back, a name stays in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.contracts import DEMONSTRATION, PREFERENCE, RATED, Contract
from pipeline.data.load import DataSpec, read_source
from pipeline.data.voted import read_voted
from pipeline.data.votes import append, check_annotator, pair_of, parse, read_votes
from pipeline.errors import UserError


def vote(number: int, **more: Any) -> dict[str, Any]:
    """A line as a program without our code would write it."""
    texts = ["It is tin.", "It is salt."]
    answers = [{"text": text, "stage": "sft", "adapter": "a" * 64, "seed": 1, "temperature": 1.0} for text in texts]
    row = {
        "id": f"v{number}", "time": "2026-11-28T17:00:00Z", "annotator": "ada", "prompt": f"What is {number}?",
        "candidates": answers, "shown": [1, 0], "choice": 1, "ranking": None, "strength": 2,
        "guidelines": {"helpful": "tie"}, "reasons": ["wrong"], "edit": {"candidate": 0, "text": "It is wool."},
        "gold": None, "seconds": 3.5, "choose": "random", "share": False, "undoes": None,
    }  # fmt: skip
    row["pair"] = pair_of(row["prompt"], texts)
    return {**row, **more}


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "ada.jsonl"
    for number in range(3):
        append(file, parse(json.dumps(vote(number)), "here"))
    append(file, parse(json.dumps(vote(1, id="u", undoes="v1")), "here"))
    assert [json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines()] == ["v0", "v1", "v2", "u"]
    votes, told = read_votes(tmp_path)
    assert [one.id for one in votes] == ["v0", "v2"] and not told
    assert votes[0].edit and votes[0].edit.text == "It is wool." and votes[0].time.tzinfo


def test_a_cut_last_line_is_told_and_costs_no_other(tmp_path: Path) -> None:
    whole = "".join(json.dumps(vote(number)) + "\n" for number in range(2))
    (tmp_path / "ada.jsonl").write_text(whole[:-40], encoding="utf-8")
    votes, told = read_votes(tmp_path)
    assert [one.id for one in votes] == ["v0"]
    assert "ada.jsonl: its last line was cut short" in told[0]


def test_a_last_line_without_its_end_is_whole_and_the_next_vote_stands_below_it(tmp_path: Path) -> None:
    """Editors leave a file so."""
    file = tmp_path / "ada.jsonl"
    file.write_text(json.dumps(vote(0)) + "\n" + json.dumps(vote(1)), encoding="utf-8")
    (tmp_path / "old.jsonl").mkdir()
    assert [one.id for one in read_votes(tmp_path)[0]] == ["v0", "v1"]
    append(file, parse(json.dumps(vote(2)), "here"))
    assert read_votes(tmp_path) == ([parse(json.dumps(vote(number)), "here") for number in range(3)], [])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choice": 2}, "names candidate 2, but there are 2"),
        ({"choice": "both"}, "choice"),
        ({"shown": [0, 0]}, "shown is"),
        ({"strength": 4}, "strength"),
        ({"time": "yesterday"}, "time"),
        ({"prompt": "What else?"}, "pair is not that of this prompt"),
        ({"note": "mine"}, "note"),
        ({"annotator": "\x1b[31mada"}, "annotator is"),
        ({"ranking": [0, 1]}, "ranking begins with 0"),
    ],
)
def test_a_line_changed_by_hand_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    lines = [json.dumps(vote(0)), json.dumps({**vote(1), **change}), json.dumps(vote(2))]
    (tmp_path / "ada.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"ada\.jsonl:2: is no vote") as found:
        read_votes(tmp_path)
    assert said in str(found.value)


@pytest.mark.parametrize(
    ("corrected", "choice", "ranking", "below"),
    [
        ("b", 1, [1, 2, 0], "bca"),  # the best of three: over all
        ("c", 1, [1, 2, 0], "ca"),  # the second: whether it is better than the best, nobody said
        ("a", 1, [1, 2, 0], "a"),
        ("b", 1, None, "bac"),
        ("c", 1, None, "c"),
        ("a", "tie", None, "a"),
        ("a", "skip", None, "a"),
        ("b", "both_bad", None, "bac"),
    ],
)
def test_a_correction_is_better_than_what_stands_no_higher(
    tmp_path: Path, corrected: str, choice: Any, ranking: Any, below: str
) -> None:
    """Beside the comparisons that the vote gives without it."""
    answers = [{"text": text, "stage": "sft", "adapter": "", "seed": 0, "temperature": 1.0} for text in "abc"]
    line = vote(0, candidates=answers, shown=[0, 1, 2], choice=choice, ranking=ranking, guidelines=None)
    line |= {"pair": pair_of("What is 0?", list("abc"))}
    found = {}
    for edit in (None, {"candidate": "abc".index(corrected), "text": "right"}):
        (tmp_path / "ada.jsonl").write_text(json.dumps({**line, "edit": edit}) + "\n", encoding="utf-8")
        rows = [row for _, _, rows in read_voted(str(tmp_path), "preference") for row in rows]
        found[edit is not None] = [(row["chosen"], row["rejected"]) for row in rows]
    assert sorted(found[True]) == sorted(found[False] + [("right", worse) for worse in below])


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"candidate": 0, "text": "It is salt."}, [("It is salt.", "It is tin.")]),
        ({"candidate": 1, "text": "It is tin."}, [("It is salt.", "It is tin."), ("It is tin.", "It is salt.")]),
    ],
)
def test_a_correction_into_another_answer_gives_no_pair_twice_and_none_of_equals(
    tmp_path: Path, edit: dict[str, Any], expected: list[Any]
) -> None:
    (tmp_path / "ada.jsonl").write_text(json.dumps(vote(0, edit=edit)) + "\n", encoding="utf-8")
    rows = read_source(str(tmp_path), PREFERENCE, DataSpec(path=str(tmp_path))).rows
    assert [(row["chosen"], row["rejected"]) for row in rows] == expected


def test_the_order_of_candidates_does_not_name_another_pair() -> None:
    assert pair_of("q", ["a", "b"]) == pair_of("q", ["b", "a"]) != pair_of("q", ["a", "c"])


@pytest.mark.parametrize("name", ["../ada", "a/b", "", ".", ".ada", "a\0b", "a\\b", "x" * 41, "a.jsonl", "-a"])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a file"):
        check_annotator(name)


def test_names_of_any_script_are_taken() -> None:
    assert [check_annotator(name) for name in ("Ada L", "小明", "Zoe\u0308")] == ["Ada L", "小明", "Zo\u00eb"]


def test_a_line_that_stands_twice_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(vote(number)) for number in (0, 1, 0)]
    (tmp_path / "ada.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"ada\.jsonl:3: the same vote stands on .*ada\.jsonl:1"):
        read_votes(tmp_path)
    for name in ("ada", "ada copy"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    for reads in (lambda: read_votes(tmp_path), lambda: list(read_voted(str(tmp_path), "preference"))):
        with pytest.raises(UserError, match=r"ada\.jsonl:1: the same vote stands on .*ada copy\.jsonl:1"):
            reads()


@pytest.mark.parametrize(
    ("contract", "expected"),
    [
        (PREFERENCE, [("It is salt.", "It is tin."), ("It is wool.", "It is tin."),
                      ("c", "a"), ("c", "b"), ("a", "b")]),
        (DEMONSTRATION, ["It is wool."]),
        (RATED, [("It is tin.", False), ("It is salt.", True), ("It is wool.", True), ("It is tin.", False),
                 ("It is salt.", False), ("b", False), ("c", True)]),
    ],
)  # fmt: skip
def test_votes_are_rows_of_each_stage(tmp_path: Path, contract: Contract, expected: list[Any]) -> None:
    """Comparisons, corrections, thumbs. Ties, skips, known answers and what was taken back are counted, not trained
    on; a file beside them that the page keeps is none of them."""
    ranked = [{"text": text, "stage": "sft", "adapter": "", "seed": 0, "temperature": 1.0} for text in "abc"]
    prompt = [{"role": "user", "content": "Which?"}]
    of_three = {"candidates": ranked, "shown": [0, 1, 2], "choice": 2, "ranking": [2, 0, 1], "edit": None}
    of_three |= {"guidelines": None, "prompt": prompt, "pair": pair_of(prompt, list("abc"))}
    bare = {"edit": None}
    lines = [
        vote(0), vote(1, choice="tie", **bare), vote(2, choice="skip", **bare), vote(3, gold=1), vote(4),
        vote(4, id="back", undoes="v4"), vote(5, choice="both_bad", **bare), vote(6, **of_three),
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "ada.jsonl").write_text(text + '{"id": "cut', encoding="utf-8")
    (tmp_path / ".drawn").write_text("{}", encoding="utf-8")
    source = read_source(str(tmp_path), contract, DataSpec(path=str(tmp_path)))

    def said(answer: Any) -> str:
        return answer if isinstance(answer, str) else answer[-1]["content"]

    if contract is PREFERENCE:
        found: list[Any] = [(said(row["chosen"]), said(row["rejected"])) for row in source.rows]
    elif contract is DEMONSTRATION:
        found = [said(row["completion"]) for row in source.rows]
    else:
        found = [(said(row["completion"]), row["label"]) for row in source.rows]
    assert found == expected
    assert source.file_rows == source.layouts.total() == 9 and not source.reasons
    assert source.layouts["vote taken back"] == source.layouts["vote cut short"] == 1
    assert source.layouts["vote on a known answer"] == 1
