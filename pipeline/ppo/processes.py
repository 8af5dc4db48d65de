"""Sums over the processes of a run, and work shared among them; of one process, each is the value itself."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
AT_ONCE = 1 << 24
"""Numbers that are summed in one go, for which memory is taken beside the tensors themselves."""


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if _grouped() else 0


def count() -> int:
    return torch.distributed.get_world_size() if _grouped() else 1


def reduce_(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes; many small ones go together."""
    if not _grouped():
        return
    together: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        together.append(tensor)
        if index + 1 < len(tensors) and sum(map(torch.numel, together)) < AT_ONCE:
            continue
        flat = torch.cat([one.flatten() for one in together])
        torch.distributed.all_reduce(flat)
        for one, total in zip(together, flat.split([one.numel() for one in together]), strict=True):
            one.copy_(total.view_as(one))
        together = []


def summed(value: Any) -> Tensor:
    """The sum of a CPU float64 tensor over all processes."""
    tensor: Tensor = torch.as_tensor(value, dtype=torch.float64)
    if not _grouped():
        return tensor
    if torch.distributed.get_backend() == "nccl":
        moved = tensor.cuda()
        torch.distributed.all_reduce(moved)
        return moved.cpu()
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor)
    return tensor


def share(items: list[Any]) -> list[Any]:
    """Every so-manieth item, for this process to work on."""
    return items[rank() :: count()]


def gathered(values: Any) -> list[Any]:
    """What every process has found, in the order of their ranks."""
    if not _grouped():
        return [values]
    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, values)
    return found
