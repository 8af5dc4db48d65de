"""What `onebase plan` computes by formula, counted exactly: live bytes of the stages' own code on tensors without data.

    python scripts/plan_oracle.py [--layers 4]

Builds models of true widths (fewer layers, as all are alike) from nothing but their shapes, runs the memory-relevant
parts of each stage's step through transformers, PEFT, TRL's fused LM head and pipeline/ppo, and prints each entry
beside the planner's with the error. Machine: any CPU; no weights, no GPU. Not in either figure: the CUDA context.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), "."]

import ppo_memory
from fake_base import as_on_cuda, fake_base
from live_bytes import LiveBytes
from make_tiny_base import make_tiny_base
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from trl.trainer.utils import add_fused_lm_head

from pipeline.measure.scoring import token_log_likelihoods
from pipeline.models import adapters
from pipeline.models.base import computing
from pipeline.models.forward import LanguageModel
from pipeline.models.out_of_memory import gradients_aside
from pipeline.plan.memory import Model, memory, scored
from pipeline.plan.shapes import Adapter, shapes_of
from pipeline.plan.stage import attention
from pipeline.plan.work import Work
from pipeline.ppo.actors import POLICY, REFERENCE, VALUE, Actors
from pipeline.ppo.ppo import PPOTrainer
from pipeline.ppo.settings import PPOSettings

MODELS: dict[str, dict[str, Any]] = {
    # the widths of config.json; what is not said is the family's default
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "Llama-2-7B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "Mistral-7B": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen3-4B": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Gemma-2B": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 256000,
    },
    "Gemma-3-1B": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144,
    },
    "Phi-3-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False,
    },
    "SmolLM2-1.7B": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "Granite-3-2B": {
        "model_type": "granite", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49155, "tie_word_embeddings": True,
    },
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
Bytes = dict[str, int]
MIB = 2**20
MISMATCHED = 1
"""How many times as long as the longest row a prompt with another row's answer can be (kto)."""
SHORTER = 8
"""How many times as short as the rows that it learns again a pair is (replay)."""
STAGES = ("pretrain", "sft", "reward", "dpo", "replay", "kto", "ppo", "evaluation")


@dataclass(frozen=True)
class Variant:
    """What a recipe's model section may say beside the usual."""

    dtype: str = "bfloat16"
    attention: str = "sdpa"
    dropout: float = 0.0
    r: int = 16

    @property
    def lora(self) -> dict[str, Any]:
        return {**LORA, "r": self.r, "lora_dropout": self.dropout}

    @property
    def name(self) -> str:
        usual = Variant()
        return ", ".join(f"{key} {value}" for key, value in vars(self).items() if value != getattr(usual, key))


USUAL = Variant()
VARIED = ("Llama-3.1-8B", "Qwen2.5-1.5B", "SmolLM2-1.7B")
"""Models of which the variants are counted too."""
SEGMENTS = Variant(attention="segments")
SEGMENTED = (
    *(("sft", rows, length) for rows, length in ((2, 512), (2, 2048), (1, 4096))),
    *((kind, 2, 512) for kind in ("pretrain", "dpo", "reward", "ppo")),
)
"""What is counted of attention by segments: of rows that are all as long as the longest, none beginning as another."""
VARIANTS = (Variant(dtype="float32"), Variant(attention="eager"), Variant(dropout=0.1), Variant(r=128))


@dataclass(frozen=True)
class Entry:
    """One part of a stage's memory in bytes, as planned and as counted."""

    model: str
    stage: str
    rows: int
    length: int
    checkpointed: str
    variant: str
    part: str
    planned: int
    counted: int

    @property
    def error(self) -> float:
        return self.planned / self.counted - 1


class Counter(LiveBytes):
    """Peaks of parts of the work, each above a mark."""

    def mark(self) -> None:
        self.mark_at = self.peak = self.now

    def above(self) -> int:
        found, self.peak = self.peak - self.mark_at, self.now
        return found


