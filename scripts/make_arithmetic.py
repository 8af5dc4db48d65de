"""Write data/arithmetic_*.jsonl: sums with their answers, for PPO from a checked reward.

    python scripts/make_arithmetic.py

Every sum of two numbers from 1 to 19 once, dealt by a fixed seed to demonstrations (a fifth, with the answer as a
dialogue), prompts and test (a fifth); a sum and its mirror image (3 + 8, 8 + 3) go to the same file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

LARGEST, SHARE, SEED = 19, 0.2, 11
FOLDER = Path(__file__).resolve().parent.parent / "data"


def prompt(a: int, b: int) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}


def demonstration(a: int, b: int) -> dict[str, object]:
    turns = (("user", f"What is {a} + {b}?"), ("assistant", str(a + b)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def main() -> None:
    chance = random.Random(SEED)
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(a, LARGEST + 1)]
    chance.shuffle(pairs)
    fifth = round(len(pairs) * SHARE)
    for name, part, row in (
        ("arithmetic_test", pairs[:fifth], prompt),
        ("arithmetic_demonstrations", pairs[fifth : 2 * fifth], demonstration),
        ("arithmetic_prompts", pairs[2 * fifth :], prompt),
    ):
        both = sorted({(a, b) for a, b in part} | {(b, a) for a, b in part})
        chance.shuffle(both)
        lines = [json.dumps(row(a, b)) + "\n" for a, b in both]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"data/{name}.jsonl: {len(lines)} sums")


if __name__ == "__main__":
    main()
