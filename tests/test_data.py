"""Every row is used or refused with its place and reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from pipeline.data.contracts import DEMONSTRATION, LANGUAGE_MODELING, PREFERENCE, QUESTION
from pipeline.data.load import DataSpec, read_source, read_split
from pipeline.errors import UserError

USER = {"role": "user", "content": "q"}
SAYS = {"role": "assistant", "content": "a"}


def rows_file(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return str(path)


@pytest.mark.parametrize(
    ("contract", "row", "reason"),
    [
        (LANGUAGE_MODELING, {"txt": "x"}, "has no field 'text'"),
        (LANGUAGE_MODELING, {"text": "  "}, "field 'text' is empty"),
        (LANGUAGE_MODELING, {"text": True}, "field 'text' is a boolean, expected text"),
        (LANGUAGE_MODELING, {"text": None}, "field 'text' is null, expected text"),
        (LANGUAGE_MODELING, [1], "is not a JSON object"),
        (LANGUAGE_MODELING, '{"text": "x"', "is broken JSON"),
        (LANGUAGE_MODELING, '{"text": "\\ud800"}', "half of a surrogate pair"),
        (DEMONSTRATION, {"messages": [USER]}, "ends with the role 'user', expected 'assistant'"),
        (DEMONSTRATION, {"messages": [USER, {"role": "bot", "content": "x"}]}, "messages[2].role is 'bot'"),
        (
            DEMONSTRATION,
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "messages[2] field 'content' is empty",
        ),
        (DEMONSTRATION, {"messages": [SAYS, USER, SAYS]}, "begins with the role 'assistant'"),
        (PREFERENCE, {"prompt": [USER], "chosen": [USER, SAYS], "rejected": [SAYS]}, "begins with the role 'user'"),
        (QUESTION, {"prompt": [USER], "answer": "x", "choices": None}, "not a list of texts"),
        (DEMONSTRATION, {"messages": []}, "field 'messages' is empty"),
        (DEMONSTRATION, {"messages": ["hello"]}, "messages[1] is text, expected"),
        (DEMONSTRATION, {"prompt": "x"}, "has no field 'completion'"),
        (DEMONSTRATION, {"prompt": [USER], "completion": "x"}, "both must be text, or both lists of messages"),
        (PREFERENCE, {"prompt": "p", "chosen": "c", "rejected": "c"}, "are equal, so the pair teaches nothing"),
        (PREFERENCE, {"prompt": "p", "chosen": "", "rejected": "c"}, "field 'chosen' is empty"),
        (PREFERENCE, {"prompt": [USER, SAYS], "chosen": [SAYS], "rejected": [USER]}, "ends with the role 'assistant'"),
        (QUESTION, {"prompt": [USER], "answer": "x", "choices": ["y"]}, "not among 'choices'"),
    ],
)
def test_unfit_rows_are_named(tmp_path: Path, contract: Any, row: Any, reason: str) -> None:
    good = {"text": "x", "messages": [USER, SAYS], "prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"}
    path = rows_file(tmp_path, [{**good, "answer": "x"}, row])
    with pytest.raises(UserError) as caught:
        read_source(path, contract, DataSpec(path=path))
    assert f"{path}:2: " in str(caught.value) and reason in str(caught.value)


def test_twenty_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": ""}] * 33 + [{"text": "x"}])
    with pytest.raises(UserError) as caught:
        read_source(path, LANGUAGE_MODELING, DataSpec(path=path))
    assert str(caught.value).count("is empty") == 20
    assert "33 unfit rows" in str(caught.value) and "and 13 more" in str(caught.value)


def test_skipping_counts_every_row(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": "x"}, {"text": ""}, "{", {"text": "y"}, b"\xff".decode("latin1")])
    source = read_source(path, LANGUAGE_MODELING, DataSpec(path=path, on_bad_row="skip"))
    counts = source.counts().as_json()
    assert counts["rows"] == 5 == counts["used"] + sum(counts["refused"].values())
    assert [entry["place"].rsplit(":", 1)[1] for entry in source.refused] == ["2", "3", "5"]


def test_empty_missing_and_wrong_files(tmp_path: Path) -> None:
    for path, says in (
        (rows_file(tmp_path, [], "empty.jsonl"), "is empty"),
        (str(tmp_path / "none.jsonl"), "no such file"),
        (rows_file(tmp_path, ["[1, 2"], "list.json"), "is broken JSON"),
        (rows_file(tmp_path, ["x"], "table.xlsx"), "unknown kind of file"),
        (rows_file(tmp_path, ["x"], "not.jsonl.gz"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            read_source(path, LANGUAGE_MODELING, DataSpec(path=path))


def test_a_share_is_held_out_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 10}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(50)]
    path = rows_file(tmp_path, rows)
    split = read_split(DataSpec(path=path, test=0.2), PREFERENCE, seed=1)
    assert split.test is not None and len(split.test) == 10 and len(split.train) == 40
    assert not {row["prompt"] for row in split.train} & {row["prompt"] for row in split.test}
    again = read_split(DataSpec(path=path, test=0.2), PREFERENCE, seed=1)
    assert list(again.train) == list(split.train)


def test_a_whole_number_holds_out_that_many_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 10}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(50)]
    path = rows_file(tmp_path, rows)
    split = read_split(DataSpec(path=path, test=3), PREFERENCE, seed=1)
    assert split.test is not None and len(split.test) == 3 * 5 and len(split.train) == 7 * 5
    assert len({row["prompt"] for row in split.test}) == 3
    assert not {row["prompt"] for row in split.train} & {row["prompt"] for row in split.test}
    with pytest.raises(UserError, match="holding out 10 of the 10 prompts leaves no row to train on"):
        read_split(DataSpec(path=path, test=10), PREFERENCE, seed=1)
    for test in (0, 1, -2, 1.5, 1.0, True):
        with pytest.raises(ValueError, match=r"a share .*, for example 0.1, or a whole number of prompts from 2 up"):
            DataSpec(path=path, test=test)


def test_dialogues_are_split_by_what_is_asked_not_by_their_system_prompt(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be kind"}
    rows = [{"messages": [system, {"role": "user", "content": f"q{i % 50}"}, SAYS]} for i in range(100)]
    path = rows_file(tmp_path, rows)
    split = read_split(DataSpec(path=path, test=0.1), DEMONSTRATION, seed=1)
    counts = split.sources[0].counts().as_json()
    assert split.test is not None and len(split.test) == 10
    assert counts["rows"] == 100 == counts["used"] + counts["held_out"] and counts["held_out"] == 10


def test_dialogues_that_begin_with_one_question_stay_on_one_side(tmp_path: Path) -> None:
    system, more = {"role": "system", "content": "be kind"}, {"role": "user", "content": "and then?"}
    short = [{"messages": [system, {"role": "user", "content": f"q{i}"}, SAYS]} for i in range(20)]
    long = [{"messages": [{"role": "user", "content": f"Q{i}"}, SAYS, more, SAYS]} for i in range(0, 20, 2)]
    split = read_split(DataSpec(path=rows_file(tmp_path, short + long), test=0.3), DEMONSTRATION, seed=1)

    def asked(rows: Any) -> set[str]:
        return {next(m["content"].lower() for m in row["messages"] if m["role"] == "user") for row in rows}

    assert split.test and len(asked(split.test)) == 6 and not asked(split.train) & asked(split.test)
    assert len(split.train) + len(split.test) == 30


def test_a_split_of_prompts_that_share_nothing_is_the_one_of_its_seed(tmp_path: Path) -> None:
    """By hand: the prompts' digests in order, shuffled by the seed, the first of them held out."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, SAYS, {"role": "user", "content": "w"}, SAYS]}
        for i in range(20)
    ]
    split = read_split(DataSpec(path=rows_file(tmp_path, rows), test=0.2), DEMONSTRATION, seed=3)
    turns = [json.dumps([(m["role"], m["content"], None) for m in row["messages"][:-1]]) for row in rows]
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in turns]
    drawn = sorted(digests)
    random.Random(3).shuffle(drawn)
    assert split.test and [r["messages"] for r in split.test] == [
        r["messages"] for r, d in zip(rows, digests, strict=True) if d in drawn[:4]
    ]


