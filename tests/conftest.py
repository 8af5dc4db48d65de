"""A tiny base for the true NF4 path on the CPU: made here, no download, vocabulary of 512."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHATML = ROOT / "recipes" / "templates" / "chatml.jinja"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_base(folder: Path, seed: int = 0) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train([str(ROOT / "data" / "demonstrations.jsonl")], trainer)
    # pad is the end-of-turn token, as in SmolLM2: the trap that every mask must survive.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML.read_text()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def head(file: str, rows: int, to: Path) -> str:
    """The first rows of a demo file."""
    lines = (ROOT / "data" / file).read_text(encoding="utf-8").splitlines()[:rows]
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(to)


def tiny_tree(base: Path, folder: Path, name: str = "tiny") -> dict[str, Any]:
    """A whole chain of a few steps."""
    data = {
        "corpus": head("corpus.jsonl", 24, folder / "corpus.jsonl"),
        "dialogues": head("demonstrations.jsonl", 32, folder / "dialogues.jsonl"),
        "pairs": head("comparisons.jsonl", 24, folder / "pairs.jsonl"),
        "test": head("comparisons_test.jsonl", 8, folder / "pairs_test.jsonl"),
        "questions": head("questions.jsonl", 4, folder / "questions.jsonl"),
    }
    pairs = {"path": data["pairs"], "test": data["test"]}
    return {
        "name": name,
        "seed": 7,
        "model": {"base": str(base), "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}},
        "train": {
            "per_device_train_batch_size": 4, "gradient_checkpointing": False, "max_length": 128,
            "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3, "train_sampling_strategy": "group_by_length",
        },
        "stages": {
            "pretrain": {"data": {"path": data["corpus"], "test": 0.25}, "train": {"num_train_epochs": 1}},
            "sft": {
                "from": "pretrain", "data": {"path": data["dialogues"]}, "questions": data["questions"],
                "train": {"num_train_epochs": 1},
            },
            "reward": {"from": "sft", "data": pairs, "train": {"num_train_epochs": 1}},
            "dpo": {"from": "sft", "data": pairs, "train": {"num_train_epochs": 1, "beta": 0.1}},
        },
    }  # fmt: skip


def write_recipe(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    return path
