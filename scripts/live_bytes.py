"""Live tensor bytes of a block of PyTorch code, on real tensors or on fake ones with true shapes and no data.

Resident-set size cannot say this: the allocator keeps freed pages. On a GPU, add the CUDA context and fragmentation.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts every storage once, from when an operation returns it to when it is freed.

    `now` and `peak` in bytes; `count` adds what was there before the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def count(self, *modules: torch.nn.Module) -> LiveBytes:
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._see(tensor)
                state = getattr(tensor, "quant_state", None)
                for nested in (state, getattr(state, "state2", None)):
                    for part in vars(nested).values() if nested is not None else ():
                        if isinstance(part, torch.Tensor):
                            self._see(part)
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
