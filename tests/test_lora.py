"""A layer and its adapter in one operation give what PEFT's separate ones give, and less is held for the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch._dynamo.testing import CompileCounter
from trl import SFTConfig, SFTTrainer

from pipeline.data.load import DataSpec
from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models import adapters
from pipeline.models.base import computing, load_base, load_tokenizer
from pipeline.models.forward import plain_layers
from pipeline.models.spec import ModelSpec
from pipeline.stages import STAGES
from pipeline.stages.stage import Context, Rows
from pipeline.training.trainer import arguments, build, compile_layers

IDS = torch.randint(10, 200, (3, 20), generator=torch.Generator().manual_seed(2))


def adapted(base: Path, **options: Any) -> Any:
    """A small model under an adapter with two matrices that both count."""
    lora = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options.pop("lora", {})}
    spec = ModelSpec(base=str(base), lora=lora, **{"dtype": "bfloat16", **options})
    model = adapters.fresh(load_base(spec, load_tokenizer(spec)), spec.lora)
    torch.manual_seed(3)
    for weight in adapters.trainable(model).values():
        weight.data.normal_(std=0.2)
    return model.train()


def as_peft_does(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            vars(module).pop("forward", None)


def is_fused(model: Any) -> bool:
    """Whether the model's backward pass goes through the one operation."""
    seen, left = set(), [loss(model).grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return any("LinearWithLora" in node.name() for node in seen)


def loss(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    torch.manual_seed(4)
    with computing(model):
        return model(input_ids=ids, labels=ids).loss


def values(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = loss(model, ids)
    found.backward()
    return found.detach(), {name: weight.grad.clone() for name, weight in adapters.trainable(model).items()}


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_loss_and_gradients_are_those_of_separate_operations(tiny_base: Path, quantize: str) -> None:
    model = adapted(tiny_base, quantize=quantize, dtype="float32")
    assert is_fused(model)
    our_loss, ours = values(model)
    with plain_layers(model, fold_adapter=False):
        _, unpacked_before = values(model)
    as_peft_does(model)
    assert not is_fused(model)
    their_loss, theirs = values(model)
    assert torch.allclose(our_loss, their_loss, atol=1e-5)
    for name, gradient in theirs.items():
        assert gradient.dtype is ours[name].dtype is torch.float32
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-5), name
        assert torch.equal(ours[name], unpacked_before[name]), name


def test_in_bfloat16_gradients_are_as_near_to_float32_as_those_of_separate_operations(tiny_base: Path) -> None:
    exact = values(adapted(tiny_base, quantize="none", dtype="float32"))[1]
    model = adapted(tiny_base, quantize="none", dtype="bfloat16")
    ours = values(model)[1]
    as_peft_does(model)
    theirs = values(model)[1]

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[name] - exact[name]).square().sum()) for name in exact)

    assert error(ours) <= 1.1 * error(theirs)


def test_less_is_held_for_the_way_back(tiny_base: Path) -> None:
    """Counted are the bytes of what autograd keeps beside the model's own weights, each storage once."""

    def held(model: Any) -> int:
        kept: dict[int, int] = {}
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # itself it would hold the graph that holds it, and with it the model for ever

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = loss(model)  # keeps the graph, so that no storage is used twice
        assert found.requires_grad
        return sum(kept.values())

    model = adapted(tiny_base, dtype="bfloat16")
    ours = held(model)
    as_peft_does(model)
    assert ours < held(model)


def test_a_checkpointed_layer_repeats_no_product_that_nothing_was_kept_of(tiny_base: Path) -> None:
    """The way back repeats a decoder layer up to the input of its last product, and its gradients stay the same."""
    model = adapted(tiny_base, dtype="float32")
    _, plain = values(model)
    counts = {"down_proj": 0, "up_proj": 0}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (kind := name.rpartition(".")[2]) in counts:

            def count(*_: Any, kind: str = kind) -> None:
                counts[kind] += 1

            module.get_base_layer().register_forward_hook(count)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, checkpointed = values(model)
    layers = model.config.num_hidden_layers
    assert counts == {"up_proj": 2 * layers, "down_proj": layers}
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


def test_layers_are_compiled_once_for_batches_of_all_shapes_and_compute_the_same(tiny_base: Path) -> None:
    model = adapted(tiny_base, dtype="float32", attn_implementation="eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [IDS, IDS[:2, :13], IDS[1:, 3:], IDS.T.contiguous()]
    plain = [values(model, ids) for ids in batches]
    counter: Any = CompileCounter()
    compile_layers(model, {"torch_compile": True, "torch_compile_backend": counter})
    for ids, (expected, gradients) in zip(batches, plain, strict=True):
        found, compiled = values(model, ids)
        assert torch.allclose(found, expected, atol=1e-5)
        for name, gradient in gradients.items():
            assert torch.allclose(compiled[name], gradient, rtol=1e-4, atol=1e-5), name
    assert counter.frame_count == 1
    torch._dynamo.reset()  # what it has compiled holds the model


def test_compiling_is_for_gpus(tiny_base: Path, tmp_path: Path) -> None:
    said = {"torch_compile": True, "torch_compile_mode": "default"}
    spec = STAGES["sft"].section(data=DataSpec(path="x"), train=said)
    model = ModelSpec(base=str(tiny_base), dtype="float32")
    context = Context(model, Rows([]), {}, Artifact(tmp_path / "sft"), 17, "", lambda: None)
    args = arguments(SFTConfig, spec, context)
    assert args.layers_compiled == said
    assert not args.torch_compile  # the model around the layers stays as it is
    with pytest.raises(UserError, match="train.torch_compile: it is for GPUs, and there is no GPU here"):
        build(SFTTrainer, adapted(tiny_base), args=args, train_dataset=Dataset.from_list([{"input_ids": [1]}]))


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_dropout": 0.3}, {"lora_bias": True}])
def test_what_is_more_than_a_plain_adapter_goes_pefts_way(tiny_base: Path, lora: dict[str, Any]) -> None:
    model = adapted(tiny_base, quantize="none", dtype="float32", lora=lora)
    assert not is_fused(model)
    ours = values(model)
    as_peft_does(model)
    theirs = values(model)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


def test_dropout_that_is_switched_off_takes_the_one_operation(tiny_base: Path) -> None:
    assert is_fused(adapted(tiny_base, lora={"lora_dropout": 0.3}).eval())
