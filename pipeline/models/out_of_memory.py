"""When memory runs out, the work is done in smaller parts: the loop that halves them, and its messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from pipeline.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
WhenSplit = Callable[[int, int], None]
"""Called with the rows that did not fit at once and with those that are tried next."""

# What to do about a row that does not fit alone; `does_not_fit` begins the message. {half}: half of its tokens.
HELD_OUT = ", without gradients. Leave rows over {half} tokens out of data.test and questions, lower max_length"
LENGTH = "response_length (in grpo and rejection_sampling: max_completion_length)"
ROLLOUT = (
    f", without gradients. Lower {LENGTH}, set dequantize_rollout: false, leave out prompts "
    "with answers of over {half} tokens"
)
EPISODE = f". Lower {LENGTH}, or max_length to " + "{half}"
ROW = ". Lower max_length to {half}"
CHECKPOINT = ", or set activation_checkpointing: true"


def does_not_fit(tokens: int, advice: str) -> str:
    """The message for a row that does not fit even alone; `advice` is one of the texts above."""
    return (
        f"one row of {tokens} tokens does not fit in memory even alone{advice.format(half=max(1, tokens // 2))}, or "
        "take a smaller model; `onebase plan` shows what each part needs."
    )


def say_split(rows: int, left: int, where: str = "", later: str = "") -> None:
    """Print that fewer rows are tried at once."""
    print(f"  {where}out of memory with {rows} rows at once; going on with {left}{later}", flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU, in cuBLAS or in the CPU's allocator."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in said for words in ("out of memory", "alloc_failed", "can't allocate memory"))
    )


def halve(run: Callable[[int], Result], size: int, message: Callable[[], str], when_split: WhenSplit) -> Result:
    """`run(size)`, and again with half the size as often as it runs out of memory.

    Raises UserError with `message()` if memory does not hold even size 1.
    """
    while True:
        try:
            return run(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise UserError(message()) from error
        clear_device_cache(garbage_collection=True)  # only now, as the error's traceback held what the pass had made
        when_split(size, size // 2)
        size //= 2


def run_in_parts(
    run: Callable[[Sequence[Item]], Result],
    items: Sequence[Item],
    tokens: Callable[[Item], int],
    advice: str = HELD_OUT,
    batch_size: int | None = None,
    when_split: WhenSplit = say_split,
) -> list[Result]:
    """What `run` gives for consecutive parts of `items`, each of at most `batch_size` and of as many as memory holds.
    What is done when memory runs out stays done.

    `tokens`: how long an item is. Raises UserError if one item does not fit even alone.
    """
    results: list[Result] = []
    start = 0

    def go_on(size: int) -> list[Result]:
        nonlocal start
        while start < len(items):
            results.append(run(items[start : start + size]))
            start += size
        return results

    size = min(batch_size or len(items), len(items))
    return halve(go_on, size, lambda: does_not_fit(tokens(items[start]), advice), when_split)


@contextlib.contextmanager
def gradients_aside(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Gradients added inside are added to those from before; if it fails inside, none of them are."""
    before = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    try:
        yield
    except BaseException:
        for weight in weights:
            weight.grad = None
        raise
    finally:
        for weight, gradient in zip(weights, before, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def try_twice(step: Callable[[], object]) -> None:
    """An optimizer's step, and once more where memory ran out, after what lies unused has been given back. A fused step
    changes weights and state in place, so what it can lack memory for comes before the first change."""
    try:
        step()
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    clear_device_cache(garbage_collection=True)
    step()
