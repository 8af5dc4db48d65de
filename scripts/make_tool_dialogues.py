"""Write data/tools_*.jsonl: word problems with numbers too large for a small model's head, for a calculator as a tool.

    python scripts/make_tool_dialogues.py

Each kind of problem is told in several ways. Demonstrations show the call and the answer as a dialogue; prompts and
test hold the problem and its answer alone. No problem with the same numbers stands in two files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

DEMONSTRATED, PROMPTED, TESTED, SEED = 72, 160, 96, 11
FOLDER = Path(__file__).resolve().parent.parent / "data"
KINDS = {  # the expression, and ways to tell it
    "{a}*{b}-{c}": (
        "A shop has {a} boxes of {b} pens and sells {c} pens. How many are left?",
        "{a} rows of {b} trees were planted, and {c} of the trees died. How many live?",
        "From {a} crates with {b} apples each, {c} apples go bad. How many are good?",
    ),
    "{a}*{b}+{c}": (
        "A library has {a} shelves of {b} books and buys {c} more. How many books has it?",
        "{a} buses with {b} people each come to a town of {c}. How many people are there then?",
        "Ana saves {b} coins a week for {a} weeks. She had {c} before. How many has she now?",
    ),
    "({a}+{c})*{b}": (
        "{a} girls and {c} boys get {b} stickers each. How many stickers is that?",
        "A farm with {a} cows and {c} goats feeds each animal {b} kilos. How many kilos is that?",
        "Two halls with {a} and {c} seats are full on {b} nights. How many seats were sold?",
    ),
}


def problem(chance: random.Random) -> dict[str, Any]:
    expression, ways = chance.choice(sorted(KINDS.items()))
    numbers = {"a": chance.randint(12, 98), "b": chance.randint(12, 98), "c": chance.randint(101, 140)}
    worked = expression.format(**numbers)
    answer = numbers["a"] * numbers["b"] - numbers["c"]
    if expression != "{a}*{b}-{c}":
        a, b, c = numbers.values()
        answer = a * b + c if expression == "{a}*{b}+{c}" else (a + c) * b
    return {"question": chance.choice(ways).format(**numbers), "expression": worked, "answer": str(answer)}


def demonstration(one: dict[str, Any]) -> dict[str, Any]:
    arguments = {"expression": one["expression"]}
    call = {"type": "function", "function": {"name": "calculate", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": one["question"]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "calculate", "content": one["answer"]},
            {"role": "assistant", "content": one["answer"]},
        ]
    }


def prompt(one: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": one["question"]}], "answer": one["answer"]}


def main() -> None:
    chance, found = random.Random(SEED), dict[str, dict[str, Any]]()
    while len(found) < DEMONSTRATED + PROMPTED + TESTED:
        one = problem(chance)
        found.setdefault(one["expression"], one)
    problems, start = list(found.values()), 0
    for name, count, row in (
        ("tools_demonstrations", DEMONSTRATED, demonstration),
        ("tools_prompts", PROMPTED, prompt),
        ("tools_test", TESTED, prompt),
    ):
        lines = [json.dumps(row(one)) + "\n" for one in problems[start : start + count]]
        start += count
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"data/{name}.jsonl: {len(lines)} problems")


if __name__ == "__main__":
    main()
