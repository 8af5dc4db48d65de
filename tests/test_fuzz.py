"""Mutated rows of every format, and mutated recipes: no traceback, no hang, no row unaccounted for."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tree
from rich.console import Console
from test_formats import CASES

from pipeline.data.contracts import DEMONSTRATION, LANGUAGE_MODELING, PREFERENCE, PROMPT_ONLY, QUESTION
from pipeline.data.load import DataSpec, read_source
from pipeline.errors import UserError
from pipeline.plan import cards
from pipeline.recipe.recipe import build, read
from pipeline.runs.rows import load_rows
from pipeline.terminal.plan import find_needs, show_needs

ROWS = 2500
SEEDS = [row for row, _, _ in CASES] + [
    {"text": "words"},
    {"prompt": "p", "completion": "c", "label": True},
    {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "c"}],
     "rejected": [{"role": "assistant", "content": "r"}]},
    {"prompt": "p", "answer": "a", "choices": ["a", "b"]},
    {"chosen": "\n\nHuman: h\n\nAssistant: a", "rejected": "\n\nHuman: h\n\nAssistant: b"},
]  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**30, "", "  ", "\x00", "\ud800", "﻿", "é" * 3, [], {}, [[]], [None], [{}],
    {"": ""}, [True], "\n\nHuman: ", "{", [{"role": "assistant"}], [{"role": ["user"], "content": "x"}], {"role": "u"},
    [{"from": {}, "value": 1}], [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}],
]  # fmt: skip


PATHS: list[Any] = [
    "a" * 5000, "b" * 300, "x\0y", "\0", "a/" * 3000 + "b", "\ud800", "~", "/dev/null", "no/such",
    "hub:" + "c" * 5000, "hub:x\0y/z", f"{'d' * 5000}.py:f", "x\0y.py:f", f"{'e' * 3000}.jsonl", f"{'f' * 300}.gguf",
    "data/corpus.jsonl", "recipes/templates/chatml.jinja", f"{'g' * 300}/{'h' * 300}", "a--b/c", "x\0y/z",
]  # fmt: skip
"""What no file system has room for, and what is no file."""


def mutated(value: Any, rng: random.Random, strange: list[Any] = STRANGE) -> Any:
    """The value with one thing in it changed, dropped, doubled, renamed or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        how = rng.random()
        if how < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.25:
            return {(k + "x" if k == key else k): v for k, v in value.items()}
        return {**value, key: mutated(value[key], rng, strange)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        how = rng.random()
        if how < 0.15:
            return value[:place] + value[place + 1 :]
        if how < 0.3:
            return value[:place] + [value[place]] * 2 + value[place + 1 :]
        if how < 0.4:
            return rng.sample(value, len(value))
        return [mutated(item, rng, strange) if i == place else item for i, item in enumerate(value)]
    return rng.choice(strange)


def lines(rng: random.Random) -> list[bytes]:
    made = []
    for number in range(ROWS):
        row = rng.choice(SEEDS)
        for _ in range(rng.randint(1, 3)):
            row = mutated(row, rng)
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        how = rng.random()
        if how < 0.04:
            line = line[: rng.randrange(len(line) + 1)]
        elif how < 0.08:
            place = rng.randrange(len(line) + 1)
            line = line[:place] + bytes([rng.randrange(256)]) + line[place:]
        made.append(line.replace(b"\n", b" ").replace(b"\r", b" ") or b"{")
        if number == ROWS // 2:
            made[-1] = json.dumps({"text": "x" * 10_000_000}).encode()
        if number == ROWS // 3:
            made[-1] = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return [line if line.strip() else b"{" for line in made]


@pytest.mark.parametrize("contract", [LANGUAGE_MODELING, DEMONSTRATION, PREFERENCE, PROMPT_ONLY, QUESTION])
def test_no_mutated_row_is_lost(tmp_path: Path, contract: Any) -> None:
    path = tmp_path / "rows.jsonl"
    made = lines(random.Random(contract.name))
    path.write_bytes(b"\n".join(made))
    source = read_source(str(path), contract, DataSpec(path=str(path), on_bad_row="skip"))
    counts = source.counts().as_json()
    assert source.file_rows == len(made)
    assert counts["rows"] == counts["used"] + sum(counts["refused"].values()) >= len(made)
    # Every line of the file is among what was used or refused, under its number.
    places = [row["_place"] for row in source.rows] + [entry["place"] for entry in source.refused]
    numbers = {int(place.rsplit(":", 1)[1].partition("#")[0]) for place in places}
    if contract is not PREFERENCE:  # there two labelled rows may be one comparison
        assert numbers == set(range(1, len(made) + 1))
    for row in source.rows:
        assert contract.check(row) is None
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # nothing that cannot be tokenized or written
    with pytest.raises(UserError, match="unfit rows in"):
        read_source(str(path), contract, DataSpec(path=str(path)))


def test_no_mutated_recipe_gives_a_traceback(tiny_base: Path, tmp_path: Path) -> None:
    """600 recipes with one or two things wrong: read, planned, hashed and their rows loaded, or refused in words."""
    rng = random.Random(22)
    tree = tiny_tree(tiny_base, tmp_path)
    pairs = tree["stages"]["dpo"]["data"]["path"]
    tree["stages"]["ppo"] = {
        "from": "sft", "data": {"mix": [{"path": pairs, "epochs": 1}]}, "questions": tree["stages"]["sft"]["questions"],
        "reward": [{"source": "reward"}, {"source": "recipes/rewards/number.py:right", "weight": 0}],
    }  # fmt: skip
    tree["model"] |= {"chat_template": "recipes/templates/chatml.jinja", "revision": None, "public_id": None}
    tree["expect"] = {"sft.question_accuracy": ">= 0.1"}
    file = tmp_path / "recipe.yaml"
    card, console, refused = cards.find_card("rtx3060"), Console(file=io.StringIO()), 0
    for number in range(600):
        spoilt = tree
        for _ in range(rng.randint(1, 2)):
            spoilt = mutated(spoilt, rng, STRANGE + 2 * PATHS)
        try:
            if number % 4 and isinstance(spoilt, dict):
                recipe = build(spoilt)
            else:  # reading YAML takes longer than all the rest
                file.write_text(json.dumps(spoilt), encoding="utf-8")
                recipe = read(file)
            with contextlib.suppress(UserError):
                show_needs(find_needs(recipe, {}, card), console)
            recipe.parts()
            for stage in recipe.order():
                load_rows(recipe, stage)
        except UserError as error:
            assert str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"recipe {number}: {json.dumps(spoilt)[:3000]}") from error
    assert 300 < refused < 600
