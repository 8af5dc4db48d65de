"""Write data/arithmetic_*.jsonl: sums with their answers, for PPO from a checked reward.

    python scripts/make_arithmetic.py

Every sum of two numbers from 1 to 29 once, dealt by a fixed seed to demonstrations (a tenth, with the answer as a
dialogue), test (a fifth) and prompts; a sum and its mirror image (3 + 8, 8 + 3) go to the same file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

LARGEST, DEMONSTRATED, TESTED, SEED = 29, 0.1, 0.2, 11
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
    shown, tested = (round(len(pairs) * share) for share in (DEMONSTRATED, TESTED))
    for name, part, row in (
        ("arithmetic_test", pairs[:tested], prompt),
        ("arithmetic_demonstrations", pairs[tested : tested + shown], demonstration),
        ("arithmetic_prompts", pairs[tested + shown :], prompt),
    ):
        both = sorted({(a, b) for a, b in part} | {(b, a) for a, b in part})
        chance.shuffle(both)
        lines = [json.dumps(row(a, b)) + "\n" for a, b in both]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"data/{name}.jsonl: {len(lines)} sums")


if __name__ == "__main__":
    main()