def step(config: dict[str, Any], stage: str, rows: int, length: int, checkpointed: int, variant: Variant) -> Bytes:
    """A step of pretrain (rows packed into one), sft, dpo (rows: both answers of each pair), kto or reward; or of a dpo
    stage with short pairs that learns as many rows of an earlier stage again (replay)."""
    again, stage = (rows, "dpo") if stage == "replay" else (0, stage)
    live, found = Counter(), {}
    with as_on_cuda(), live:
        base = fake_base(hf_config(config, variant), stage == "reward", getattr(torch, variant.dtype))
        found["weights"] = live.now
        if stage != "reward":
            outputs = {"dpo": ("log_probs", "entropy"), "kto": ("log_probs", "entropy", "mean_logits")}
            add_fused_lm_head(base, outputs=outputs.get(stage, ("log_probs", "entropy", "is_top1")))
        task = (
            {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if stage == "reward" else {"task_type": "CAUSAL_LM"}
        )
        model = adapters._ready(get_peft_model(base, LoraConfig(**{**variant.lora, **task})))
        if stage in ("dpo", "kto"):
            adapters.twin(model, "ref")
            model.set_adapter("default")
        found["adapters"] = live.now - found["weights"]
        checkpoint_first(model, checkpointed)
        trained = adapters.trainable(model).values()
        before = live.now
        states = [torch.zeros_like(weight) for weight in trained for _ in ("exp_avg", "exp_avg_sq")]
        found["optimizer"] = live.now - before
        own = length // SHORTER if again else length
        _loss(model, stage, rows, own).backward()
        found["gradients"] = sum(weight.grad.nbytes for weight in trained)
        live.mark()
        if again:
            with gradients_aside(list(trained)):
                _loss_again(Actors(model, 0, 1.0, None, {}), again, length).backward()
        with gradients_aside(list(trained)):  # as the trainer does from one micro-batch to the next
            _loss(model, stage, rows, own).backward()
        found["activations"] = live.above()
        del states
    return found


def _loss(model: Any, stage: str, rows: int, length: int) -> torch.Tensor:
    model.train()
    if stage == "pretrain":
        batch = {"input_ids": torch.zeros(1, rows * length, dtype=torch.long)}
        batch["position_ids"] = torch.arange(length).repeat(rows)[None]
    else:
        batch = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
        batch["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
    with computing(model):
        if stage == "reward":
            return model(**batch, use_cache=False).logits.sum()  # type: ignore[no-any-return]
        batch["labels"] = batch["input_ids"]
        others = {name: value.repeat(1, MISMATCHED) for name, value in batch.items()}  # prompts with others' answers
        if stage == "kto":
            with torch.no_grad():
                kl = model(**others, fused_lm_head=True).log_probs
        log_probs = model(**batch, fused_lm_head=True).log_probs
        if stage in ("dpo", "kto"):
            flags = [(layer, layer.gradient_checkpointing) for layer in decoder_layers(model)]
            for layer, _ in flags:
                layer.gradient_checkpointing = False
            model.set_adapter("ref")
            with torch.no_grad():
                if stage == "kto":
                    kl = kl - model(**others, fused_lm_head=True).log_probs
                reference = model(**batch, fused_lm_head=True).log_probs
            model.set_adapter("default")
            for layer, flag in flags:
                layer.gradient_checkpointing = flag
            log_probs = log_probs - reference
    return log_probs.sum()  # type: ignore[no-any-return]


def _loss_again(actors: Actors, rows: int, length: int) -> torch.Tensor:
    """Actors.texts() of texts whose every token carries loss: which ones do cannot be read off tensors without data."""
    actors.act_as(POLICY)
    ids_BT = torch.zeros(rows, length, dtype=torch.long)
    row_N, state_N = torch.arange(rows).repeat_interleave(length - 1), torch.arange(length - 1).repeat(rows)
    with computing(actors.model):
        states_NH = actors.hidden(ids_BT, torch.ones_like(ids_BT))[row_N, state_N]
        logp_N, _ = actors._log_probs(states_NH, ids_BT[row_N, state_N + 1], temperature=1.0)
    return -logp_N.sum()


def evaluation(config: dict[str, Any], rows: int, length: int, variant: Variant) -> int:
    """Peak above what stays of scoring rows without gradients, as measure/scoring.py does."""
    live = Counter()
    with as_on_cuda(), live, torch.no_grad():
        base = fake_base(hf_config(config, variant), dtype=getattr(torch, variant.dtype))
        model = adapters._ready(get_peft_model(base, LoraConfig(**variant.lora, task_type="CAUSAL_LM")))
        model.eval()
        language_model = LanguageModel(model, 0)
        live.mark()
        ids_BT = torch.zeros(rows, length, dtype=torch.long)
        with computing(model):
            states_NH = language_model.hidden(ids_BT, torch.ones_like(ids_BT)).flatten(0, 1)
        token_log_likelihoods(language_model, states_NH, ids_BT.flatten())
        return live.above()


def ppo(config: dict[str, Any], settings: PPOSettings, prompt: int, checkpointed: int, variant: Variant) -> Bytes:
    """A PPO step with one reward model; prompts and answers of full length."""
    live, found = Counter(), {}
    tokenizer = _tokenizer()
    with as_on_cuda(), live:
        hf = hf_config(config, variant)
        base = fake_base(hf, dtype=getattr(torch, variant.dtype))
        found["weights"] = live.now
        model = adapters._ready(get_peft_model(base, LoraConfig(**variant.lora, task_type="CAUSAL_LM")))
        adapters.twin(model, REFERENCE)
        adapters.twin(model, "reward-reward")
        if settings.critic == "adapter":
            adapters.twin(model, VALUE, trainable=True)
        found["adapters"] = live.now - found["weights"]
        checkpoint_first(model, checkpointed)
        actors = Actors(model, 0, 1.0, settings.critic, {"reward-reward": torch.empty(1, hf.hidden_size)})
        trainer = PPOTrainer(actors, tokenizer, [], [], settings, 17)
        given = SimpleNamespace(prompt=prompt, answer=settings.response_length, batch=settings.batch_size)
        live.mark()
        ppo_memory.step(trainer, given, lambda part: found.update({part: live.above()}))  # type: ignore[arg-type]
        trained = [weight for role in ("policy", "value") for weight in actors.trained(role).values()]  # type: ignore[arg-type]
        found["gradients"] = sum(weight.nbytes for weight in trained)
        states = [state for optimizer in trainer.optimizers.values() for state in optimizer.state.values()]
        found["optimizer"] = sum(value.nbytes for state in states for value in state.values())
        live.mark()
        ppo_memory.step(trainer, given, lambda part: found.update({part: live.above()}))  # type: ignore[arg-type]
    return found


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_first(model: Any, count: int) -> None:
    """Activation checkpointing in the first `count` layers."""
    if count:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = index < count


def hf_config(config: dict[str, Any], variant: Variant = USUAL, **more: Any) -> Any:
    named = {key: value for key, value in config.items() if key != "model_type"} | more
    return AutoConfig.for_model(config["model_type"], **named, pad_token_id=0, attn_implementation=variant.attention)


@cache
def _tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        return AutoTokenizer.from_pretrained(make_tiny_base(Path(scratch) / "tiny"))


def against_plan(
    name: str, layers: int, kind: str, rows: int, length: int, checkpointed: int, variant: Variant = USUAL
) -> Iterator[Entry]:
    """Every entry of a stage as the planner has it and as it was counted."""
    config = {**MODELS[name], "num_hidden_layers": layers}
    model = Model(shapes_of(config), Adapter(variant.r, variant.dropout), bytes=4 if variant.dtype == "float32" else 2)
    how: dict[str, Any] = attention(variant.attention)
    if kind == "ppo":
        settings = PPOSettings(batch_size=4 * rows, per_device_train_batch_size=rows, response_length=length // 2)
        counted = ppo(config, settings, length - length // 2, checkpointed, variant)
        work = Work(rows, length, checkpointed, answer=length // 2, episodes=4 * rows, frozen=2, **how)
        counted["activations"] = counted.pop("forward and backward")
        counted["rollout"] = max(counted.pop("sampling"), counted.pop("scoring"))
        counted.pop("missing gradients")
    elif kind == "evaluation":
        counted = {"evaluation": evaluation(config, rows, length, variant)}
        work = Work(rows, length, checkpointed, **how)
    else:
        counted = step(config, kind, rows, length, checkpointed, variant)
        packed, reference = kind == "pretrain", kind in ("dpo", "kto", "replay")
        how |= {"score_head": kind == "reward", "reference": reference, "frozen": int(reference)}
        how |= {"mismatched": MISMATCHED * length if kind == "kto" else 0}
        replay = kind == "replay"
        how |= {"again": (length,), "rows_again": rows} if replay else {}
        work = Work(rows, length // SHORTER if replay else length, checkpointed, packed, **how)
    needs = memory(model, work)
    planned = {
        "weights": needs.quantised + needs.unquantised, "adapters": needs.adapters, "gradients": needs.gradients,
        "optimizer": needs.optimizer, "activations": needs.training, "rollout": needs.rollout,
        "evaluation": scored(model, rows * length, work.scores),
    }  # fmt: skip
    for part, amount in counted.items():
        yield Entry(name, kind, rows, length, f"{checkpointed} of {layers}", variant.name, part, planned[part], amount)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--model", action="append", choices=MODELS, help="these alone (may be repeated)")
    parser.add_argument("--stage", action="append", choices=STAGES, help="these alone (may be repeated); ppo is slow")
    parser.add_argument("--attention", choices=("sdpa", "segments", "eager"), help="this alone")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    counted: list[Entry] = []
    print("| model | stage | batch | checkpointed | variant | planned MiB | counted MiB | error | worst other entry |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in given.model or MODELS:
        wanted = (case for case in cases(name, given.layers) if case[0] in (given.stage or STAGES))
        for case in (case for case in wanted if given.attention in (None, case[-1].attention)):
            entries = list(against_plan(name, given.layers, *case))
            counted += entries
            peak = next(e for e in entries if e.part in ("activations", "evaluation"))
            other = max((e for e in entries if e is not peak), key=lambda e: abs(e.error), default=None)
            told = f"{other.part} {other.error:+.1%}" if other else ""
            print(
                f"| {name} | {peak.stage} | {peak.rows} x {peak.length} | {peak.checkpointed} | {peak.variant} | "
                f"{peak.planned / MIB:.0f} | {peak.counted / MIB:.0f} | {peak.error:+.1%} | {told} |",
                flush=True,
            )
    print("\n| model | cases | entries | worst |\n| --- | --- | --- | --- |")
    for name in [*dict.fromkeys(entry.model for entry in counted), ""]:
        own = [entry for entry in counted if name in ("", entry.model)]
        worst = max(own, key=lambda entry: abs(entry.error))
        shapes = {
            (entry.model, entry.stage, entry.rows, entry.length, entry.checkpointed, entry.variant) for entry in own
        }
        where = f"{worst.part}, {worst.stage}, {worst.rows} x {worst.length}, {worst.checkpointed} checkpointed"
        print(
            f"| {name or 'all'} | {len(shapes)} | {len(own)} | {worst.error:+.1%} ({where}"
            f"{', ' + worst.variant if worst.variant else ''}{'' if name else ', ' + worst.model}) |"
        )


def cases(name: str, layers: int) -> Iterator[tuple[str, int, int, int, Variant]]:
    """Stage, rows, length, checkpointed layers and variant of all that is counted of a model."""
    for checkpointed in (0, 1, layers):
        for rows, length in ((2, 512), (1, 4096)):
            yield "sft", rows, length, checkpointed, USUAL
    for kind in ("pretrain", "dpo", "replay", "kto", "reward", "ppo"):
        if kind == "reward" and MODELS[name]["model_type"] == "granite":  # transformers gives it no score head
            continue
        for checkpointed in (0, layers):
            yield kind, 2, 512, checkpointed, USUAL
    yield "evaluation", 2, 512, 0, USUAL
    for checkpointed in (0, layers):
        yield "sft", 2, 2048, checkpointed, USUAL
    for kind, rows, length in SEGMENTED:
        if kind == "reward" and MODELS[name]["model_type"] == "granite":
            continue
        for checkpointed in (0, layers):
            yield kind, rows, length, checkpointed, SEGMENTS
    yield "evaluation", 2, 512, 0, SEGMENTS
    for variant in VARIANTS if name in VARIED else ():
        for kind in ("sft", "dpo"):
            for checkpointed in (0, layers):
                yield kind, 2, 1024, checkpointed, variant
        yield "evaluation", 1, 1536, 0, variant


if __name__ == "__main__":
    main()
