"""Out of memory is no end: what did not fit at once is done in halves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU, in cuBLAS or in the CPU's allocator."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in said for words in ("out of memory", "alloc_failed", "can't allocate memory"))
    )


def freed() -> None:
    """Give back what a pass that failed has left. To be called once its error has been let go of, traceback and all."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_halves(run: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """`run` on all items, or on halves of them as often as it runs out of memory; its results in their order.

    Raises what `run` raised if it cannot do even one item.
    """
    try:
        return run(items)
    except RuntimeError as error:
        if not out_of_memory(error) or len(items) == 1:
            raise
    freed()
    middle = len(items) // 2
    print(f"  out of memory with {len(items)} sequences at once: going on with {middle}", flush=True)
    return in_halves(run, items[:middle]) + in_halves(run, items[middle:])
