"""Votes of Label Studio, Argilla and TRL become ours, and ours theirs: what was said survives, the rest is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_votes import vote

from pipeline.data.voted import read_voted
from pipeline.data.votes import Vote, pair_of, read_votes
from pipeline.errors import UserError
from pipeline.label.agreement import weigh
from pipeline.label.exchange import Shape, exchange

HOSTILE = "<script>alert(1)</script> \x1b[31m\u202e"


def write(folder: Path, name: str, rows: list[Any]) -> str:
    """A .json list, or one a line."""
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def label(folder: Path) -> str:
    """Votes of two people of every kind: each choice, a ranking, corrections, a known answer, one taken back."""
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HOSTILE}]
    three = [
        {"text": text, "stage": "dpo", "adapter": "b", "seed": 3, "temperature": 0.5, "best_of": 4} for text in "abc"
    ]
    of_three = {"candidates": three, "shown": [1, 0, 2], "choice": 2, "ranking": [2, 0, 1], "guidelines": {"x": 1}}
    of_three |= {"prompt": prompt, "pair": pair_of(prompt, list("abc")), "edit": {"candidate": 2, "text": HOSTILE}}
    bare = {"edit": None}
    ada = [
        vote(0), vote(1, choice="tie", **bare), vote(2, choice="both_bad"), vote(3, choice="skip", **bare),
        vote(4, gold=1, **bare), vote(5, **of_three), vote(6, choose="gap", share=True, strength=None, **bare),
    ]  # fmt: skip
    bob = [{**row, "id": f"b{row['id']}", "annotator": "小明", "choice": 0} for row in (ada[0], ada[6])]
    write(folder, "labels/ada.jsonl", ada)
    write(folder, "labels/小明.jsonl", [*bob, {**bob[0], "id": "back", "undoes": bob[0]["id"]}])
    return str(folder / "labels")


def by_id(path: Path) -> dict[str, Vote]:
    return {one.id: one for one in read_votes(path)[0]}


@pytest.mark.parametrize("shape", ["label-studio", "argilla"])
def test_what_goes_to_a_tool_and_comes_back_is_the_same_votes(tmp_path: Path, shape: Shape) -> None:
    told = exchange(label(tmp_path), tmp_path / "theirs", shape)
    assert told[1:] == ["not in it: 2 lines that take a vote back or were taken back"]
    exchange(str(tmp_path / "theirs"), tmp_path / "back", "votes")
    assert by_id(tmp_path / "back") == by_id(tmp_path / "labels") and len(by_id(tmp_path / "back")) == 8
    assert weigh(read_votes(tmp_path / "back")[0])["pairs_of_several"] == 1


def test_the_folder_of_rounds_stands_for_the_votes_of_all(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / "labels" / f"round-{n}").mkdir(parents=True)
        write(tmp_path / "labels", f"round-{n}/ada.jsonl", [vote(n)])
    exchange(str(tmp_path / "labels"), tmp_path / "out", "votes")
    assert len(read_votes(tmp_path / "out")[0]) == 2


@pytest.mark.parametrize(("shape", "kind"), [("trl", "preference"), ("kto", "rated")])
def test_rows_for_trl_are_what_a_stage_reads_and_come_back_as_that(tmp_path: Path, shape: Shape, kind: Any) -> None:
    def rows(path: str) -> list[str]:
        return sorted(json.dumps(row, sort_keys=True) for _, _, rows in read_voted(path, kind) for row in rows)

    labels = label(tmp_path)
    exchange(labels, tmp_path / "rows.jsonl", shape)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.dumps(json.loads(line), sort_keys=True) for line in lines) == rows(labels)
    exchange(str(tmp_path / "rows.jsonl"), tmp_path / "back", "votes")
    back = read_votes(tmp_path / "back")[0]
    assert {one.annotator for one in back} == {"ada", "小明"} and not any(one.shown for one in back)
    if shape == "trl":
        assert rows(str(tmp_path / "back")) == rows(labels)


def task(number: int, *annotations: dict[str, Any], **data: Any) -> dict[str, Any]:
    """As Label Studio's server exports it (tasks/serializers.py), with regions as label_studio_sdk 2.1 makes them."""
    base = {"was_cancelled": False, "lead_time": 9.5, "created_at": "2026-05-26T12:00:00.5Z", "completed_by": 7}
    return {
        "id": number, "data": {"prompt": f"q{number}", "text1": "A", "text2": "B", "source": "web", **data},
        "annotations": [{**base, "id": i, **one} for i, one in enumerate(annotations)], "predictions": [], "meta": {},
    }  # fmt: skip


