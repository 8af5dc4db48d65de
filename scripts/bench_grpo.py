"""Our GRPO against TRL's GRPOTrainer with its own generation: episodes a second and peak live bytes, in one run.

    python scripts/bench_grpo.py [--answer 48] [--examples 0] [--group 8] [--beta 0.05] [--rounds 2] [--dtype bfloat16]
                                 [--attention eager] [--four-bit] [--json FILE]

The demo model answers the demo prompts in groups, with a fresh adapter of the same shape on both sides: the same 4-bit
base, prompts, answer length, rollout, microbatch, reward function and KL penalty, and one optimizer step a rollout.
--examples puts so many answered questions before each prompt, other ones before each (few-shot prompting): the longer
the prompt, the more a group has in common. Rounds of the sides take turns. The bitsandbytes guard of models/base.py is
on for both, else TRL would lose its gradients on CPUs with AVX512-BF16. TRL has eager attention, its fastest for short
rows, unless --attention says otherwise. Both sides run in the environment that `onebase run` gives a stage. Live bytes
are counted in one more step of each (counting is slow), weights included. On a CPU our layers are unpacked once, as in
a stage; --four-bit leaves them in 4 bits, as a GPU does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), "."]
from bench_ppo import prompts, run_as_a_stage

ROLLOUT, MICRO, RATE = 64, 8, 1e-5


def vowels(completions: list[Any], **_: Any) -> list[float]:
    """The share of vowels: a reward that costs nothing and is never alike within a group."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]


def few_shot(tokenizer: Any, examples: int) -> list[dict[str, Any]]:
    """The demo prompts, each after `examples` demonstrations of its own."""
    lines = Path("data/demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    shown = itertools.cycle(json.loads(line)["messages"] for line in lines)
    rows = prompts(tokenizer)
    for row in rows:
        row["prompt"] = [turn for _ in range(examples) for turn in next(shown)] + row["prompt"]
    return rows


class Ours:
    def __init__(self, spec: Any, folder: Path, given: argparse.Namespace, dequantize: bool) -> None:
        from pipeline.models import adapters
        from pipeline.models import base as bases
        from pipeline.models.forward import plain_on_cpu
        from pipeline.ppo import rewards
        from pipeline.ppo.actors import REFERENCE, Actors
        from pipeline.ppo.grpo import GRPOTrainer
        from pipeline.ppo.grpo_settings import GRPOSettings

        tokenizer = bases.load_tokenizer(spec)
        model = adapters.carried(bases.load_base(spec, tokenizer), folder)
        adapters.twin(model, REFERENCE)
        settings = GRPOSettings(
            max_steps=1000, num_generations=given.group, generation_batch_size=ROLLOUT, beta=given.beta,
            per_device_train_batch_size=MICRO, max_completion_length=given.answer, learning_rate=RATE,
            gradient_checkpointing=False, dequantize_rollout=dequantize, loss_type="grpo",
        )  # fmt: skip
        actors = Actors(model, tokenizer.pad_token_id, settings.temperature, None, {})
        sources = [rewards.Source("vowels", 1.0, function=vowels)]
        self.modules = [model]
        if not given.four_bit:
            self.plain = plain_on_cpu(model)
            self.plain.__enter__()  # as the stage's loop does, for as long as it trains
        self.steps = GRPOTrainer(actors, tokenizer, few_shot(tokenizer, given.examples), sources, settings, 17).steps()

    def step(self) -> dict[str, float]:
        return next(self.steps)


class Theirs:
    def __init__(self, spec: Any, folder: Path, given: argparse.Namespace) -> None:
        import torch
        from datasets import Dataset
        from peft import PeftModel
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        from pipeline.models import base as bases

        tokenizer = bases.load_tokenizer(spec)
        policy = PeftModel.from_pretrained(bases.load_base(spec, tokenizer), folder, is_trainable=True)
        args = GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=MICRO, max_steps=1, seed=17, loss_type="grpo",
            gradient_accumulation_steps=ROLLOUT // MICRO, num_generations=given.group, beta=given.beta,
            max_completion_length=given.answer, learning_rate=RATE, bf16=given.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False, save_strategy="no", report_to="none", logging_strategy="no",
            disable_tqdm=True, temperature=1.0, top_k=0, top_p=1.0,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": row["prompt"]} for row in few_shot(tokenizer, given.examples)])
        self.modules = [policy]
        self.trainer = GRPOTrainer(
            model=policy, reward_funcs=vowels, args=args, train_dataset=rows, processing_class=tokenizer
        )
        self.trainer.remove_callback(PrinterCallback)

    def step(self) -> dict[str, float]:
        self.trainer.train()
        return {"answer_length": self.trainer.state.log_history[-1]["completions/mean_length"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, value in (
        ("answer", int, 48), ("examples", int, 0), ("group", int, 8), ("beta", float, 0.05), ("rounds", int, 2)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    run_as_a_stage()
    import torch
    import trl
    from live_bytes import LiveBytes

    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.models.spec import ModelSpec

    spec = ModelSpec(
        base="models/SmolLM2-135M-Instruct", dtype=given.dtype, chat_template="recipes/templates/chatml.jinja"
    )
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    adapters.save(adapters.fresh(bases.load_base(spec, bases.load_tokenizer(spec)), spec.lora), folder)
    theirs = f"trl {trl.__version__}"
    sides: dict[str, Any] = {
        "ours": Ours(spec, folder, given, dequantize=False),
        "ours, dequantised rollout": Ours(spec, folder, given, dequantize=True),
        theirs: Theirs(spec.model_copy(update={"attn_implementation": given.attention}), folder, given),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    of_cores: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(given.rounds + 1):
        for name, side in sides.items():
            started, worked = time.monotonic(), time.process_time()
            numbers = side.step()
            taken = time.monotonic() - started, time.process_time() - worked
            if turn or not given.rounds:  # the first is warm-up, unless it is the only one
                seconds[name].append(taken[0])
                of_cores[name].append(taken[1])
            parts = {key: round(value, 1) for key, value in numbers.items() if key.startswith("seconds_")}
            told = f"{taken[0]:.1f} s, {taken[1]:.1f} s of a core, {numbers['answer_length']:.1f} tokens an answer"
            print(f"  {name}: {told} {parts or ''}", flush=True)
    result = {}
    for name, side in sides.items():
        with LiveBytes().count(*side.modules) as live:
            side.step()
        result[name] = {
            "episodes_per_second": ROLLOUT / statistics.median(seconds[name]),
            "episodes_per_core_second": ROLLOUT / statistics.median(of_cores[name]),
            "peak_live_mib": live.peak / 2**20,
        }
    work = f"{ROLLOUT} episodes in groups of {given.group}, up to {given.answer} tokens, microbatch {MICRO}"
    print(f"\n{work}, {given.examples} examples before each prompt")
    print(f"beta {given.beta}, {given.dtype}, TRL with {given.attention} attention")
    print(f"ratios are to {theirs}; a second of a core's work takes little from what else the machine does")
    print(f"{'':<30} {'episodes/s':>10} {'ratio':>6} {'a core':>7} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    for name, row in result.items():
        told = f"{name:<30}"
        for key, width in (("episodes_per_second", 10), ("episodes_per_core_second", 7), ("peak_live_mib", 9)):
            told += f" {row[key]:>{width}.{0 if width == 9 else 2}f} {row[key] / result[theirs][key]:>6.2f}"
        print(told)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
