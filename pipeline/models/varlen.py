"""Attention by segments on CUDA, all segments in one kernel: torch's own FlashAttention for rows of unlike length.

It has never run on a card. Where each segment's queries and keys lie, which is computed once on the way to it, is
checked against the loop over segments (tests/test_varlen.py), with the kernel stood in for by plain torch.

A segment that attends to a beginning before it has more keys than queries. The kernel takes its queries to be the last
of its keys (csrc/flash_attn/src/mask.h of FlashAttention 2.1 and later), which they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention.varlen import varlen_attn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Tensor = torch.Tensor
DEVICE = "cuda"
"""Where the kernel computes; scripts/plan_oracle.py and the tests, which have no card, name the CPU."""
WIDEST_HEAD, HEAD_STEP = 256, 8
"""The widths of a head that the kernel takes (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp)."""
OLDEST = (8, 0)
"""Compute capability: Ampere."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to before `stop` of the packed row; they attend to themselves and to `before` (start, stop), which
    is an earlier segment as a whole."""

    start: int
    stop: int
    before: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Bounds:
    """Where the segments of a packed row lie, as the kernel is told; made once for all layers."""

    queries_E: Tensor
    keys_E: Tensor
    """Where each segment's queries and keys end, in int32, with a 0 ahead."""
    most_queries: int
    most_keys: int
    places_K: Tensor | None
    """Where in the packed row the segments' keys are, segment after segment: the beginning, then its own. None where
    that is the row itself, as no two rows share a beginning."""


def bounds_of(segments: list[Segment], device: torch.device) -> Bounds:
    own = [segment.stop - segment.start for segment in segments]
    before = [segment.before[1] - segment.before[0] for segment in segments]
    keys = [first + length for first, length in zip(before, own, strict=True)]

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)

    places_K = None
    if any(before):
        places = [place for one in segments for part in (one.before, (one.start, one.stop)) for place in range(*part)]
        places_K = torch.tensor(places, device=device)
    return Bounds(ends(own), ends(keys), max(own), max(keys), places_K)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """Causal attention (1, heads, N, D) within each segment and to what comes before it: (1, N, heads, D).

    key, value: (1, heads, N, D) of as many heads as the model has of them; groups of query heads share one.
    """
    if torch.is_autocast_enabled(query.device.type):  # which knows torch's fused attention, and not this kernel
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    query_NHD, key_KHD, value_KHD = (states[0].transpose(0, 1) for states in (query, key, value))
    if bounds.places_K is not None:
        key_KHD, value_KHD = key_KHD[bounds.places_K], value_KHD[bounds.places_K]
    # The kernel's window says how many keys before its own a query reads, transformers' counts that one too.
    left = -1 if sliding_window is None or sliding_window >= bounds.most_keys else sliding_window - 1
    out: Tensor = varlen_attn(
        query_NHD,
        key_KHD,
        value_KHD,
        bounds.queries_E,
        bounds.keys_E,
        bounds.most_queries,
        bounds.most_keys,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # type: ignore[assignment]
    return out[None]


def why_not(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernel cannot compute a model's attention on this card; empty where it can."""
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    capability = torch.cuda.get_device_capability(device)
    if dtype is torch.float32:
        return "the kernel computes in 16 bits only, and model.dtype is float32 (bfloat16 works)"
    if getattr(config, "attn_logit_softcapping", None):
        return "the model caps its attention scores, and the kernel cannot"
    if getattr(config, "attention_dropout", 0.0):
        return "the model uses dropout in its attention, and the kernel cannot"
    if getattr(config, "v_head_dim", None):
        return "the model's keys and values have different widths"
    if not 0 < width <= WIDEST_HEAD or width % HEAD_STEP:
        return (
            f"the kernel needs heads whose width is a multiple of {HEAD_STEP} and at most {WIDEST_HEAD}, and the "
            f"model's have {width}"
        )
    if capability < OLDEST:
        needed, found = (".".join(map(str, version)) for version in (OLDEST, capability))
        return f"the kernel needs compute capability {needed}, and the card has {found}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    return ""