def pairwise(side: str) -> dict[str, Any]:
    return {"id": "x", "from_name": "pw", "to_name": "pw", "type": "pairwise", "value": {"selected": side}}


def choices(value: str, name: str = "how") -> dict[str, Any]:
    return {"id": "y", "from_name": name, "to_name": "prompt", "type": "choices", "value": {"choices": [value]}}


def test_label_studios_own_pairwise_template_is_read(tmp_path: Path) -> None:
    ada = {"id": 3, "email": "ada@example.com", "first_name": "", "last_name": ""}
    rows = [
        task(0, {"result": [pairwise("left"), choices("sure")]}, {"result": [pairwise("right")], "completed_by": ada}),
        task(1, {"result": [choices("Tie")]}, {"result": [], "completed_by": ada}),
        task(2, {"result": [], "was_cancelled": True}),
        task(3, {"result": [pairwise("left")]}, {"result": [pairwise("right")], "created_at": "2026-06-01T00:00:00Z"}),
        task(4),
    ]
    told = exchange(write(tmp_path, "export.json", rows), tmp_path / "labels", "votes")
    assert told == [
        f"5 votes by 2 people are in {tmp_path / 'labels'}",
        "not in it: 1 answers to other questions",
        "not in it: 1 answers of people who chose nothing",
        "not in it: 1 votes of one person on one pair before their last",
        "not in it: 1 tasks that nobody has answered",
        "'ada@example.com' is ada-example-com here",
    ]
    votes = read_votes(tmp_path / "labels")[0]
    found = [(one.annotator, one.prompt[0]["content"], one.choice, one.shown) for one in votes]  # type: ignore[index]
    assert sorted(map(str, found)) == sorted(map(str, [
        ("7", "q0", 0, [0, 1]), ("ada-example-com", "q0", 1, [0, 1]), ("7", "q1", "tie", [0, 1]),
        ("7", "q2", "skip", [0, 1]), ("7", "q3", 1, [0, 1]),
    ]))  # fmt: skip
    assert [c.text for c in votes[0].candidates] == ["A", "B"] and votes[0].seconds == 9.5
    assert votes[0].time.isoformat() == "2026-05-26T12:00:00.500000+00:00"
    assert weigh(votes)["alpha"]["choice"] is None and weigh(votes)["pairs_of_several"] == 1


def test_argillas_own_ranking_template_is_read(tmp_path: Path) -> None:
    """As Record.to_dict of argilla 2.8 writes Settings.for_ranking."""

    def record(number: int, **ranks: tuple[int, int]) -> dict[str, Any]:
        given = [
            {"user_id": user, "value": [{"value": f"response{n}", "rank": rank} for n, rank in enumerate(both, 1)]}
            for user, both in ranks.items()
        ]
        fields = {"instruction": f"q{number}", "response1": "A", "response2": HOSTILE}
        responses = {"ranking": given} if given else {}
        more = {"metadata": {}, "suggestions": {}, "vectors": {}, "status": "pending", "_server_id": None}
        return {"id": str(number), "fields": fields, "responses": responses, **more}

    rows = [record(0, u1=(1, 2), u2=(2, 1)), record(1, u1=(1, 1)), record(2)]
    rows[0]["responses"]["comment"] = [{"user_id": "u1", "value": "nice"}]
    told = exchange(write(tmp_path, "records.json", rows), tmp_path / "labels", "votes")
    assert told[1:] == ["not in it: 1 answers to other questions", "not in it: 1 tasks that nobody has answered"]
    votes = read_votes(tmp_path / "labels")[0]
    assert [(one.annotator, one.choice) for one in votes] == [("u1", 0), ("u1", "tie"), ("u2", 1)]
    assert votes[0].candidates[1].text == HOSTILE and votes[0].shown == []
    assert weigh(votes)["left"] is None


