"""Write data/tools_*.jsonl: word problems with numbers too large for a small model's head, for a calculator as a tool.

    python scripts/make_tool_dialogues.py

Each kind of problem is told in several ways. Demonstrations show the call and the answer as a dialogue; prompts and
test hold the problem and its answer alone. No problem with the same numbers stands in two files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DEMONSTRATED, PROMPTED, TESTED, SEED = 96, 160, 96, 11
FOLDER = Path(__file__).resolve().parent.parent / "data"


class Kind(NamedTuple):
    expression: str
    work_out: Callable[[int, int, int], int]
    ways: tuple[str, ...]
    """To tell it."""


# As many expressions begin with a parenthesis as do not: where most are of one sort, a policy that always begins as
# they do is paid well, and never tries the other again.
KINDS = (
    Kind(
        "({a}+{c})*{b}",
        lambda a, b, c: (a + c) * b,
        (
            "{a} girls and {c} boys get {b} stickers each. How many stickers is that?",
            "A farm with {a} cows and {c} goats feeds each animal {b} kilos. How many kilos is that?",
            "Two halls with {a} and {c} seats are full on {b} nights. How many seats were sold?",
        ),
    ),
    Kind(
        "({c}-{a})*{b}",
        lambda a, b, c: (c - a) * b,
        (
            "All but {a} of {c} hens laid {b} eggs each. How many eggs is that?",
            "Of {c} tickets {a} were given away, and the rest cost {b} coins each. How many coins is that?",
            "A ship for {c} people leaves {a} places empty on each of {b} trips. How many people sail?",
        ),
    ),
    Kind(
        "{a}*{b}+{c}",
        lambda a, b, c: a * b + c,
        (
            "A library has {a} shelves of {b} books and buys {c} more. How many books has it?",
            "{a} buses with {b} people each come to a town of {c}. How many people are there then?",
            "Ana saves {b} coins a week for {a} weeks. She had {c} before. How many has she now?",
        ),
    ),
    Kind(
        "{a}*{b}-{c}",
        lambda a, b, c: a * b - c,
        (
            "A shop has {a} boxes of {b} pens and sells {c} pens. How many are left?",
            "{a} rows of {b} trees were planted, and {c} of the trees died. How many live?",
            "From {a} crates with {b} apples each, {c} apples go bad. How many are good?",
        ),
    ),
)


def problem(chance: random.Random) -> dict[str, Any]:
    kind = chance.choice(KINDS)
    a, b, c = chance.randint(12, 98), chance.randint(12, 98), chance.randint(101, 140)
    question = chance.choice(kind.ways).format(a=a, b=b, c=c)
    return {
        "question": question,
        "expression": kind.expression.format(a=a, b=b, c=c),
        "answer": str(kind.work_out(a, b, c)),
    }


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
