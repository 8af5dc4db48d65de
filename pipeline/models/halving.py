"""Out of memory is no end: what did not fit at once is done in halves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from pipeline.errors import UserError

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


def in_halves(
    run: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], tokens: Callable[[Item], int] | None = None
) -> list[Result]:
    """`run` on all items, or on halves of them as often as it runs out of memory; its results in their order.

    Raises UserError if it cannot do even one item. `tokens` says how long an item is, for that message.
    """
    try:
        return run(items)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        if len(items) == 1:
            length = f"{tokens(items[0])} tokens" if tokens else "this length"
            half = f"over {tokens(items[0]) // 2} tokens" if tokens else "as long"
            raise UserError(
                f"one row of {length} does not fit in memory even alone, without gradients. Leave rows {half} out of "
                "data.test and questions, lower max_length, or take a smaller model; `onebase plan` shows what each "
                "part needs."
            ) from error
    freed()
    middle = len(items) // 2
    print(f"  out of memory with {len(items)} sequences at once: going on with {middle}", flush=True)
    return in_halves(run, items[:middle], tokens) + in_halves(run, items[middle:], tokens)
