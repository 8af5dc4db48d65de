"""A causal language model of true shapes without its weights: tensors that have shape and type but no data.

The 4-bit layers are stood in by one of the same storage (half a byte a weight and the doubly quantised constants) that
keeps the packed weight for its backward pass and dequantises it when it is used, as bitsandbytes does on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from pipeline.models import lora, packing, varlen


class MatMul4(torch.autograd.Function):
    """x W^T with W dequantised for the moment of use, in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed_weight: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape, ctx.packed_weight = shape, packed_weight
        return x @ torch.empty(shape, dtype=x.dtype, device=x.device).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device), None, None


class StandInLinear4bit(bnb.nn.Linear4bit):
    """nf4 with double quantisation: blocks of 64 weights, their scales in one byte, blocks of 256 scales."""

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype = dtype
        count = layer.in_features * layer.out_features
        weight = torch.empty(count // 2, 1, dtype=torch.uint8, device=layer.weight.device)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"  # type: ignore[attr-defined]
        self.bias = layer.bias
        self.register_buffer("scales", torch.empty(count // 64, dtype=torch.uint8, device=weight.device))
        self.register_buffer("scales_of_scales", torch.empty(-(-count // 64 // 256), device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The kernel adds the bias itself, without a second result.
        return MatMul4.apply(x.to(self.compute_dtype), self.weight, (self.out_features, self.in_features))  # type: ignore[no-any-return]

    def unpacked(self) -> torch.Tensor:
        return torch.empty((self.out_features, self.in_features), dtype=self.compute_dtype, device=self.weight.device)


def fake_base(config: Any, reward: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The frozen base under FakeTensorMode: linear layers in 4 bits, all else in `dtype`."""
    made = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.device("meta"):
        model = made.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name not in ("lm_head", "score"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], StandInLinear4bit(module, dtype))
    made_once: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made_once:
                    held = parameter.dtype if parameter.dtype is torch.uint8 else dtype
                    real = torch.nn.Parameter(torch.empty(parameter.shape, dtype=held), requires_grad=False)
                    vars(real).update({k: v for k, v in vars(parameter).items() if not k.startswith("_")})
                    made_once[id(parameter)] = real
                module._parameters[name] = made_once[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.is_loaded_in_4bit = True
    if config._attn_implementation == packing.NAME:
        packing.pack_inside(model)
    return model


def _worst_pack(ids_BT: torch.Tensor, mask_BT: Any, positions_BT: Any, share: bool) -> packing.Pack:
    """A batch packed where no row is shorter than the longest and none begins as another does. Which do is not known of
    a fake tensor."""
    count, width = ids_BT.shape
    if mask_BT is None and positions_BT is not None:  # rows that a collator has packed: to memory one is as several
        count, width = 1, ids_BT.numel()
    segments = [varlen.Segment(row * width, (row + 1) * width) for row in range(count)]
    flat = ids_BT.reshape(1, -1).clone()
    return packing.Pack(flat, torch.zeros_like(flat), segments, torch.zeros_like(ids_BT), ids_BT.numel())


def _kernel(attend: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's varlen kernel with what its backward pass works in (mha_varlen_bwd in flash_api.cpp): the queries'
    gradient in float32 and, for grouped heads, the keys' and values' gradients for each query head."""
    result: torch.Tensor = attend(query, key, *args, **kwargs)
    room: list[torch.Tensor] = []
    # A hook that held the tensors themselves would keep what checkpointing lets go.
    (count, heads, width), (keys, kv_heads, _), rows, dtype = query.shape, key.shape, len(args[1]) - 1, query.dtype

    def begin(gradient: torch.Tensor) -> None:
        room.append(torch.empty((count + 128 * rows, heads, width), dtype=torch.float32))
        if heads != kv_heads:
            room.extend(torch.empty((keys, heads, width), dtype=dtype) for _ in ("keys", "values"))

    if result.requires_grad:
        result.register_hook(begin)
        query.register_hook(lambda gradient: room.clear())
    return result


def _attention(attend: Any, *args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    """On CUDA every layer turns a boolean mask into numbers of its own, which its backward pass keeps."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=args[0].dtype)
    result: torch.Tensor = attend(*args, attn_mask=attn_mask, **kwargs)
    return result


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """On CUDA what was dropped is kept as one byte for each element, on a CPU in the element's type."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Fake tensors, and TRL's own fused LM head as its CUDA kernels are: they work inside the tile they are given."""
    kept = {name: getattr(chunked_logprob, name) for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")}
    moved, attend = torch.nn.Module.to, torch.nn.functional.scaled_dot_product_attention
    dropout, torch.nn.functional.dropout = torch.nn.functional.dropout, _dropout
    # Which positions have labels is not known of a fake tensor: all go through the head.
    compacts, trl_utils._use_triton = trl_utils._use_triton, lambda device: False
    heads, trl_utils._ChunkedLogProbFunction = trl_utils._ChunkedLogProbFunction, chunked_logprob.ChunkedLogProbFunction
    unpack, lora.dequantize_module_weight = lora.dequantize_module_weight, StandInLinear4bit.unpacked
    for name in kept:
        setattr(chunked_logprob, name, lambda *args, **kwargs: None)
    torch.nn.functional.scaled_dot_product_attention = partial(_attention, attend)
    packed = packing.pack_rows, varlen.DEVICE, varlen.varlen_attn
    packing.pack_rows, varlen.DEVICE = _worst_pack, "cpu"  # where the fake tensors are
    varlen.varlen_attn = partial(_kernel, varlen.varlen_attn)
    # Fake parameters cannot be moved, and are where they should be.
    torch.nn.Module.to = lambda module, *args, **kwargs: module  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.nn.Module.to = moved  # type: ignore[method-assign]
        torch.nn.functional.scaled_dot_product_attention = attend
        torch.nn.functional.dropout = dropout
        trl_utils._use_triton, trl_utils._ChunkedLogProbFunction = compacts, heads
        lora.dequantize_module_weight = unpack
        packing.pack_rows, varlen.DEVICE, varlen.varlen_attn = packed
        for name, function in kept.items():
            setattr(chunked_logprob, name, function)
