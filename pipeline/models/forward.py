"""The forward pass of a causal language model in its parts, and its layers without quantisation for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

if TYPE_CHECKING:
    from peft import PeftModel

Tensor = torch.Tensor


class LanguageModel:
    """Trunk and LM head called apart, so that logits are made only where they are wanted."""

    def __init__(self, model: PeftModel, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        base: Any = model.get_base_model()
        self.config = base.config.get_text_config()
        self.device = base.get_input_embeddings().weight.device
        self.backbone, self.lm_head = getattr(base, base.base_model_prefix), base.get_output_embeddings()

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor | None = None, cache: Any = None) -> Tensor:
        """Last hidden states (B, T, hidden) under the active adapter."""
        out = self.backbone(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden_BTH: Tensor = out.last_hidden_state
        return hidden_BTH

    @cached_property
    def step(self) -> Callable[..., Tensor]:
        """`hidden` for one more token of each row, with a static cache: on a GPU one CUDA graph in place of some
        dozens of kernels a layer, each launched from Python."""
        return torch.compile(self.hidden, mode="reduce-overhead") if self.device.type == "cuda" else self.hidden

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """The LM head, with the scaling and capping some architectures put after it."""
        logits_NV: Tensor = self.lm_head(hidden_NH)
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits_NV = logits_NV * scale
        if scale := getattr(self.config, "logits_scaling", None):  # Granite
            logits_NV = logits_NV / scale
        if cap := getattr(self.config, "final_logit_softcapping", None):  # Gemma
            logits_NV = torch.tanh(logits_NV / cap) * cap
        return logits_NV


def score_states(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The states (B, hidden) that a reward model's head reads, in float32: each sequence's at its last token, which is
    told by the mask and never by the token's id, for the last token may be the pad token itself."""
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (mask_BT * places_T).argmax(1)
    return hidden_BTH[torch.arange(len(mask_BT), device=mask_BT.device), last_B].float()


def score_by_length(model: Any) -> None:
    """Make a sequence classifier read its score as `score_states` says, its head in float32 also under autocast.

    transformers reads it at the last token that is not the pad token: of a sequence that ends in it, a token too early.
    In bfloat16 a score of 3 is known to 0.02 only, and close pairs tie.
    """
    model.score.float()
    model.forward = MethodType(_scored, model)


def _scored(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, labels: None = None, **options: Any
) -> SequenceClassifierOutputWithPast:
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    hidden_BTH = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
    with torch.autocast(hidden_BTH.device.type, enabled=False):
        scores_B1 = model.score(score_states(hidden_BTH, mask_BT))
    return SequenceClassifierOutputWithPast(logits=scores_B1)


def checkpoint_first(model: torch.nn.Module, count: int) -> None:
    """Leave activation checkpointing on in the first `count` decoder layers alone. The last ones are those whose
    backward pass comes first, when most is held; kept whole, they need no second forward pass beside it."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count


@contextlib.contextmanager
def plain_layers(model: PeftModel, fold_adapter: bool) -> Iterator[None]:
    """Inside, the 4-bit layers under an adapter are plain matrices in the compute dtype, for 2 bytes a parameter.

    fold_adapter: False keeps the adapter beside them and every output bit for bit; True adds the active adapter in,
    which spares each token its two small products and rounds their sum. For sampling only. The copy is thrown away
    afterwards; the 4-bit weights and the adapter are not touched (a merge into 4-bit weights would lose the adapter in
    rounding). Layers with DoRA, which are more than a sum, are never folded.
    """
    compute = model.get_input_embeddings().weight.dtype
    swapped: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    adapted: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, module in adapted:
        layer = module.get_base_layer()
        if not isinstance(layer, torch.nn.Linear):
            continue
        active = [] if module.disable_adapters else module.active_adapters
        folded = fold_adapter and not any(module.use_dora.get(adapter) for adapter in active)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        with torch.no_grad():
            weight = dequantize_module_weight(layer)
            for adapter in active if folded else []:
                weight = weight.to(torch.float32) + module.get_delta_weight(adapter).to(weight.device, torch.float32)
        plain.weight = torch.nn.Parameter(weight.to(compute), requires_grad=False)
        plain.bias = layer.bias
        parent, _, own = name.rpartition(".")
        holder, place = (model.get_submodule(parent), own) if folded else (module, "base_layer")
        swapped.append((holder, place, module if folded else layer))
        setattr(holder, place, plain)
    try:
        yield
    finally:
        for holder, place, replaced in swapped:
            setattr(holder, place, replaced)


def plain_on_cpu(model: PeftModel, fold_adapter: bool = False) -> contextlib.AbstractContextManager[None]:
    """`plain_layers` on a CPU, which would take as long to dequantise a layer as to multiply by it for some tens of
    tokens; where the memory for it is free. On a GPU nothing changes."""
    import psutil

    if model.device.type != "cpu":
        return contextlib.nullcontext()
    linear = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    sizes = [layer.in_features * layer.out_features for layer in linear if isinstance(layer, torch.nn.Linear)]
    needed = sum(sizes) * model.get_input_embeddings().weight.element_size()
    if psutil.virtual_memory().available < 2 * needed:
        return contextlib.nullcontext()
    return plain_layers(model, fold_adapter)
