"""The 4-bit base stays trainable through, its adapter stays in float32, and both are what they were handed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import BrokenInvariant
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.spec import ModelSpec

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def policy(base: Path, **model):  # type: ignore[no-untyped-def]
    spec = ModelSpec(base=str(base), lora=LORA, **{"dtype": "bfloat16", **model})
    tokenizer = bases.load_tokenizer(spec)
    torch.manual_seed(0)
    return adapters.fresh(bases.load_base(spec, tokenizer), spec.lora), tokenizer, spec


def gradients(model) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    ids_BT = torch.arange(3, 35).view(2, 16)
    model.train()
    model.zero_grad()
    with bases.computing(model):
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    return {name: weight.grad.clone() for name, weight in adapters.trainable(model).items()}


def test_the_base_is_true_nf4_with_double_quantisation(tiny_base: Path) -> None:
    import bitsandbytes as bnb

    model, _, _ = policy(tiny_base)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert all(layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)


def test_gradients_survive_an_evaluation(tiny_base: Path) -> None:
    """bitsandbytes 0.50 on AVX512-BF16 loses them all after one eval-mode forward unless it is kept from repacking."""
    model, tokenizer, _ = policy(tiny_base)
    before = gradients(model)
    model.eval()
    with torch.no_grad(), bases.computing(model):
        model(input_ids=torch.arange(3, 19).view(1, 16))
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    after = gradients(model)
    assert any(gradient.abs().sum() > 0 for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_frozen_adapter_takes_no_more_than_the_base_computes_in(tiny_base: Path) -> None:
    """PEFT gives the reference that TRL adds four bytes a parameter, of which autocast would use two."""
    model, _, _ = policy(tiny_base)
    model.add_adapter("ref", model.peft_config["default"])
    for name, weight in model.named_parameters():
        if ".ref." in name:
            weight.requires_grad_(False)
    adapters.round_frozen(model)
    held = {key: {w.dtype for name, w in model.named_parameters() if f".{key}." in name} for key in ("ref", "default")}
    assert held == {"ref": {torch.bfloat16}, "default": {torch.float32}}


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_an_update_of_1e_6_moves_the_weights(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Through TRL's own trainers, which round a 4-bit model's adapter to bfloat16: there most of it would be lost."""
    from conftest import tiny_tree
    from safetensors.torch import load_file

    from pipeline.recipe.recipe import build
    from pipeline.runs.stage import run_stage

    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {"first": {**tree["stages"]["sft"], "kind": "sft"}, kind: tree["stages"][kind]}
    tree["stages"]["first"].pop("from")
    tree["stages"]["first"].pop("questions")
    tree["stages"][kind] = {**tree["stages"][kind], "from": "first"}
    tree["stages"][kind].pop("questions", None)
    constant = {"learning_rate": 1e-6, "max_steps": 4, "lr_scheduler_type": "constant", "save_steps": 50}
    tree["stages"][kind]["train"] = {**constant, **({"beta": 0.1} if kind == "dpo" else {})}
    recipe = build(tree)
    for stage in recipe.order():
        run_stage(recipe, stage, tmp_path)
    before = load_file(tmp_path / "tiny" / "first" / "adapter" / adapters.WEIGHTS)
    after = load_file(tmp_path / "tiny" / kind / "adapter" / adapters.WEIGHTS)
    names = [name for name in before if name in after]
    assert names and all(after[name].dtype is torch.float32 for name in names)
    moved = torch.cat([(after[name] != before[name]).flatten() for name in names]).float().mean().item()
    displacement = torch.cat([(after[name] - before[name]).abs().flatten() for name in names]).mean().item()
    assert moved > 0.9
    # AdamW's first steps are each about the learning rate, whatever the gradient.
    assert 1e-6 < displacement < 5e-6


def test_plain_lora_on_a_base_that_is_not_quantised(tiny_base: Path) -> None:
    model, _, _ = policy(tiny_base, quantize="none")
    assert not any(hasattr(weight, "quant_state") for weight in model.parameters())
    assert all(weight.dtype is torch.float32 for weight in adapters.trainable(model).values())
    assert any(gradient.abs().sum() > 0 for gradient in gradients(model).values())


def test_saved_and_carried_is_the_same_and_a_stranger_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer, spec = policy(tiny_base)
    with torch.no_grad():
        for weight in adapters.trainable(model).values():
            weight.add_(torch.randn_like(weight) * 0.01)
    adapters.save(model, tmp_path / "adapter")
    again = adapters.carried(bases.load_base(spec, tokenizer), tmp_path / "adapter")
    ids_BT = torch.arange(3, 19).view(1, 16)
    with torch.no_grad(), bases.computing(model):
        assert torch.equal(model.eval()(input_ids=ids_BT).logits, again.eval()(input_ids=ids_BT).logits)
    with torch.no_grad():
        next(iter(adapters.trainable(again).values())).add_(1e-7)
    with pytest.raises(BrokenInvariant, match="1 that differ"):
        adapters.prove_same(again, tmp_path / "adapter")


def test_the_trunk_keeps_its_digest_under_a_score_head(tiny_base: Path) -> None:
    model, tokenizer, spec = policy(tiny_base)
    digest = bases.frozen_digest(model)
    assert bases.frozen_digest(bases.load_base(spec, tokenizer)) == digest
    assert bases.frozen_digest(bases.load_base(spec, tokenizer, num_labels=1)) == digest
    quantised = next(weight for name, weight in model.named_parameters() if "base_layer" in name)
    quantised.data[0] ^= 1
    assert bases.frozen_digest(model) != digest


@pytest.mark.parametrize("option", [{"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj"]}])
def test_options_of_peft_pass_through(tiny_base: Path, option: dict) -> None:
    spec = ModelSpec(base=str(tiny_base), dtype="bfloat16", lora={**LORA, **option})
    tokenizer = bases.load_tokenizer(spec)
    model = adapters.fresh(bases.load_base(spec, tokenizer), spec.lora)
    key, value = next(iter(option.items()))
    found = getattr(model.peft_config["default"], key)
    assert found == (set(value) if isinstance(value, list) else value)
    assert any(gradient.abs().sum() > 0 for gradient in gradients(model).values())
