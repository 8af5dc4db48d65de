"""A linear layer and its LoRA adapter as one operation: y = x W^T + s (x A^T) B^T (arXiv 2106.09685, eq. 3).

PEFT composes it of separate ones, each of which passes over whole activations, and autocast keeps a rounded copy of
every adapter. Here the second product is added within the first one's result, the input is kept once, in the compute
dtype, and A and B stay in float32 and are rounded where they are used. A 4-bit W is unpacked once on the way forward
and once on the way back.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

Tensor = torch.Tensor


def fuse(model: torch.nn.Module) -> None:
    """Give every adapted linear layer of a PEFT model the one operation. It is taken where one plain LoRA adapter is
    active. DoRA, dropout that drops, a bias of the adapter's and several active adapters go PEFT's own way."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), torch.nn.Linear):
            module.forward = MethodType(_forward, module)


def _forward(layer: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    active = layer.active_adapters
    name = active[0] if len(active) == 1 else ""
    alone = name in layer.lora_A and not (layer.disable_adapters or layer.merged or arguments or options)
    if not alone or name in layer.lora_variant or layer.lora_bias[name] or _drops_out(layer.lora_dropout[name]):
        whole: Tensor = type(layer).forward(layer, x, *arguments, **options)
        return whole
    function: Any = LinearWithLora
    out: Tensor = function.apply(x, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], layer)
    return out


def _drops_out(dropout: torch.nn.Module) -> bool:
    return dropout.training and float(getattr(dropout, "p", 0.0)) > 0


class LinearWithLora(torch.autograd.Function):
    """x (..., in) to (..., out) in autocast's dtype, or x's own; gradients for x, A (r, in) and B (out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float, layer: Any) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtype, ctx.scaling, ctx.base = x.dtype, scaling, layer.get_base_layer()
        x = x.to(dtype)
        low_NR = x.flatten(0, -2) @ a_RI.to(dtype).T
        out: Tensor = ctx.base(x)
        out.view(-1, out.shape[-1]).addmm_(low_NR, b_OR.to(dtype).T, alpha=scaling)
        ctx.save_for_backward(x, low_NR, a_RI, b_OR)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, low_NR, a_RI, b_OR = ctx.saved_tensors
        slope_NO = slope.flatten(0, -2)
        low_slope_NR = slope_NO @ b_OR.to(x.dtype)
        slope_x = slope_a = slope_b = None
        if ctx.needs_input_grad[1]:
            slope_a = (low_slope_NR.T @ x.flatten(0, -2)).to(a_RI.dtype).mul_(ctx.scaling)
            slope_b = (slope_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            slope_NI = slope_NO @ dequantize_module_weight(ctx.base).to(x.dtype)
            slope_NI.addmm_(low_slope_NR, a_RI.to(x.dtype), alpha=ctx.scaling)
            slope_x = slope_NI.view(x.shape).to(ctx.dtype)
        return slope_x, slope_a, slope_b, None, None
