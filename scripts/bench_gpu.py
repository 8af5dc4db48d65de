"""Peak memory and tokens/s of every stage on this GPU, planned beside measured, against plain TRL + PEFT.

    python scripts/bench_gpu.py --model Llama-3.1-8B --rows 2 --length 1024 --out bench.json
    python scripts/bench_gpu.py --device cpu --tiny     that the script itself works; no figure of it means anything

Weights are random and quantised layer by layer, so nothing is downloaded and the whole never lies in memory in 16 bits.
Both sides train on the same rows, with the same LoRA, batch and checkpointing, one after the other in this process;
the first steps are left out of the times. "plain" is TRL's trainer as its documentation has it (its fused LM head, its
bfloat16 adapter); ours is the trainer of pipeline/stages. TRL has no PPO any more, so ours stands alone there,
with the cache that grows and with cache_implementation: static. Where Liger is
installed, ours is measured with its RMSNorm and SwiGLU as well. Measured
memory is torch.cuda.max_memory_allocated, to which the planned figure without the CUDA context is compared; what the
allocator had reserved is beside it. A stage that fails, or does not fit, is a row that says so; the JSON is written
anew after every row. Ours halves a batch that does not fit: a note says to how many rows, and the plan is of the whole.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), "."]

from datasets import Dataset
from make_tiny_base import make_tiny_base
from peft import LoraConfig, get_peft_model
from plan_oracle import LORA, MODELS, Variant, checkpoint_first, hf_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from pipeline.disk.atomic import write_json
from pipeline.models import adapters, packing
from pipeline.models.base import keep_gradients_on_cpu
from pipeline.models.out_of_memory import is_out_of_memory
from pipeline.plan import cards
from pipeline.plan.memory import CONTEXT, Model, memory
from pipeline.plan.shapes import Adapter, shapes_of
from pipeline.plan.time import ppo_seconds, step_seconds
from pipeline.plan.work import Work
from pipeline.ppo.actors import REFERENCE, Actors
from pipeline.ppo.ppo import PPOTrainer
from pipeline.ppo.rewards import Source
from pipeline.ppo.settings import PPOSettings
from pipeline.training import trainer as shared

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip
WARM_UP = 2
STATIC = "ours, static cache"
LIGER = "ours, Liger"
TRAINERS = {
    "pretrain": (SFTTrainer, SFTConfig),
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
}


@dataclass
class Measured:
    """One side of one stage. Memory in GiB without the CUDA context; None on a CPU, which does not count it."""

    stage: str
    side: str
    planned_gib: float | None = None
    measured_gib: float | None = None
    reserved_gib: float | None = None
    planned_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    note: str = ""


class StepTimes(TrainerCallback):
    """When each optimizer step was done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, list[float]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        _wait(self.device)
        self.ends.append(time.perf_counter())


