"""How much the runner's CPU environment saves: SFT steps with it and without it, interleaved, as a ratio.

    python scripts/bench_malloc.py [ROUNDS]

Needs the demo model (scripts/get_demo_model.py) and an otherwise idle machine without a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pipeline.runs.environment import CPU_ENVIRONMENT, EVERYWHERE

STEPS, ROWS = 8, 16


def measure() -> float:
    """Real tokens a second over STEPS optimizer steps on the demo dialogues, as TRL's SFTTrainer computes its loss."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from pipeline.data import render
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.models.spec import ModelSpec

    spec = ModelSpec(
        base="models/SmolLM2-135M-Instruct", dtype="bfloat16", chat_template="recipes/templates/chatml.jinja"
    )
    tokenizer = bases.load_tokenizer(spec)
    model = adapters.fresh(bases.load_base(spec, tokenizer), spec.lora).train()
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    optimizer = torch.optim.AdamW(adapters.trainable(model).values(), lr=1e-4)
    lines = Path("data/demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [render.demonstration(tokenizer, json.loads(line)) for line in lines[: (STEPS + 2) * ROWS]]
    tokens, begun = 0, 0.0
    for step in range(STEPS + 2):
        if step == 2:  # the first steps fill the heap
            tokens, begun = 0, time.perf_counter()
        batch = rows[step * ROWS : (step + 1) * ROWS]
        ids_BT, mask_BT = render.padded([row.ids for row in batch], tokenizer.pad_token_id)
        labels_BT, _ = render.padded([row.labels for row in batch], render.IGNORED)
        with bases.computing(model):
            output = model(
                input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False, fused_lm_head=True
            )
            loss = -output.log_probs.sum() / (labels_BT != render.IGNORED).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(mask_BT.sum())
    return tokens / (time.perf_counter() - begun)


def main() -> None:
    if sys.argv[1:] == ["--measure"]:
        print(measure())
        return
    plain = {name: value for name, value in {**EVERYWHERE, **os.environ}.items() if name not in CPU_ENVIRONMENT}
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 2):
        for name, environment in (("without", plain), ("with", {**plain, **CPU_ENVIRONMENT})):
            command = [sys.executable, __file__, "--measure"]
            out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            speeds[name].append(float(out.splitlines()[-1]))
            print(f"{name:>8}: {speeds[name][-1]:.0f} tokens/s", flush=True)
    print(f"ratio of the best: {max(speeds['with']) / max(speeds['without']):.2f}")


if __name__ == "__main__":
    main()
