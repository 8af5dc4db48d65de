"""Liger's RMSNorm and SwiGLU give the losses and gradients that the base's own give.

Run as a script, it compares the two: on a card as they are, elsewhere by Triton's interpreter, which has to be asked
for before Triton is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.models import adapters, liger
from pipeline.models.base import computing, load_base, load_tokenizer
from pipeline.models.spec import ModelSpec

LORA = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {}, "gemma2": {}, "phi3": {},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}  # fmt: skip
NORM, GATE = "LigerRMSNormFunctionBackward", "LigerSiLUMulFunctionBackward"


def interpret_floats() -> None:
    """What Triton's interpreter lacks: fractions as arguments, and a GPU's library of functions."""
    import numpy
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    others = interpreter._implicit_cvt

    def convert(given: Any) -> Any:
        if not isinstance(given, float):
            return others(given)
        return tl.tensor(interpreter.TensorHandle(numpy.array([given], dtype=numpy.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = convert
    rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)


def bases(folder: str) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = ModelSpec(base=folder, lora=LORA, dtype="float32")
    tokenizer = load_tokenizer(spec)
    made = {"llama": load_base(spec, tokenizer), "reward": load_base(spec, tokenizer, num_labels=1)}
    for family, more in FAMILIES.items():
        config = AutoConfig.for_model(family, **SHAPE, **more)
        made[family] = AutoModelForCausalLM.from_config(config).to(device).requires_grad_(False)
    return made


def trained(folder: str) -> Any:
    """What the word of a recipe makes of the model that a stage trains. TRL, which does more by it, is not told."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from pipeline.data.load import DataSpec
    from pipeline.disk.artifact import Artifact
    from pipeline.stages import STAGES
    from pipeline.stages.stage import Context, Rows
    from pipeline.training.trainer import arguments, build

    spec = STAGES["sft"].section(data=DataSpec(path="x"), train={"use_liger_kernel": True})
    model = ModelSpec(base=folder, lora=LORA, dtype="float32")
    context = Context(model, Rows([]), {}, Artifact(Path(folder).parent / "sft"), 17, "", lambda: None)
    args, tokenizer = arguments(SFTConfig, spec, context), load_tokenizer(model)
    assert not args.use_liger_kernel
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}])
    policy = adapters.fresh(load_base(model, tokenizer), LORA)
    return build(SFTTrainer, policy, args=args, train_dataset=rows, processing_class=tokenizer).model


def values(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[str]]:
    """A loss, its gradients, and the names of the operations on the way back."""
    model.zero_grad()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(2)).to(model.device)
    with computing(model):
        out = model(input_ids=ids) if hasattr(model.get_base_model(), "score") else model(input_ids=ids, labels=ids)
    loss = out.logits.square().sum() if getattr(out, "loss", None) is None else out.loss
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    loss.backward()
    trained = adapters.trainable(model)
    return loss.detach(), {name: weight.grad.clone() for name, weight in trained.items()}, {n.name() for n in seen}


def compare(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family, base in bases(folder).items():
        torch.manual_seed(3)
        model = adapters.fresh(base, LORA, head=family == "reward").train()
        for weight in adapters.trainable(model).values():
            weight.data.normal_(std=0.2)
        for name, weight in model.named_parameters():  # as they are made, no norm scales anything
            if "norm" in name:
                weight.data.add_(torch.randn_like(weight) * 0.2)
        if family in ("qwen3", "reward"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, gradients, plain = values(model)
        liger.apply(base, "sft")
        by_liger, theirs, names = values(model)
        found[family] = {
            "loss": abs(float(loss - by_liger)) / abs(float(loss)),
            "gradient": max(float((theirs[n] - g).norm() / g.norm()) for n, g in gradients.items() if g.norm() > 0),
            "new": sorted(names - plain),
        }
    refused = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1))
    try:
        liger.apply(refused, "sft")
    except UserError as error:
        found["refused"] = str(error)
    found["trainer"] = sorted(part for part in ("LigerRMSNorm", "LigerSwiGLUMLP") if part in str(trained(folder)))
    later = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    found["later"] = sorted({type(module).__module__.split(".")[0] for module in later.modules()})
    return found


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")),
    reason="Liger is an optional extra: pip install 'onebase[liger]'",
)
def test_losses_and_gradients_are_those_of_the_bases_own_layers(tiny_base: Path) -> None:
    mode = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tiny_base)],
        env={**os.environ, **mode},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("refused") == ("stages.sft.train.use_liger_kernel: Liger has no RMSNorm for 'gpt2'; leave it out")
    assert found.pop("trainer") == ["LigerRMSNorm", "LigerSwiGLUMLP"]
    assert found.pop("later") == ["torch", "transformers"]  # models made later are as transformers has them
    for family, one in found.items():
        assert one["loss"] < 1e-4 and one["gradient"] < 1e-4, (family, one)
        # Gemma's layers are GELU's, and experts stay as they are
        assert one["new"] == ([NORM] if family in ("gemma2", "qwen3_moe") else [NORM, GATE]), family


def test_it_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "stages.sft.train.use_liger_kernel"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{key}: it is for GPUs, and there is no GPU here"):
        liger.check("llama", "sft")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{key}: Liger is not installed. .*onebase\[liger\]"):
        liger.check("llama", "sft")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        interpret_floats()
    print(json.dumps(compare(sys.argv[1])))
