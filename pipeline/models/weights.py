"""The weights of a model in memory as plain matrices: its base, or its base with the adapter added.

The base in memory is the frozen one of training (4 bits a weight); of the sums only one shard at a time exists. The
4-bit weights themselves are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.disk.atomic import write_json
from pipeline.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

Weight = tuple[tuple[int, ...], Callable[[], torch.Tensor]]
"""Its shape, and what computes it."""


def write_base(model: PeftModel, folder: Path, shard_bytes: int) -> None:
    """The base without any adapter, as an ordinary model folder in the dtype that it computes in: to an engine that
    knows nothing of 4 bits it is exactly what is trained on. Config and weights; no tokenizer.

    Peak memory: one shard.
    """
    whole: Any = model.get_base_model()
    dtype = whole.get_input_embeddings().weight.dtype
    with torch.no_grad():
        write_shards(dict(summed(model, adapter=None)), folder, dtype, shard_bytes)
    config = copy.deepcopy(whole.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = dtype, [type(whole).__name__]
    config.save_pretrained(folder)


def summed(model: PeftModel, adapter: str | None = "default") -> Iterator[tuple[str, Weight]]:
    """Every weight of the model by its name in the base, computed in float32 or as it is; with an adapter added, unless
    it is None.

    Tied tables come once. Raises UserError for an adapter that is more than a sum.
    """
    base: Any = model.get_base_model()
    unused = ".original_module." if adapter else ".modules_to_save."
    for name, weight in [*base.named_parameters(), *_buffers(base)]:
        if "lora_" in name or unused in name:
            continue
        owner_name, _, leaf = name.rpartition(".")
        if ".modules_to_save." in name or ".original_module." in name:
            yield name.replace(f".modules_to_save.{adapter}.", ".").replace(".original_module.", "."), _as_is(weight)
        elif owner_name.endswith(".base_layer"):
            layer = base.get_submodule(owner_name.removesuffix(".base_layer"))
            plain = name.replace(".base_layer.", ".")
            if not isinstance(layer, LoraLayer):
                raise UserError(f"{plain}: an adapter of type {type(layer).__name__} cannot be merged; --as adapter")
            shape = _shape(layer.get_base_layer(), weight)
            yield plain, (shape, partial(_sum, layer, adapter)) if leaf == "weight" else _as_is(weight)
        elif hasattr(weight, "quant_state"):
            layer = base.get_submodule(owner_name)
            yield name, (_shape(layer, weight), partial(dequantize_module_weight, layer))
        else:
            yield name, _as_is(weight)
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    output, table = base.get_output_embeddings(), base.get_input_embeddings()
    if adapter and tied and output is not None and any(isinstance(part, LoraLayer) for part in (output, table)):
        adapted = isinstance(output, LoraLayer)
        shape, unchanged = _as_is((output.get_base_layer() if adapted else output).weight)
        yield "lm_head.weight", (shape, partial(_sum, output, adapter) if adapted else unchanged)


def _sum(layer: Any, adapter: str | None) -> torch.Tensor:
    weight: torch.Tensor = dequantize_module_weight(layer.get_base_layer()).float()
    if adapter not in layer.scaling:
        return weight
    weight = weight + layer.get_delta_weight(adapter).to(weight.device, torch.float32)
    if layer.use_dora.get(adapter):  # arXiv 2402.09353, equation 5
        magnitude = layer.lora_magnitude_vector[adapter].weight.float()
        weight = weight * (magnitude / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
    return weight


def _as_is(weight: torch.Tensor) -> Weight:
    return tuple(weight.shape), lambda: weight


def _shape(layer: Any, weight: torch.Tensor) -> tuple[int, ...]:
    return (layer.out_features, layer.in_features) if hasattr(weight, "quant_state") else tuple(weight.shape)


def _buffers(base: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for owner, module in base.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{owner}.{name}".lstrip("."), buffer


def write_shards(weights: dict[str, Weight], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """safetensors shards of at most `shard_bytes` (or of one tensor), named and indexed as transformers does."""
    sizes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, _) in weights.items()}
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = weights[name][1]().to("cpu", dtype).contiguous()
            if not torch.isfinite(tensors[name]).all():
                raise UserError(f"{name} does not fit {dtype}: it has values that are not finite. Publish --as adapter")
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how its writer says that a disk is full
            raise UserError(f"{folder / file} cannot be written: {error}") from None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
