"""Our PPO against TRL 1.12's experimental PPOTrainer: episodes a second and peak live bytes, same work, in one run.

    pip install --no-deps --target /tmp/trl112 trl==1.12.0
    python scripts/bench_ppo.py /tmp/trl112 [--answer 48] [--rounds 2] [--json FILE]

The demo model answers the demo prompts, with fresh adapters of the same shape on both sides: the same 4-bit base,
prompts, answer length, batch, microbatch and epochs. TRL holds three quantised models (policy with its adapter switched
off as reference, value, reward), ours one. Rounds are interleaved; the bitsandbytes guard of models/base.py is on for
both, else TRL would lose its gradients on CPUs with AVX512-BF16. Live bytes are counted in one more step of each
(counting is slow), weights included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, MICRO, EPOCHS, RATE, TEMPERATURE = 32, 8, 2, 1e-5, 1.0


def run_as_a_stage() -> None:
    """Start anew in the environment of a stage on an idle machine; glibc reads its settings at the start alone."""
    sys.path.append(".")
    from pipeline.runs.environment import make_environment
    from pipeline.runs.runner import SPINS

    wanted = {"GOMP_SPINCOUNT": str(SPINS), **make_environment()}
    wanted |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)


def prompts(tokenizer: Any) -> list[dict[str, Any]]:
    lines = Path("data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**json.loads(line), "_place": f"data/prompts.jsonl:{i}"} for i, line in enumerate(lines, 1)]


def fresh_adapters(spec: Any, folder: Path) -> None:
    """A policy that is still the base, and a reward model with a random head."""
    import torch

    from pipeline.models import adapters
    from pipeline.models import base as bases

    torch.manual_seed(0)
    tokenizer = bases.load_tokenizer(spec)
    adapters.save(adapters.fresh(bases.load_base(spec, tokenizer), spec.lora), folder / "policy")
    judge = bases.load_base(spec, tokenizer, num_labels=1)
    adapters.save(adapters.fresh(judge, spec.lora, head=True), folder / "reward")


class Ours:
    name = "onebase"

    def __init__(self, spec: Any, folder: Path, answer: int, critic: str, dequantize: bool) -> None:
        from pipeline.models import adapters
        from pipeline.models import base as bases
        from pipeline.models.forward import plain_on_cpu
        from pipeline.ppo import rewards
        from pipeline.ppo.actors import REFERENCE, VALUE, Actors
        from pipeline.ppo.ppo import PPOTrainer
        from pipeline.ppo.settings import PPOSettings

        tokenizer = bases.load_tokenizer(spec)
        model = adapters.carried(bases.load_base(spec, tokenizer), folder / "policy")
        adapters.twin(model, REFERENCE)
        source = rewards.source("reward", 1.0)
        head = adapters.borrowed(model, "reward-reward", folder / "reward")
        if critic == "adapter":
            adapters.borrowed(model, VALUE, folder / "reward", trainable=True)
        settings = PPOSettings(
            steps=1000, batch_size=BATCH, per_device_train_batch_size=MICRO, response_length=answer,
            num_ppo_epochs=EPOCHS, learning_rate=RATE, gradient_checkpointing=False, critic=critic,  # type: ignore[arg-type]
            dequantize_rollout=dequantize,
        )  # fmt: skip
        actors = Actors(model, tokenizer.pad_token_id, TEMPERATURE, settings.critic, {"reward-reward": head})  # type: ignore[dict-item]
        self.modules = [model, actors.value_head]
        self.plain = plain_on_cpu(model)
        self.plain.__enter__()  # as the stage's loop does, for as long as it trains
        self.steps = PPOTrainer(actors, tokenizer, prompts(tokenizer), [source], settings, 17).steps()

    def step(self) -> dict[str, float]:
        return next(self.steps)


class Theirs:
    name = "trl 1.12"

    def __init__(self, spec: Any, folder: Path, answer: int) -> None:
        import torch
        from datasets import Dataset
        from peft import PeftModel
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        from pipeline.data import render
        from pipeline.models import base as bases

        tokenizer = bases.load_tokenizer(spec)
        # It tells padding by the token's id, so the end-of-turn token must not be the pad token.
        tokenizer.pad_token_id, tokenizer.padding_side = 0, "left"

        def headed(trainable: bool) -> Any:
            base = bases.load_base(spec, tokenizer, num_labels=1)
            return PeftModel.from_pretrained(base, folder / "reward", is_trainable=trainable).base_model.model

        policy = PeftModel.from_pretrained(bases.load_base(spec, tokenizer), folder / "policy", is_trainable=True)
        value, reward = headed(True), headed(False)
        for model in (policy, value, reward):
            for name, weight in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    weight.data = weight.data.bfloat16()  # as its own peft_config path does
        args = PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=BATCH // MICRO,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=BATCH,
            response_length=answer,
            total_episodes=BATCH,
            stop_token="eos",
            missing_eos_penalty=1.0,
            temperature=TEMPERATURE,
            learning_rate=RATE,
            num_sample_generations=0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = Dataset.from_list([{"input_ids": render.prompt(tokenizer, row)} for row in prompts(tokenizer)])
        self.modules = [policy, value, reward]
        self.trainer = PPOTrainer(
            args=args, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
            train_dataset=rows, eval_dataset=rows,
        )  # fmt: skip
        from transformers import PrinterCallback

        self.trainer.remove_callback(PrinterCallback)

    def step(self) -> None:
        self.trainer.train()  # total_episodes is one batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trl", type=Path, help="folder of pip install --no-deps --target for trl==1.12.0")
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--critic", nargs="+", choices=["trunk", "adapter"], default=["trunk", "adapter"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    run_as_a_stage()
    sys.path[:0] = [str(given.trl), str(Path(__file__).resolve().parent), "."]
    import torch
    import trl
    from live_bytes import LiveBytes

    from pipeline.models.spec import ModelSpec

    assert trl.__version__.startswith("1.12"), f"found trl {trl.__version__} in {given.trl}"
    spec = ModelSpec(
        base="models/SmolLM2-135M-Instruct", dtype="bfloat16", chat_template="recipes/templates/chatml.jinja"
    )
    # For rows this short TRL is fastest with eager attention; with sdpa our loader would pack its batches too.
    eager = spec.model_copy(update={"attn_implementation": "eager"})
    folder = Path(tempfile.mkdtemp())
    fresh_adapters(spec, folder)
    sides: dict[str, Any] = {
        f"ours, critic {critic}, dequantised rollout": Ours(spec, folder, given.answer, critic, dequantize=True)
        for critic in given.critic
    }
    sides["trl 1.12"] = Theirs(eager, folder, given.answer)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    of_cores: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(given.rounds + 1):
        for name, side in sides.items():
            started, worked = time.monotonic(), time.process_time()
            numbers = side.step()
            if turn or not given.rounds:  # the first is warm-up, unless it is the only one
                seconds[name].append(time.monotonic() - started)
                of_cores[name].append(time.process_time() - worked)
            if numbers:
                parts = {key: round(value, 2) for key, value in numbers.items() if key.startswith("seconds_")}
                print(f"  {name}: {parts}, {numbers['answer_length']:.1f} tokens an answer", flush=True)
    result = {}
    for name, side in sides.items():
        with LiveBytes().count(*side.modules) as live:
            side.step()
        best = min(seconds[name])
        result[name] = {
            "episodes_per_second": BATCH / best,
            "episodes_per_core_second": BATCH / min(of_cores[name]),
            "median_episodes_per_second": BATCH / statistics.median(seconds[name]),
            "peak_live_mib": live.peak / 2**20,
        }
    theirs = result["trl 1.12"]
    work = f"{BATCH} episodes, answers of up to {given.answer} tokens, microbatch {MICRO}, {EPOCHS} epochs"
    print(f"\n{work}; torch {torch.__version__}")
    print("ratios are to trl 1.12; a second of a core's work takes little from what else the machine does")
    print(f"{'':<42} {'episodes/s':>10} {'ratio':>6} {'a core':>7} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
    for name, row in result.items():
        told = f"{name:<42}"
        for key, width in (("episodes_per_second", 10), ("episodes_per_core_second", 7), ("peak_live_mib", 9)):
            told += f" {row[key]:>{width}.{0 if width == 9 else 2}f} {row[key] / theirs[key]:>6.2f}"
        print(told)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
