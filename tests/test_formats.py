"""Rows in the formats people have become the shapes stages eat; every one is counted."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.data.contracts import DEMONSTRATION, LANGUAGE_MODELING, PREFERENCE, PROMPT_ONLY, QUESTION
from pipeline.data.load import DataSpec, Part, read_source, read_split
from pipeline.data.prompts import find_prompts, prompt_key
from pipeline.errors import UserError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def read(folder: Path, rows: list[Any], contract: Any, **spec: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_source(str(path), contract, DataSpec(path=str(path), **spec))


def bare(rows: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "_place"} for row in rows]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
HISTORY = [user("q1"), says("a1")]
TREE = {
    "message_tree_id": "t", "prompt": {"role": "prompter", "text": "p", "replies": [
        {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
        {"role": "assistant", "text": "best", "rank": 0, "replies": [
            {"role": "prompter", "text": "more", "replies": [{"role": "assistant", "text": "end", "rank": 0}]}]},
        {"role": "assistant", "text": "gone", "rank": 2, "deleted": True},
    ]},
}  # fmt: skip
CASES: list[tuple[dict[str, Any], Any, list[dict[str, Any]]]] = [
    ({"instruction": "do", "input": "x", "output": "y", "system": "s", "history": [["q1", "a1"]]}, DEMONSTRATION,
     [{"prompt": [{"role": "system", "content": "s"}, *HISTORY, user("do\n\nx")], "completion": [says("y")]}]),
    ({"instruction": "do", "output": ["a", "b", "c"]}, PREFERENCE,
     [{"prompt": [user("do")], "chosen": [says(x)], "rejected": [says(y)]} for x, y in ("ab", "ac", "bc")]),
    ({"instruction": "do", "output": ["a", "b"]}, DEMONSTRATION, [{"prompt": [user("do")], "completion": [says("a")]}]),
    ({"instruction": "do", "instances": [{"input": "", "output": "1"}, {"input": "i", "output": "2"}]}, DEMONSTRATION,
     [{"prompt": [user("do")], "completion": [says("1")]}, {"prompt": [user("do\n\ni")], "completion": [says("2")]}]),
    ({"instruction": "do", "context": "c", "response": "y"}, DEMONSTRATION,
     [{"prompt": [user("c\n\ndo")], "completion": [says("y")]}]),
    ({"instruction": "do", "output": "o", "chosen": "c", "rejected": "r"}, PREFERENCE,
     [{"prompt": [user("do")], "chosen": [says("c")], "rejected": [says("r")]}]),
    ({"question": "q", "context": "c", "answers": ["1", "2"]}, QUESTION,
     [{"question": "q", "context": "c", "answers": ["1", "2"], "prompt": [user("c\n\nq")], "answer": "1"}]),
    ({"conversations": [{"from": "human", "value": "h"},
                        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        {"from": "observation", "value": "o"}, {"from": "gpt", "value": "g"}],
      "tools": '[{"name": "f"}]'},
     DEMONSTRATION,
     [{"messages": [user("h"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "o"}, says("g")], "tools": [{"name": "f"}]}]),
    ({"conversations": [{"from": "human", "value": "h"}], "chosen": {"from": "gpt", "value": "c"}, "rejected": "r"},
     PREFERENCE, [{"prompt": [user("h")], "chosen": [says("c")], "rejected": [says("r")]}]),
    ({"messages": [{"role": "developer", "content": "d"}, user("q"),
                   {"role": "assistant", "content": [{"type": "text", "text": "a"}], "weight": 1}]}, DEMONSTRATION,
     [{"messages": [{"role": "system", "content": "d"}, user("q"), says("a")]}]),
    ({"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}]}, DEMONSTRATION,
     [{"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]}]),
    ({"chosen": [user("q"), says("c")], "rejected": [user("q"), says("r")]}, PREFERENCE,
     [{"prompt": [user("q")], "chosen": [says("c")], "rejected": [says("r")]}]),
    ({"messages": [*HISTORY, user("q2"), says("a2")]}, PROMPT_ONLY, [{"prompt": [*HISTORY, user("q2")]}]),
    ({"prompt": "p", "replies": ["best", "worst"]}, PREFERENCE,
     [{"prompt": "p", "chosen": "best", "rejected": "worst"}]),
    (TREE, PREFERENCE, [{"prompt": [user("p")], "chosen": [says("best")], "rejected": [says("worse")]}]),
    (TREE, DEMONSTRATION, [{"messages": [user("p"), says("best"), user("more"), says("end")]}]),
    (TREE, PROMPT_ONLY, [{"prompt": [user("p")]}, {"prompt": [user("p"), says("best"), user("more")]}]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_formats_are_told_by_their_keys(tmp_path: Path, case: int) -> None:
    row, contract, expected = CASES[case]
    assert bare(read(tmp_path, [row], contract).rows) == expected


@pytest.mark.parametrize(
    ("row", "contract", "reason"),
    [
        ({"instruction": "do", "output": True}, DEMONSTRATION, "field 'output' is True, expected text"),
        ({"instruction": "do", "output": ["a"]}, PREFERENCE, "a comparison needs two"),
        ({"instruction": "do", "output": "o", "history": ["x"]}, DEMONSTRATION, r"history\[1\] is not a pair"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, DEMONSTRATION, "from is 'alien'"),
        ({"messages": [user("q"), {"role": "assistant", "content": [{"type": "image", "url": "x"}]}]}, DEMONSTRATION,
         "part of type 'image', which is not text"),
        ({"messages": [user("q"), {"role": "tool", "content": "4"}, says("a")]}, DEMONSTRATION,
         "no tool was called before it"),
        ({"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, user("x"), says("a")]},
         DEMONSTRATION, r"messages\[2\] calls a tool, but messages\[3\] is not its result"),
        ({"messages": [user("q"), says("a")], "tools": "{"}, DEMONSTRATION, "'tools' is broken JSON"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}, PREFERENCE,
         "the prompts of 'chosen' and 'rejected' differ"),
        ({"messages": [user("q"), says("a")], "label": False}, DEMONSTRATION, "labelled as an undesirable answer"),
        ({"prompt": "p", "completion": "c", "label": 2}, PREFERENCE, "field 'label' is 2, expected true or false"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, row: dict[str, Any], contract: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{reason}"):
        read(tmp_path, [row], contract)


def test_labelled_answers_are_compared_only_where_one_prompt_has_both_labels(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": text, "label": label}
        for text, label in (("good", True), ("bad", False), ("worse", False))
    ]
    alone = {"prompt": "lonely", "completion": "c", "label": True}
    source = read(tmp_path, [rows[1], alone, rows[0], rows[2]], PREFERENCE, on_bad_row="skip")
    assert bare(source.rows) == [{"prompt": "p", "chosen": "good", "rejected": bad} for bad in ("bad", "worse")]
    assert [entry["place"].rsplit(":", 1)[1] for entry in source.refused] == ["2"]
    assert "no other row answers its prompt" in source.refused[0]["reason"]


def test_files_of_every_kind(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    row = {"prompt": "p", "completion": "c\nd"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "b.csv").write_text('prompt,completion\np,"c\nd"\nq,e\n')
    (tmp_path / "c.tsv").write_text("prompt\tcompletion\np\tc\n")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    line = (json.dumps(row) + "\n").encode()
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "f.jsonl.zst").write_bytes(pyarrow.compress(line, codec="zstd", asbytes=True))
    places = {
        "a.json": ["a.json[1]"], "b.csv": ["b.csv:2", "b.csv:4"], "c.tsv": ["c.tsv:2"], "d.parquet": ["d.parquet[1]"],
        "e.jsonl.gz": ["e.jsonl.gz:1"], "f.jsonl.zst": ["f.jsonl.zst:1"],
    }  # fmt: skip
    for name, expected in places.items():
        source = read_source(str(tmp_path / name), DEMONSTRATION, DataSpec(path="-"))
        assert [r["_place"] for r in source.rows] == [str(tmp_path / place) for place in expected]
        assert source.rows[0]["prompt"] == "p" and source.rows[0]["completion"].startswith("c")
    whole = read_source(str(tmp_path), DEMONSTRATION, DataSpec(path="-"))
    assert len(whole.rows) == sum(map(len, places.values()))

    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.md").write_text("# Title\n\nbody\n")
    (texts / "parts.txt").write_text("first\n%\nsecond\nline\f third\n")
    source = read_source(str(texts), LANGUAGE_MODELING, DataSpec(path="-"))
    assert [r["text"] for r in source.rows] == ["# Title\n\nbody", "first", "second\nline", " third"]
    assert [r["_place"].rsplit(":", 1)[1] for r in source.rows] == ["1", "1", "3", "4"]
    lines = read_source(str(texts / "parts.txt"), LANGUAGE_MODELING, DataSpec(path="-", format="lines"))
    assert len(lines.rows) == 4

    import datasets

    datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / "saved"))
    assert len(read_source(str(tmp_path / "saved"), DEMONSTRATION, DataSpec(path="-")).rows) == 1


def test_a_mixture_has_the_shares_asked_for_and_follows_from_its_seed(tmp_path: Path) -> None:
    sizes, weights = (500, 100, 400), (60, 22, 18)
    parts = []
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"text": f"{number}/{i}"}) + "\n" for i in range(size)))
        parts.append(Part(path=str(file), weight=weight, epochs=2 if number == 1 else 1))
    split = read_split(DataSpec(mix=parts), LANGUAGE_MODELING, seed=5)
    drawn = Counter(row["text"].split("/")[0] for row in split.train)
    # As long as it can be: source 0 limits it (500 / 0.60), source 1 could give 200 / 0.22 = 909 rows.
    assert [drawn[str(n)] for n in range(3)] == [500, round(500 / 60 * 22), round(500 / 60 * 18)]
    of_second = Counter(row["text"] for row in split.train if row["text"].startswith("1/"))
    assert len(of_second) == 100 and set(of_second.values()) == {1, 2}  # every row once before any is seen twice
    for source in split.sources:
        counts = source.counts().as_json()
        assert counts["rows"] == counts["used"] + counts.get("left_out", 0)
    texts = [row["text"] for row in split.train]
    assert texts == [row["text"] for row in read_split(DataSpec(mix=parts), LANGUAGE_MODELING, seed=5).train]
    assert texts != [row["text"] for row in read_split(DataSpec(mix=parts), LANGUAGE_MODELING, seed=6).train]
    assert len({text[0] for text in texts[:20]}) > 1  # interleaved, not one source after the other

    passes = [
        part.model_copy(update={"weight": None, "epochs": e}) for part, e in zip(parts, (1, 1.5, 0.5), strict=True)
    ]
    drawn = Counter(row["text"][0] for row in read_split(DataSpec(mix=passes), LANGUAGE_MODELING, seed=5).train)
    assert [drawn[str(n)] for n in range(3)] == [500, 150, 200]


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r", "thread": i % 8} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = read_split(DataSpec(path=str(path), test=0.25, group="thread"), PREFERENCE, seed=1)
    assert split.test is not None and len(split.test) == 10
    assert not {row["thread"] for row in split.train} & {row["thread"] for row in split.test}


def test_one_question_is_one_key_however_it_is_written() -> None:
    system = {"role": "system", "content": "be kind"}
    same = [
        {"prompt": "q"}, {"prompt": [user("q")]}, {"prompt": [system, user("q")], "messages": "of another column"},
        {"messages": [system, user("q"), says("a")]},
    ]  # fmt: skip
    assert len({prompt_key(row) for row in same}) == 1
    talk = [user("hi"), says("hello"), user("q")]
    assert prompt_key({"messages": [*talk, says("a")]}) == prompt_key({"prompt": talk}) != prompt_key(same[0])
    assert prompt_key({"prompt": "hi"}) in find_prompts({"messages": [*talk, says("a")]})


def test_tables_with_torn_quotes_splits_and_nested_cells(tmp_path: Path) -> None:
    torn = tmp_path / "torn.csv"
    torn.write_text('text\nfirst\n"never closed\nthird\n')
    with pytest.raises(UserError, match=r"torn.csv:3: a quote opens here and is not closed"):
        read_source(str(torn), LANGUAGE_MODELING, DataSpec(path="-"))
    kto = tmp_path / "kto.csv"
    kto.write_text("prompt,completion,label\np,good,True\np,bad,false\n")
    assert bare(read_source(str(kto), PREFERENCE, DataSpec(path="-")).rows) == [
        {"prompt": "p", "chosen": "good", "rejected": "bad"}
    ]
    cloned = tmp_path / "cloned"
    cloned.mkdir()
    (cloned / "README.md").write_text("about")
    for split in ("train", "test"):
        (cloned / f"{split}-00000.jsonl").write_text(json.dumps({"text": split}))
    assert [r["text"] for r in read_source(str(cloned), LANGUAGE_MODELING, DataSpec(path="-")).rows] == ["train"]
    test = read_source(str(cloned), LANGUAGE_MODELING, DataSpec(path="-", split="test"))
    assert [r["text"] for r in test.rows] == ["test"]
    with pytest.raises(UserError, match="a single file has no splits"):
        read_source(str(kto), PREFERENCE, DataSpec(path="-", split="test"))


@pytest.mark.parametrize(
    ("name", "text", "place", "where", "fit"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "caf\u00e9"}\n{"text": "two"}\n', "a.jsonl:2", "byte 13 of the line", 2),
        ("a.json", '[{"text": "one"}, {"text": "caf\u00e9"}]', r"a.json\[2\]", "somewhere in the row", 1),
        ("a.csv", "text,id\none,1\ncaf\u00e9,2\ntwo,3\n", "a.csv:3", "column 'text'", 2),
        ("a.txt", "one\n%\ntwo\nof the caf\u00e9\n%\nthree\n", "a.txt:3", "line 4", 2),
        ("a.md.gz", "one\f two caf\u00e9", "a.md.gz:1", "line 1", 1),
    ],
)  # fmt: skip
def test_a_byte_that_is_no_utf8_condemns_its_row_alone(
    tmp_path: Path, name: str, text: str, place: str, where: str, fit: int
) -> None:
    written = text.encode("latin-1")
    path = tmp_path / name
    path.write_bytes(gzip.compress(written) if name.endswith(".gz") else written)
    with pytest.raises(UserError, match=rf"{place}: holds bytes that are not UTF-8 \({where}\): .* data\.encoding"):
        read_source(str(path), LANGUAGE_MODELING, DataSpec(path=str(path)))
    source = read_source(str(path), LANGUAGE_MODELING, DataSpec(path=str(path), on_bad_row="skip"))
    assert len(source.rows) == fit and len(source.refused) == 1
    for encoding in ("latin-1", "cp1252"):
        split = read_split(DataSpec(path=str(path), encoding=encoding), LANGUAGE_MODELING, seed=1)
        assert len(split.train) == fit + 1 and "caf\u00e9" in "".join(row["text"] for row in split.train)


def test_encodings_of_several_bytes_and_unknown_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # longer than a block is read at once, with letters of two and of four bytes at its borders
    rows = [{"text": f"{n} \u2028 \U0001f600 caf\u00e9" * 50} for n in range(4000)]
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-16"))
    assert bare(read_source(str(path), LANGUAGE_MODELING, DataSpec(path="-", encoding="utf-16")).rows) == rows
    path.write_bytes(b'{"text": "\x81"}\n{"text": "x"}')  # cp1252 has no letter 81
    source = read_source(str(path), LANGUAGE_MODELING, DataSpec(path="-", encoding="cp1252", on_bad_row="skip"))
    assert bare(source.rows) == [{"text": "x"}] and source.refused[0]["place"].endswith("a.jsonl:1")
    path.write_bytes(b'{"text": "x"}')
    with pytest.raises(UserError, match="not one row is fit"):
        read_source(str(path), LANGUAGE_MODELING, DataSpec(path="-", encoding="utf-16-le"))
    (tmp_path / "b.csv").write_bytes("text,caf\u00e9\none,1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"b.csv:1: the header holds bytes that are not UTF-8"):
        read_source(str(tmp_path / "b.csv"), LANGUAGE_MODELING, DataSpec(path="-"))
    for unknown in ("latin-0", "base64", "x\0y", ""):
        with pytest.raises(ValueError, match="is not a text encoding that Python knows"):
            DataSpec(path="-", encoding=unknown)


def test_values_json_has_no_words_for(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    when = {"text": "a", "when": datetime.datetime(2026, 1, 2), "raw": b"x"}
    parquet.write_table(pyarrow.Table.from_pylist([when]), tmp_path / "t.parquet")
    rows = read_source(str(tmp_path / "t.parquet"), LANGUAGE_MODELING, DataSpec(path="-")).rows
    assert rows[0]["when"].startswith("2026-01-02")
    half = {"messages": [user("q"), says("a")], "tools": '[{"name": "f", "description": "\\ud800"}]'}
    with pytest.raises(UserError, match="rows.jsonl:1: holds half of a surrogate pair"):
        read(tmp_path, [half], DEMONSTRATION)


@pytest.mark.parametrize("form", ["hh", "kto", "oasst", "sharegpt", "messages_pair", "dolly"])
def test_a_wrong_format_is_named(tmp_path: Path, form: str) -> None:
    with pytest.raises(UserError, match="rows.jsonl:1: "):
        read(tmp_path, [{"prompt": "p", "completion": "c"}], DEMONSTRATION, format=form)


def test_a_mixture_that_draws_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(UserError, match=r"no row of .*one.jsonl is used: raise its weight"):
        read_split(DataSpec(mix=[Part(path=str(tmp_path / "one.jsonl"), epochs=0.3)]), LANGUAGE_MODELING, seed=1)


def test_an_encoding_that_is_not_the_files_is_said_and_one_of_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "é"}\n'.encode("utf-16-le"))  # without the mark that utf-16 begins with
    with pytest.raises(UserError, match="is not in the encoding 'utf-16' that the recipe names"):
        read_source(str(path), LANGUAGE_MODELING, DataSpec(path=str(path), encoding="utf-16"))
    for word in ("idna", "punycode", "base64"):
        with pytest.raises(ValidationError, match="is not a text encoding"):
            DataSpec(path=str(path), encoding=word)


def test_an_encoding_beside_mix_is_that_of_its_entries_unless_they_name_their_own(tmp_path: Path) -> None:
    for name, encoding in (("a", "latin-1"), ("b", "utf-8")):
        (tmp_path / f"{name}.jsonl").write_bytes('{"text": "é"}\n'.encode(encoding))
    mix = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "encoding": "utf-8"}]
    split = read_split(DataSpec.model_validate({"mix": mix, "encoding": "latin-1"}), LANGUAGE_MODELING, 0)
    assert [row["text"] for row in split.train] == ["é", "é"]