def random_base(config: dict[str, Any], device: torch.device, reward: bool = False, attention: str = "sdpa") -> Any:
    """A base of these shapes with random weights, linear layers in nf4 with double quantisation."""
    made = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    hf = hf_config(config, Variant(attention=attention), **({"num_labels": 1} if reward else {}))
    with torch.device("meta"):
        model = made.from_config(hf, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name not in ("lm_head", "score"):
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta",
                compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            weight = torch.randn(module.out_features, module.in_features, device=device, dtype=torch.bfloat16) * 0.02
            layer.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            ).to(device)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                data = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02
                module._parameters[name] = torch.nn.Parameter(data, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.ones(buffer.shape, device=device, dtype=buffer.dtype)
    if hf.tie_word_embeddings and not reward:
        model.lm_head.weight = model.get_input_embeddings().weight
    model.model.rotary_emb = type(model.model.rotary_emb)(hf).to(device)
    keep_gradients_on_cpu(model)
    model.is_loaded_in_4bit = True
    if attention == packing.NAME:
        packing.pack_inside(model)
    return model


def rows_of(stage: str, count: int, length: int, vocab: int) -> Dataset:
    """Rows of one length, of random tokens; of a pair both answers."""
    generator = torch.Generator().manual_seed(17)
    ids = torch.randint(3, vocab, (count, 2, length), generator=generator).tolist()
    if stage in ("pretrain", "sft"):
        return Dataset.from_dict({"input_ids": [a for a, _ in ids], "labels": [a for a, _ in ids]})
    prompt = length // 2 if stage == "dpo" else 0
    columns = {"chosen_ids": [a[prompt:] for a, _ in ids], "rejected_ids": [b[prompt:] for _, b in ids]}
    return Dataset.from_dict({**columns, **({"prompt_ids": [a[:prompt] for a, _ in ids]} if prompt else {})})


def trainer_of(stage: str, side: str, given: argparse.Namespace, config: dict[str, Any], folder: Path) -> Any:
    """A trainer of random weights and rows: of pipeline/stages where the side is "ours", else TRL's own."""
    device = torch.device(given.device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    base = random_base(config, device, reward=stage == "reward")
    model = get_peft_model(base, LoraConfig(**LORA, **adapters._task(stage == "reward")))
    trainer_class, config_class = TRAINERS[stage]
    if stage == "dpo":
        trainer_class = type("DPOTrainer", (shared.TakesEncoded, DPOTrainer), {})
    layers = checkpointed(given, config)
    packing = {"packing": True, "packing_strategy": "bfd_split"} if stage == "pretrain" else {}
    args = config_class(
        **packing, output_dir=str(folder / "out"), per_device_train_batch_size=given.rows, max_length=given.length,
        max_steps=WARM_UP + given.steps, activation_checkpointing=layers > 0, report_to="none", save_strategy="no",
        use_cpu=device.type == "cpu", bf16=True, disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    args.checkpointed_layers = layers
    rows = rows_of(stage, given.rows * (WARM_UP + given.steps), given.length, config["vocab_size"])
    options = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
    args.by_liger = side == LIGER
    if side != "plain":
        return shared.build(trainer_class, adapters._ready(model), **options)
    return trainer_class(model=model, **options)


def train(stage: str, side: str, given: argparse.Namespace, config: dict[str, Any], folder: Path) -> Measured:
    device = torch.device(given.device)
    trainer = trainer_of(stage, side, given, config, folder)
    halved: list[int] = []
    trainer.when_split = lambda rows, left: halved.append(left)
    times = StepTimes(device)
    trainer.add_callback(times)
    _reset(device)
    trainer.train()
    sequences = given.rows * (2 if stage in ("reward", "dpo") else 1)
    seconds = (times.ends[-1] - times.ends[WARM_UP - 1]) / given.steps
    packed = stage == "pretrain"
    work = Work(
        sequences, given.length, checkpointed(given, config), packed, masked=packed and given.rows > 1,
        accumulates=False, frozen=int(stage == "dpo"), score_head=stage == "reward", reference=stage == "dpo",
        evaluates=False,
    )  # fmt: skip
    planned = Model(shapes_of(config), Adapter())
    expected = step_seconds(planned, work, _card(device)) if device.type == "cuda" and side == "ours" else None
    return Measured(
        stage, side, (memory(planned, work).total - CONTEXT) / 2**30 if side == "ours" else None, *_peaks(device),
        sequences * given.length / expected if expected else None, sequences * given.length / seconds,
        f"did not fit: {halved[-1]} rows at a time" if halved else "",
    )  # fmt: skip


def checkpointed(given: argparse.Namespace, config: dict[str, Any]) -> int:
    """Layers with activation checkpointing."""
    return int(config["num_hidden_layers"]) if given.checkpointed is None else int(given.checkpointed)


def ppo_trainer(given: argparse.Namespace, config: dict[str, Any], folder: Path, side: str = "ours") -> PPOTrainer:
    """PPO on random weights with one reward model; answers as long as they may be."""
    device = torch.device(given.device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    model = get_peft_model(random_base(config, device), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    model = adapters._ready(model)
    adapters.twin(model, REFERENCE)
    adapters.twin(model, "reward-reward")
    checkpoint_first(model, checkpointed(given, config))
    settings = PPOSettings(
        steps=1 + given.steps, batch_size=4 * given.rows, per_device_train_batch_size=given.rows,
        response_length=given.length // 2, num_ppo_epochs=1,
        cache_implementation="static" if side == STATIC else None,
    )  # fmt: skip
    head_1H = torch.randn(1, config["hidden_size"], device=device, dtype=torch.bfloat16)
    actors = Actors(model, tokenizer.pad_token_id, 1.0, settings.critic, {"reward-reward": head_1H})
    sources = [Source("reward", 1.0, adapter="reward-reward")]
    rows: list[Any] = [{"prompt": "a " * (given.length // 8)}] * settings.batch_size
    trainer = PPOTrainer(actors, tokenizer, rows, sources, settings, 17)
    trainer.stops = []  # random weights would end where they like
    return trainer


def ppo(side: str, given: argparse.Namespace, config: dict[str, Any], folder: Path) -> Measured:
    """Steps of pipeline/ppo, rollouts included."""
    device = torch.device(given.device)
    trainer = ppo_trainer(given, config, folder, side)
    settings = trainer.settings
    halved: list[int] = []
    trainer.when_split = lambda episodes, left: halved.append(left)
    _reset(device)
    ends, tokens = [], []
    for _ in trainer.steps():
        _wait(device)
        ends.append(time.perf_counter())
        tokens.append(trainer.tokens)
    length = tokens[0] // settings.batch_size
    work = Work(
        given.rows, length, checkpointed(given, config), masked=False, frozen=2, answer=settings.response_length,
        episodes=settings.batch_size, scored=2, evaluates=False,
    )  # fmt: skip
    planned = Model(shapes_of(config), Adapter())
    expected = ppo_seconds(planned, work, _card(device), 1) if device.type == "cuda" else None
    return Measured(
        "ppo", side, (memory(planned, work).total - CONTEXT) / 2**30, *_peaks(device),
        settings.batch_size * length / expected if expected else None,
        (tokens[-1] - tokens[0]) / (ends[-1] - ends[0]),
        f"did not fit: {halved[-1]} episodes at a time" if halved else "",
    )  # fmt: skip


def _card(device: torch.device) -> cards.Card:
    return cards.describe_card(
        torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peaks(device: torch.device) -> tuple[float | None, float | None]:
    """The most that was allocated and that the allocator had reserved, in GiB."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30


def measured(stage: str, side: str, given: argparse.Namespace, config: dict[str, Any], folder: Path) -> Measured:
    """A row, also of what fails."""
    try:
        return ppo(side, given, config, folder) if stage == "ppo" else train(stage, side, given, config, folder)
    except Exception as error:  # whatever one stage dies of, the others are still to be measured
        full = is_out_of_memory(error) or "does not fit in memory" in str(error)
        if not full:
            traceback.print_exc()
        why = "out of memory" if full else f"failed: {type(error).__name__}: {error}".splitlines()[0]
        return Measured(stage, side, note=why.replace("|", "/")[:120])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--stages", nargs="+", choices=[*TRAINERS, "ppo"], default=[*TRAINERS, "ppo"])
    for name, value in (("rows", 2), ("length", 1024), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--checkpointed", type=int, help="layers with activation checkpointing, ours; all if not given")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA here; --device cpu --tiny tries the script itself")
    if min(given.rows, given.length // 16, given.steps) < 1:
        sys.exit("--rows and --steps from 1 up, --length from 16 up")
    warnings.simplefilter("ignore")
    config = TINY if given.tiny else MODELS[given.model]
    device = torch.device(given.device)
    machine = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    settings = {"machine": machine, "torch": torch.__version__, **{k: str(v) for k, v in vars(given).items()}}
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as scratch:
        make_tiny_base(Path(scratch) / "tiny")
        for stage in given.stages:
            liger = (LIGER,) if given.device == "cuda" and find_spec("liger_kernel") else ()
            for side in ("ours", STATIC) if stage == "ppo" else ("plain", "ours", *liger):
                print(f"{stage}, {side} ...", flush=True)
                _reset(device)
                found.append(measured(stage, side, given, config, Path(scratch)))
                write_json(given.out, {**settings, "measured": [asdict(one) for one in found]})
    print(f"\n{machine}, {'tiny' if given.tiny else given.model}, {given.rows} x {given.length}; {given.out}")
    print("| stage | side | planned GiB | measured GiB | reserved GiB | planned tokens/s | measured tokens/s | note |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in found:
        shown = list(asdict(one).values())[2:-1]
        cells = ["" if v is None else f"{v:.2f}" if v < 100 else f"{v:.0f}" for v in shown]
        print(f"| {one.stage} | {one.side} | {' | '.join(cells)} | {one.note} |")


if __name__ == "__main__":
    main()
