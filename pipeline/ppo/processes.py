"""Sums over the processes of a run; of one process, each is the value itself."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if _grouped() else 0


def count() -> int:
    return torch.distributed.get_world_size() if _grouped() else 1


def reduce_(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all processes."""
    if _grouped():
        torch.distributed.all_reduce(tensor)


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
