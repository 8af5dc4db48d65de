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
    alone = alone and not torch.compiler.is_compiling()
    if not alone or name in layer.lora_variant or layer.lora_bias[name] or _drops_out(layer.lora_dropout[name]):
        whole: Tensor = type(layer).forward(layer, x, *arguments, **options)
        return whole
    kept: Any = Kept
    product: Any = LinearWithLora
    a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
    x, low_NR = kept.apply(x, a_RI, b_OR)
    out: Tensor = product.apply(x, low_NR, a_RI, b_OR, layer.scaling[name], layer.get_base_layer())
    return out


def _drops_out(dropout: torch.nn.Module) -> bool:
    return dropout.training and float(getattr(dropout, "p", 0.0)) > 0


class Kept(torch.autograd.Function):
    """x (..., in) in the dtype it is multiplied in, and x A^T (N, r), both kept for the way back.

    They are kept before W's product is made and not with it: activation checkpointing repeats a forward pass up to the
    last tensor that was kept, and so spares the last product of every decoder layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtype = x.dtype
        x = x.to(dtype)
        low_NR = x.flatten(0, -2) @ a_RI.to(dtype).T
        ctx.save_for_backward(x, low_NR, a_RI, b_OR)
        ctx.mark_non_differentiable(low_NR)
        return x.view_as(x), low_NR

    @staticmethod
    def backward(ctx: Any, slope_x: Tensor, _: Tensor) -> tuple[Tensor | None, None, None]:
        return slope_x if slope_x is None else slope_x.to(ctx.dtype), None, None


class LinearWithLora(torch.autograd.Function):
    """What is kept of x to (..., out); gradients for x, A (r, in) and B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low_NR: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float, base: torch.nn.Linear
    ) -> Tensor:
        ctx.kept, ctx.scaling, ctx.base = x.grad_fn, scaling, base
        out: Tensor = base(x)
        out.view(-1, out.shape[-1]).addmm_(low_NR, b_OR.to(x.dtype).T, alpha=scaling)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        x, low_NR, a_RI, b_OR = ctx.kept.saved_tensors
        slope_NO = slope.flatten(0, -2)
        low_slope_NR = slope_NO @ b_OR.to(x.dtype)
        slope_x = slope_a = slope_b = None
        if ctx.needs_input_grad[2]:
            slope_a = (low_slope_NR.T @ x.flatten(0, -2)).to(a_RI.dtype).mul_(ctx.scaling)
            slope_b = (slope_NO.T @ low_NR).to(b_OR.dtype).mul_(ctx.scaling)
        if ctx.kept.needs_input_grad[0]:
            slope_NI = slope_NO @ dequantize_module_weight(ctx.base).to(x.dtype)
            slope_NI.addmm_(low_slope_NR, a_RI.to(x.dtype), alpha=ctx.scaling)
            slope_x = slope_NI.view(x.shape)
        return slope_x, None, slope_a, slope_b, None, None
