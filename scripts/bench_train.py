"""Training steps of ours beside TRL's own trainer on the same rows, model, LoRA and checkpointing, in one run.

    python scripts/bench_train.py [--stage sft|reward|dpo] [--rows 48] [--batch 8] [--rounds 3] [--dtype bfloat16]

TRL is configured at its best: sft packed (bfd) with its fused head; reward and dpo have no packing in TRL 1.16. Rounds
of the two take turns. Real tokens are those of the rows, whatever either side pads, packs or shares. Both sides get the
guard that keeps bitsandbytes from losing gradients on CPUs with AVX512-BF16. The rows are made of words of the demo
corpus: for sft dialogues of 64 to 512 tokens, for pairs prompts of about 256 tokens and answers of 64 to 128.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from pipeline.data import render
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.forward import plain_on_cpu
from pipeline.models.spec import ModelSpec
from pipeline.training import sequences
from pipeline.training import trainer as shared

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ROOT = Path(__file__).resolve().parent.parent


def text(draw: random.Random, words: list[str], count: int) -> str:
    return " ".join(draw.choice(words) for _ in range(count))


def make_rows(stage: str, count: int) -> list[dict[str, Any]]:
    draw = random.Random(17)
    words = sorted(
        {word for line in (ROOT / "data" / "corpus.jsonl").read_text().split() for word in [line] if word.isalpha()}
    )

    def says(role: str, length: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(draw, words, length)}]

    if stage == "sft":  # a word is 1.4 tokens
        return [
            {
                "messages": says("user", draw.randint(12, 120)) + says("assistant", draw.randint(24, 230)),
                "_place": str(i),
            }
            for i in range(count)
        ]
    rows = []
    for i in range(count):
        prompt = says("user", draw.randint(150, 170))
        answers = {key: says("assistant", draw.randint(45, 90)) for key in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **answers, "_place": str(i)})
    return rows


class Clock(TrainerCallback):
    """Seconds of every step but the first, which warms up."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self.begun)


def arguments(stage: str, batch: int, steps: int, folder: str, dtype: str, checkpointing: bool, **more: Any) -> Any:
    config = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}[stage]
    return config(
        output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, bf16=dtype == "bfloat16", use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=17, max_length=1024,
        gradient_checkpointing=checkpointing, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def theirs(stage: str, spec: ModelSpec, tokenizer: Any, rows: list[dict[str, Any]], args: Any) -> Any:
    auto: Any = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": 1} if stage == "reward" else {}
    model = auto.from_pretrained(
        spec.base,
        dtype=getattr(torch, spec.dtype),
        quantization_config=BitsAndBytesConfig(**spec.quantization),
        **options,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    bases.keep_gradients_on_cpu(model)
    torch.manual_seed(17)
    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if stage == "reward" else {"task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**LORA, **task))
    trainer = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer}[stage]
    if stage == "sft":
        dataset = encoded(stage, tokenizer, rows).dataset
    else:
        dataset = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    return trainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)


def encoded(stage: str, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    tally = sequences.Tally(stage, False)
    if stage == "sft":
        return sequences.store(rows, lambda row: render.demonstration(tokenizer, row), sequences.TEXTS, tally)
    if stage == "dpo":
        return sequences.store(rows, lambda row: render.pair(tokenizer, row), sequences.REPLY_PAIRS, tally)

    def pair(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        return render.conversation(tokenizer, row, "chosen"), render.conversation(tokenizer, row, "rejected")

    return sequences.store(rows, pair, sequences.SCORED_PAIRS, tally)


def ours(stage: str, spec: ModelSpec, tokenizer: Any, rows: list[dict[str, Any]], args: Any) -> Any:
    args.checkpointed_layers, args.base_on_hub = None, None
    torch.manual_seed(17)
    base = bases.load_base(spec, tokenizer, num_labels=int(stage == "reward"))
    model = adapters.fresh(base, spec.lora, head=stage == "reward")
    options: dict[str, Any] = {"args": args, "train_dataset": encoded(stage, tokenizer, rows).dataset}
    trainer: Any = {"sft": SFTTrainer, "reward": RewardTrainer}.get(stage)
    if stage == "dpo":
        trainer = type("DPOTrainer", (shared.TakesEncoded, DPOTrainer), {})
        options["data_collator"] = shared.LearntTokens(tokenizer.pad_token_id)
    return shared.build(trainer, model, processing_class=tokenizer, **options)


def real_tokens(stage: str, tokenizer: Any, rows: list[dict[str, Any]]) -> int:
    items = encoded(stage, tokenizer, rows)
    if stage == "sft":
        return sum(len(item.ids) for item in items)
    return sum(len(side) for pair in items for side in pair)


def measure(trainer: Any, context: Any) -> list[float]:
    clock = Clock()
    trainer.add_callback(clock)
    with context:
        trainer.train()
    return clock.steps[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("sft", "reward", "dpo"), default="sft")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--base", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    spec = ModelSpec(base=given.base, quantize="nf4", dtype=given.dtype, lora=LORA)
    tokenizer = bases.load_tokenizer(spec)
    rows = make_rows(given.stage, given.rows)
    total = real_tokens(given.stage, tokenizer, rows)
    per_row = total / len(rows)
    speeds: dict[str, list[float]] = {"TRL": [], "ours": []}
    losses: dict[str, float] = {}
    for _ in range(given.rounds):
        for side in speeds:
            with tempfile.TemporaryDirectory() as folder:
                common = (given.stage, given.batch)
                if side == "TRL":
                    packed = {"packing": True, "packing_strategy": "bfd"} if given.stage == "sft" else {}
                    # As many tokens a step as ours has: a packed row holds max_length.
                    batch = max(1, round(given.batch * per_row / 1024)) if packed else given.batch
                    steps = max(2, round(total / (batch * 1024))) if packed else len(rows) // given.batch
                    args = arguments(given.stage, batch, steps, folder, given.dtype, given.checkpointing, **packed)
                    trainer = theirs(given.stage, spec, tokenizer, rows, args)
                    lengths = [len(row["input_ids"]) for row in trainer.train_dataset] if packed else []
                    seconds = measure(trainer, torch.enable_grad())
                    done = sum(lengths) / len(lengths) * batch if packed else per_row * given.batch
                else:
                    args = arguments(*common, len(rows) // given.batch, folder, given.dtype, given.checkpointing)
                    trainer = ours(given.stage, spec, tokenizer, rows, args)
                    seconds = measure(trainer, plain_on_cpu(trainer.model))
                    done = per_row * given.batch
                speeds[side].append(done / statistics.median(seconds))
                losses[side] = trainer.state.log_history[-1].get("train_loss", float("nan"))
                print(f"  {side}: {speeds[side][-1]:.0f} real tokens/s, mean loss {losses[side]:.4f}", flush=True)
    flags = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    amx = "with AMX" if "amx_bf16" in flags else "without AMX"
    print(f"{given.stage}, {len(rows)} rows of {per_row:.0f} tokens, batch {given.batch}, {given.dtype}, a CPU {amx}")
    medians = {side: statistics.median(found) for side, found in speeds.items()}
    ratios = [b / a for a, b in zip(speeds["TRL"], speeds["ours"], strict=True)]
    print(f"TRL {medians['TRL']:.0f}, ours {medians['ours']:.0f} real tokens/s")
    print(f"ratio {statistics.median(ratios):.2f} (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
