"""The keys and values of what is being sampled: growing by each token, or at their full size from the start."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

STEP = 64
"""A static cache is a multiple of so many tokens long. Each length is compiled by itself."""


def make_cache(config: Any, length: int, static: bool) -> Cache:
    """For rows of up to `length` tokens. `static`: of full size, so that a step is the same program for every token and
    can be compiled."""
    if not static:
        return DynamicCache(config=config)
    return StaticCache(config=config, max_cache_len=-(-length // STEP) * STEP)


def take_rows(cache: Cache, rows_B: torch.Tensor) -> None:
    """Keep these rows of a cache, some of them several times. By the one way that its convolution and recurrent layers
    have too (transformers 5.23), not only those that attend."""
    cache.reorder_cache(rows_B)  # type: ignore[arg-type]
    for layer in cache.layers if isinstance(cache, StaticCache) else []:
        if isinstance(layer, StaticLayer):  # without this mark, CUDA graphs refuse what is written in place
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)