def test_what_is_chosen_anew_in_the_tool_is_another_vote(tmp_path: Path) -> None:
    exchange(label(tmp_path), tmp_path / "theirs", "label-studio")
    file = tmp_path / "theirs" / "answers2.json"
    tasks = json.loads(file.read_text(encoding="utf-8"))
    assert tasks[0]["annotations"][0]["result"][1]["value"] == {"selected": "right"}
    tasks[0]["annotations"][0]["result"][1]["value"]["selected"] = "left"
    write(tmp_path, "theirs/answers2.json", tasks)
    exchange(str(tmp_path / "theirs"), tmp_path / "back", "votes")
    before, after = by_id(tmp_path / "labels"), by_id(tmp_path / "back")
    (new,) = (after[key] for key in after.keys() - before.keys())
    assert before.keys() - after.keys() == {"v0"}
    assert (new.annotator, new.choice, new.shown, new.edit) == ("ada", 0, [1, 0], before["v0"].edit)
    assert new.strength is None and not new.reasons and new.candidates == before["v0"].candidates


def test_a_person_whose_name_is_a_path_stays_in_the_folder_and_long_answers_are_kept(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    rows = [task(0, {"result": [pairwise("right")], "completed_by": {"id": 1, "email": "../../x/\x00y"}}, text2=long)]
    exchange(write(tmp_path, "export.json", rows), tmp_path / "out" / "labels", "votes")
    assert [file.name for file in (tmp_path / "out").rglob("*.jsonl")] == ["x-y.jsonl"]
    assert read_votes(tmp_path / "out" / "labels")[0][0].candidates[1].text == long


LEFT = {"result": [pairwise("left")]}
TRL = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([task(0, LEFT), task(1, {"result": "x"})], r"export.json\[2\] annotation 1: has no list 'result'"),
        ([task(0, LEFT, text2=None)], r"export.json\[1\]: cannot tell the prompt and its answers among prompt, text1"),
        ([task(0, LEFT, text3="C")], r"holds no votes \(1 answers to other questions, 1 answers of people"),
        ([{**task(0, LEFT), "data": []}], r"export.json\[1\]: is no task as Label Studio exports it"),
        ([task(0, {**LEFT, "lead_time": -1})], r"\[1\] annotation 1: gives no vote: seconds"),
        ([task(0, {**LEFT, "created_at": "May"})], r"\[1\] annotation 1: gives no vote: time"),
        ([task(0, {**LEFT, "completed_by": "../"})], r"\[1\] annotation 1: names no person"),
        ([task(0, {**LEFT, "completed_by": "a@b"}, {**LEFT, "completed_by": "a.b"})], "would both be the person 'a-b'"),
        ([task(0, LEFT, onebase="{")], r"\[1\]: what stands under 'onebase' is not as it was written"),
        ([task(0, LEFT, onebase={"candidates": [1]})], r"\[1\] annotation 1: gives no vote"),
        ([{"fields": {"prompt": "q", "a": "x", "b": "y"}, "responses": {"r": [{"value": "a"}]}}], "no 'user_id'"),
        ([{"fields": {"prompt": "q", "gpt": "x", "llama": "y"}, "responses": {}}], "name them prompt, answer1"),
        ([TRL, {"prompt": "q", "chosen": "a"}], r"export.json\[2\]: has no field 'rejected'.*What is read: votes"),
        ([TRL, "text"], r"export.json\[2\]: is not a JSON object"),
        ([{**TRL, "chosen": "b"}], r"\[1\]: fields 'chosen' and 'rejected' are equal"),
        ([task(0)], r"export.json holds no votes \(1 tasks that nobody has answered\)"),
        ([{"prompt": "q", "completion": "a", "label": True}], "holds no votes .*1 answers with thumbs that have no"),
    ],
)  # fmt: skip
def test_what_gives_no_vote_is_named_and_nothing_is_written(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        exchange(write(tmp_path, "export.json", rows), tmp_path / "labels", "votes")
    assert [file.name for file in tmp_path.iterdir()] == ["export.json"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    labels = label(tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "labels").iterdir()}
    with pytest.raises(UserError, match="labels is there already; choose another name"):
        exchange(write(tmp_path, "rows.jsonl", [TRL]), Path(labels), "votes")
    with pytest.raises(UserError, match="--as trl writes one file of rows; name one that ends in .jsonl"):
        exchange(labels, tmp_path / "rows", "trl")
    assert before == {file: file.read_bytes() for file in (tmp_path / "labels").iterdir()}


def test_a_stage_that_is_given_an_export_is_told_what_makes_votes_of_it(tmp_path: Path) -> None:
    from pipeline.data.contracts import PREFERENCE
    from pipeline.data.load import DataSpec, read_source

    path = write(tmp_path, "export.json", [task(0, LEFT)])
    with pytest.raises(UserError, match="make votes of the file with `onebase votes FILE labels`"):
        read_source(path, PREFERENCE, DataSpec(path=path))
