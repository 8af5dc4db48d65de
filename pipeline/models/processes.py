"""Values of all processes of a run together. With one process, each is that process's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

Item = TypeVar("Item")


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that this process works on."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def range_of(count: int) -> range:
    """The places, of so many, that this process works on: those of all processes follow each other."""
    state = PartialState()
    return range(*(rank * count // state.num_processes for rank in (state.process_index, state.process_index + 1)))


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    return list(gather_object([value]))


def add_up(value: Any) -> torch.Tensor:
    """The sum over all processes of a number or CPU tensor, in float64 and on the CPU."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    state = PartialState()
    return tensor if state.num_processes == 1 else reduce(tensor.to(state.device), "sum").cpu()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All get the same answer, so all stop at the same step."""
    return bool(add_up(float(flag)) > 0)