def test_formats_of_public_sets(tmp_path: Path) -> None:
    hh = {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    torn = {**hh, "rejected": "\n\nHuman: other\n\nAssistant: no"}
    path = rows_file(tmp_path, [hh, torn], "hh.jsonl")
    source = read_source(path, PREFERENCE, DataSpec(path=path, format="hh", on_bad_row="skip"))
    assert source.rows[0]["prompt"] == [{"role": "user", "content": "hi"}]
    assert source.rows[0]["chosen"] == [{"role": "assistant", "content": "yo"}]
    assert source.refused[0]["reason"] == "the prompts of 'chosen' and 'rejected' differ"

    alpaca = tmp_path / "alpaca.jsonl.gz"
    alpaca.write_bytes(gzip.compress(json.dumps({"instruction": "do", "input": "this", "output": "done"}).encode()))
    row = read_source(str(alpaca), DEMONSTRATION, DataSpec(path=str(alpaca), format="alpaca")).rows[0]
    assert row["prompt"][0]["content"] == "do\n\nthis" and row["completion"][0]["content"] == "done"


def test_the_demo_data_is_what_its_script_writes() -> None:
    made = subprocess.run([sys.executable, "scripts/make_data.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def test_no_test_prompt_of_the_demo_data_is_trained_on() -> None:
    def asked(file: str) -> set[str]:
        rows = [json.loads(line) for line in (ROOT / "data" / file).read_text(encoding="utf-8").splitlines()]
        turns = [m for row in rows for m in row.get("messages", row.get("prompt", []))]
        return {turn["content"] for turn in turns if turn["role"] == "user"}

    trained = asked("demonstrations.jsonl") | asked("comparisons.jsonl") | asked("prompts.jsonl")
    for held_out in ("questions", "demonstrations_test", "comparisons_test", "prompts_test"):
        assert not asked(f"{held_out}.jsonl") & trained
