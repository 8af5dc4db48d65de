"""A program that speaks as pipeline/ppo/engine_process.py does, without vLLM. It answers at random, by the seeds alone;
or, in the answer of the number FAKE_FROM and all after it, as FAKE_HOW says: it dies, fails, garbles, cuts or lacks."""

from __future__ import annotations

import json
import os
import random
import sys

how, start, number = os.environ.get("FAKE_HOW", ""), int(os.environ.get("FAKE_FROM", "1")), 0
for line in sys.stdin:
    request = json.loads(line)
    if "load" in request:
        print(json.dumps({"ready": {"vllm": "0.0", "device": "cpu"}}), flush=True)
        continue
    number, asked = number + 1, request["answer"]
    wrong = how if number >= start else ""
    assert os.path.isfile(asked["adapter"]["folder"] + "/adapter_model.safetensors")
    if wrong == "dies":
        print("out of luck", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if wrong == "fails":
        print(json.dumps({"error": "ValueError: no such adapter"}), flush=True)
        continue
    seeds = [seed for one in asked["asked"] for seed in one["seeds"]][wrong == "lacks" :]
    length = asked["max_tokens"] - (wrong == "cuts")
    answers = []
    for seed in seeds:
        draw = random.Random(seed)
        ids = [draw.randrange(3, 500) for _ in range(length)]
        answers.append({"ids": ids, "logp": [-6.0 - draw.random() for _ in ids]})
    print("{" if wrong == "garbles" else json.dumps({"answers": answers}), flush=True)
