"""What torch and bitsandbytes can do on this machine, tried. A program of its own, as a damaged build or driver may end
the process that loads it: `python -m pipeline.models.probe` prints what it found as JSON, each part as it is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

SIDE = 64
CLOSE = 0.25
"""Relative error of a product in 4 bits; a broken kernel is off by more than its size."""


def main() -> None:
    for part, look in (("torch", _torch), ("cards", _cards), ("four_bits", _four_bits)):
        print(json.dumps({part: _try(look)}), flush=True)


def _try(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception as error:  # whatever is wrong here is what is asked for
        return {"error": f"{type(error).__name__}: {error}"}


def _torch() -> Any:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    built_for = built_for or (f"ROCm {torch.version.hip}" if torch.version.hip else "CPU")
    return {"version": torch.__version__, "built_for": built_for, "threads": torch.get_num_threads()}


def _cards() -> Any:
    import torch

    cards = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        cards.append({
            "name": properties.name,
            "memory": total,
            "free": free,
            "capability": f"{properties.major}.{properties.minor}",
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        })  # fmt: skip
    return cards


def _four_bits() -> Any:
    """One product through a frozen 4-bit layer and its gradient's way back, beside the same in full."""
    import torch

    # It would load torch's compiler, 4 s of a core, for devices it has no kernels for.
    vars(torch)["compile"] = lambda function, **_: function
    import bitsandbytes

    modules: Any = bitsandbytes.nn
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Linear(SIDE, SIDE, bias=False)
    with torch.no_grad():
        whole.weight.copy_(torch.randn(SIDE, SIDE, generator=generator))
    layer = modules.Linear4bit(SIDE, SIDE, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(whole.state_dict())
    layer, whole = layer.to(device), whole.to(device)
    inputs = torch.randn(8, SIDE, generator=generator).to(device)
    passes = []
    for model in (layer, whole):
        given = inputs.clone().requires_grad_()
        output = model(given)
        output.sum().backward()
        passes.append((output.detach(), given.grad))
    error = max(float((found - whole).norm() / whole.norm()) for found, whole in zip(*passes, strict=True))
    return {"works": error < CLOSE, "relative_error": round(error, 4), "device": device}


if __name__ == "__main__":
    main()
