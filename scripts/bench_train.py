"""Training steps of ours beside TRL's own trainer on the same rows, model, LoRA and checkpointing, in one run.

    python scripts/bench_train.py [--stage pretrain|sft|reward|dpo] [--rows 48] [--batch 8] [--rounds 3]
    python scripts/bench_train.py --stage ppo --trl /tmp/trl112     as scripts/bench_ppo.py, which says how to get it
    python scripts/bench_train.py --grow 1024 2048 4096 8192 16384 32768    how our sft steps of so many tokens grow

TRL is configured at its best: pretrain and sft packed (bfd) with its fused head; reward and dpo have no packing in TRL
1.16. Rounds of the sides take turns. Real tokens are those of the rows, whatever a side pads, packs or shares. All
sides get the guard that keeps bitsandbytes from losing gradients on CPUs with AVX512-BF16, and the environment that
`onebase run` gives a stage. The third side is TRL with
our LM head in place of its own, whose CPU version is a fallback: what it gains is what that fallback costs. The rows
are made of words of the demo corpus: documents and dialogues of 64 to 512 tokens, and for pairs prompts of about 256
tokens with answers of 64 to 128. The losses of the first batch are compared under the same adapter of random numbers.
Live bytes are counted in one more step of ours and of TRL (counting is slow), and the operations of matrix products in
one more step of ours. (TRL's cannot be counted so: its 4-bit layers are operators of bitsandbytes.)
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from bench_ppo import run_as_a_stage
from datasets import Dataset
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from pipeline.data import render
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.forward import plain_on_cpu
from pipeline.models.spec import ModelSpec
from pipeline.training import sequences
from pipeline.training import trainer as shared
from pipeline.training.head import Head

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ROOT = Path(__file__).resolve().parent.parent
TRAINERS: dict[str, Any] = {"pretrain": SFTTrainer, "sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer}
CONFIGS: dict[str, Any] = {"pretrain": SFTConfig, "sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}
LENGTH = 1024
OURS, TRLS, WITH_HEAD = "ours", "TRL", "TRL with our head"
TRLS_HEAD = {name: getattr(trl_utils, name) for name in ("_use_triton", "_ChunkedLogProbFunction")}


def make_rows(stage: str, count: int, least: int = 64, most: int = 512) -> list[dict[str, Any]]:
    draw = random.Random(17)
    words = sorted({word for word in (ROOT / "data" / "corpus.jsonl").read_text().split() if word.isalpha()})

    def text(tokens: int) -> str:
        return " ".join(draw.choice(words) for _ in range(round(tokens / 1.4)))

    def says(role: str, tokens: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(tokens)}]

    rows: list[dict[str, Any]] = []
    for i in range(count):
        length = draw.randint(least, most)
        if stage == "pretrain":
            rows.append({"text": text(length)})
        elif stage == "sft":
            rows.append({"messages": says("user", length // 3) + says("assistant", length - length // 3)})
        else:
            answers = {key: says("assistant", draw.randint(64, 128)) for key in ("chosen", "rejected")}
            rows.append({"prompt": says("user", draw.randint(224, 256)), **answers})
        rows[-1]["_place"] = str(i)
    return rows


def encoded(stage: str, tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    def pair(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        return render.conversation(tokenizer, row, "chosen"), render.conversation(tokenizer, row, "rejected")

    ways: dict[str, tuple[Any, Any]] = {
        "pretrain": (lambda row: render.document(tokenizer, row["text"]), sequences.TEXTS),
        "sft": (lambda row: render.demonstration(tokenizer, row), sequences.TEXTS),
        "reward": (pair, sequences.SCORED_PAIRS),
        "dpo": (lambda row: render.pair(tokenizer, row), sequences.REPLY_PAIRS),
    }
    return sequences.store(rows, *ways[stage], sequences.Tally(stage, False))


def real_tokens(stage: str, tokenizer: Any, rows: list[dict[str, Any]]) -> int:
    items = encoded(stage, tokenizer, rows)
    if stage in ("pretrain", "sft"):
        return sum(len(item.ids) for item in items)
    return sum(len(side) for pair in items for side in pair)


class Bench:
    """One stage's rows and settings, and the trainers made of them."""

    def __init__(self, given: argparse.Namespace, rows: list[dict[str, Any]], folder: str) -> None:
        self.stage, self.folder, self.dtype, self.checkpointing = given.stage, folder, given.dtype, given.checkpointing
        self.spec = ModelSpec(base=given.base, quantize="nf4", dtype=given.dtype, lora=LORA)
        self.tokenizer = bases.load_tokenizer(self.spec)
        self.rows, self.batch = rows, given.batch
        self.tokens = real_tokens(self.stage, self.tokenizer, rows)

    def packed(self, side: str) -> bool:
        return self.stage == "pretrain" or (self.stage == "sft" and side != OURS)

    def arguments(self, packed: bool, steps: int = -1) -> Any:
        more = {"packing": True, "packing_strategy": "bfd"} if packed else {}
        # As many tokens a step as rows in `batch`: a packed row holds LENGTH.
        batch = max(1, round(self.batch * self.tokens / len(self.rows) / LENGTH)) if packed else self.batch
        return CONFIGS[self.stage](
            output_dir=self.folder, per_device_train_batch_size=batch, bf16=self.dtype == "bfloat16", use_cpu=True,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=17, max_length=LENGTH,
            gradient_checkpointing=self.checkpointing, dataloader_pin_memory=False, num_train_epochs=1,
            max_steps=steps, **more,
        )  # fmt: skip

    def make(self, side: str, packed: bool, steps: int = -1) -> Any:
        args = self.arguments(packed, steps)
        trainer = self._ours(args) if side == OURS else self._theirs(args)
        names: dict[str, Any] = TRLS_HEAD if side == TRLS else {
            "_use_triton": lambda device: True, "_ChunkedLogProbFunction": Head
        }  # fmt: skip
        vars(trl_utils).update(names)
        return trainer

    def _theirs(self, args: Any) -> Any:
        reward = self.stage == "reward"
        auto: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        labels: dict[str, Any] = {"num_labels": 1} if reward else {}
        quantization: dict[str, Any] = self.spec.quantization or {}
        model = auto.from_pretrained(
            self.spec.base,
            dtype=getattr(torch, self.dtype),
            quantization_config=BitsAndBytesConfig(**quantization),  # type: ignore[no-untyped-call]
            **labels,
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        bases.keep_gradients_on_cpu(model)
        torch.manual_seed(17)
        task: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if reward else {}
        lora: dict[str, Any] = {**LORA, "task_type": "CAUSAL_LM", **task}
        model = get_peft_model(model, LoraConfig(**lora))
        if self.stage in ("pretrain", "sft"):
            dataset = encoded(self.stage, self.tokenizer, self.rows).dataset
        else:
            keys = ("prompt", "chosen", "rejected")
            dataset = Dataset.from_list([{key: row[key] for key in keys} for row in self.rows])
        return TRAINERS[self.stage](model=model, args=args, train_dataset=dataset, processing_class=self.tokenizer)

    def _ours(self, args: Any) -> Any:
        args.checkpointed_layers, args.base_on_hub = None, None
        reward = self.stage == "reward"
        torch.manual_seed(17)
        base = bases.load_base(self.spec, self.tokenizer, num_labels=int(reward))
        model = adapters.fresh(base, self.spec.lora, head=reward)
        dataset = encoded(self.stage, self.tokenizer, self.rows).dataset
        options: dict[str, Any] = {"args": args, "train_dataset": dataset, "processing_class": self.tokenizer}
        trainer = TRAINERS[self.stage]
        if self.stage == "dpo":
            trainer = type("DPOTrainer", (shared.TakesEncoded, DPOTrainer), {})
            options["data_collator"] = shared.LearntTokens(self.tokenizer.pad_token_id)
        return shared.build(trainer, model, **options)

    def speed(self, side: str) -> Speed:
        """By the median step; the first, which warms up, does not count."""
        trainer = self.make(side, self.packed(side))
        clock = Clock()
        trainer.add_callback(clock)
        with plain_on_cpu(trainer.model) if side == OURS else torch.enable_grad():
            trainer.train()
        a_step = self.tokens / float(trainer.state.global_step)
        return Speed(*(a_step / statistics.median(column) for column in zip(*clock.steps[1:], strict=True)))

    def peak(self, side: str) -> tuple[int, int]:
        """Live bytes before a first step and their peak in it."""
        trainer = self.make(side, self.packed(side), steps=1)
        live = LiveBytes().count(trainer.model)
        weights = live.now
        with plain_on_cpu(trainer.model) if side == OURS else torch.enable_grad(), live:
            trainer.train()
        return weights, live.peak

    def products(self) -> int:
        """Floating-point operations of the matrix products in one of our steps."""
        trainer = self.make(OURS, self.packed(OURS), steps=1)
        with plain_on_cpu(trainer.model), FlopCounterMode(display=False) as counted:
            trainer.train()
        return int(counted.get_total_flops())

    def first_losses(self) -> dict[str, float]:
        """The loss of the first rows, not packed by TRL, under one adapter of random numbers."""
        losses, numbers = {}, dict[str, torch.Tensor]()
        for side in (OURS, TRLS):
            trainer = self.make(side, packed=False)
            draw = torch.Generator().manual_seed(1)
            for name, weight in sorted(adapters.trainable(trainer.model).items()):
                numbers.setdefault(name, torch.randn(weight.shape, generator=draw) * 0.02)
                weight.data.copy_(numbers[name])
            trainer.model = trainer.accelerator.prepare(trainer.model).train()
            trainer.current_gradient_accumulation_steps = 1
            rows = [trainer.train_dataset[i] for i in range(self.batch)]
            with torch.no_grad():
                losses[side] = float(trainer.compute_loss(trainer.model, trainer.data_collator(rows)))
        return losses


class Speed(NamedTuple):
    """Real tokens a second, and a second of a core's work, which what else a machine does takes little from."""

    by_clock: float
    by_core: float


class Clock(TrainerCallback):
    """Seconds of every step, by the clock and of all cores."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))


def grow(given: argparse.Namespace, folder: str) -> None:
    """How the seconds of a step of rows of 64 to 128 tokens grow with the tokens of its batch."""
    points = []
    for tokens in given.grow:
        given.batch = tokens // 96
        bench = Bench(given, make_rows("sft", 3 * given.batch, 64, 128), folder)
        step = bench.tokens / 3
        points.append((math.log(step), math.log(step / bench.speed(OURS).by_core)))
        print(f"  {step:.0f} tokens: {math.exp(points[-1][1]):.1f} s of a core a step", flush=True)
    print(f"seconds grow as tokens to the power {statistics.linear_regression(*zip(*points, strict=True)).slope:.2f}")


def compare(given: argparse.Namespace, folder: str) -> None:
    bench = Bench(given, make_rows(given.stage, given.rows), folder)
    sides = [TRLS, OURS] if given.stage == "reward" else [TRLS, WITH_HEAD, OURS]  # a reward model has no LM head
    speeds: dict[str, list[Speed]] = {side: [] for side in sides}
    for _ in range(given.rounds):
        for side in sides:
            speeds[side].append(bench.speed(side))
            by_clock, by_core = speeds[side][-1]
            print(f"  {side}: {by_clock:.0f} real tokens/s, {by_core:.0f} a second of a core", flush=True)
    losses = bench.first_losses()
    print(f"first batch, one adapter: loss {losses[OURS]:.5f}, TRL {losses[TRLS]:.5f}")
    above = {}
    for side in (TRLS, OURS):
        weights, peak = bench.peak(side)
        above[side] = peak - weights
        print(f"{side}: {above[side] / 2**20:.0f} MiB at the peak above the {weights / 2**20:.0f} it began with")
    print(f"peak above the beginning: {above[OURS] / above[TRLS]:.2f} of TRL's")
    work, rate = bench.products(), matrix_rate(given.dtype)
    step = bench.tokens / len(bench.rows) * given.batch / max(speed.by_clock for speed in speeds[OURS])
    print(
        f"{OURS}: {work / 1e12:.2f} Tflop of matrix products a step; at {rate / 1e9:.0f} GFLOPS, which a large one "
        f"reaches now, they take {work / rate:.1f} of the step's {step:.1f} seconds"
    )
    per_row = bench.tokens / len(bench.rows)
    print(
        f"{given.stage}, {given.rows} rows of {per_row:.0f} tokens, batch {given.batch}, {given.dtype}, {processor()}"
    )
    for side in sides[:-1]:
        pairs = list(zip(speeds[OURS], speeds[side], strict=True))
        for name, place in (("by the clock", 0), ("by the cores' work", 1)):
            ratios = sorted(ours[place] / other[place] for ours, other in pairs)
            told = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"ratio to {side} {name}: {statistics.median(ratios):.2f} (rounds: {told})")


def matrix_rate(dtype: str) -> float:
    """Floating-point operations a second of a matrix product of the demo model's shapes."""
    tokens, width, inner = 4096, 576, 1536
    left, right = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in ((tokens, width), (width, inner)))
    best = math.inf
    for _ in range(20):
        begun = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begun)
    return 2 * tokens * width * inner / best


def processor() -> str:
    said = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    name = next((line.split(":")[1].strip() for line in said.splitlines() if line.startswith("Model name")), "a CPU")
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx2") if flag in said]
    return f"{torch.get_num_threads()} threads, {name} ({found[0] if found else 'no vector instructions known'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*TRAINERS, "ppo"), default="sft")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--base", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--grow", type=int, nargs="+")
    parser.add_argument("--trl", help="folder of TRL 1.12, for ppo")
    given = parser.parse_args()
    run_as_a_stage()
    if given.stage == "ppo":
        if not given.trl:
            parser.error("--stage ppo needs --trl, the folder of TRL 1.12: see scripts/bench_ppo.py")
        script = str(Path(__file__).with_name("bench_ppo.py"))
        os.execv(sys.executable, [sys.executable, script, given.trl, "--rounds", str(given.rounds)])
    with tempfile.TemporaryDirectory() as folder:
        (grow if given.grow else compare)(given, folder)


if __name__ == "__main__":
    main()
