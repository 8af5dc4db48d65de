"""What this machine computes in where a recipe leaves it open (`model.dtype: auto`).

Plain Python: torch is imported to ask for a GPU and to measure, and not for what is known already.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.disk.atomic import Json, digest, read_json, write_json
from pipeline.disk.manifest import Dtype
from pipeline.errors import UserError
from pipeline.models.spec import cache_folder

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As Linux names them; the last is ARM's. Without one of them each product in bfloat16 is emulated."""
TOKENS = 256
ELEMENTS = 1 << 20
"""Of the matrix that is measured with: of a larger layer only some columns, which say the same in less time."""
SECONDS = 0.2
LATELY = 3600.0
"""Seconds for which a speed is taken to stay: what else a machine has to do changes. The choice of a dtype stays."""
TIE = 1.1
"""bfloat16 may take so many times as long: it takes half the memory."""


@dataclass(frozen=True)
class Choice:
    dtype: Dtype
    why: str

    def __str__(self) -> str:
        return f"computes in {self.dtype}: {self.why}"


def choose(hidden: int, intermediate: int) -> Choice:
    """What is faster here for a model with layers of that shape. What was measured once on a machine is remembered, so
    that runs which are compared do not differ by chance."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bfloat16", f"{name} does so natively")
        return Choice("float16", f"{name} has no bfloat16")
    if known := known_for_cpu(hidden, intermediate):
        return known
    return measure(hidden, intermediate, SECONDS)


def measure(hidden: int, intermediate: int, seconds: float) -> Choice:
    """Race the two for so many seconds, and remember who is faster, and how fast each was. A choice that is known
    already stays."""
    float32, bfloat16 = race(hidden, intermediate, seconds)
    choice = known_for_cpu(hidden, intermediate) or decide(float32, bfloat16)
    operations = 4 * TOKENS * hidden * _columns(hidden, intermediate)
    speeds = {"float32": operations / float32, "bfloat16": operations / bfloat16}
    noted: Json = {"cpu": describe_cpu()["model name"], "torch": version("torch"), "shape": [hidden, intermediate]}
    noted["operations_per_second"] = speeds
    write_json(_memory(hidden, intermediate), {**noted, "dtype": choice.dtype, "why": choice.why})
    return choice


def known_speed(hidden: int, intermediate: int, dtype: str) -> float | None:
    """Operations per second of a matrix product in that dtype on this machine's CPU, if they were measured lately."""
    memory = _memory(hidden, intermediate)
    try:
        if time.time() - memory.stat().st_mtime > LATELY:
            return None
        noted = read_json(memory) or {}
        return float(noted["operations_per_second"][dtype])
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None


def known_for_cpu(hidden: int, intermediate: int) -> Choice | None:
    """What is chosen on this machine's CPU, if that is known without measuring."""
    if not BFLOAT16_INSTRUCTIONS & set(describe_cpu()["flags"].split()):
        return Choice("float32", "this CPU has no instructions for bfloat16")
    try:
        noted = read_json(_memory(hidden, intermediate)) or {}
    except UserError:  # what cannot be read is measured again
        return None
    dtypes: dict[Any, Dtype] = {"bfloat16": "bfloat16", "float32": "float32"}
    dtype = dtypes.get(noted.get("dtype"))
    return Choice(dtype, str(noted.get("why"))) if dtype else None


def decide(float32: float, bfloat16: float) -> Choice:
    """By the seconds that each takes."""
    if bfloat16 > TIE * float32:
        return Choice("float32", f"{bfloat16 / float32:.1f} times as fast as bfloat16 here")
    if float32 > TIE * bfloat16:
        return Choice("bfloat16", f"{float32 / bfloat16:.1f} times as fast as float32 here")
    return Choice("bfloat16", "as fast as float32 here, in half the memory")


def race(hidden: int, intermediate: int, seconds: float = SECONDS) -> tuple[float, float]:
    """The least seconds in float32 and in bfloat16 of one product through a frozen matrix and its gradient's way back,
    which training consists of."""
    import torch

    columns = _columns(hidden, intermediate)
    dtypes = (torch.float32, torch.bfloat16)
    inputs = [torch.full((TOKENS, hidden), 0.5, dtype=dtype) for dtype in dtypes]
    weights = [torch.full((columns, hidden), 0.01, dtype=dtype) for dtype in dtypes]
    least, end = [float("inf")] * 2, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for index in range(2):  # in turns, so that what else the machine does falls on both
            begun = time.perf_counter()
            _ = inputs[index] @ weights[index].t() @ weights[index]
            least[index] = min(least[index], time.perf_counter() - begun)
    return least[0], least[1]


def _columns(hidden: int, intermediate: int) -> int:
    return max(1, min(intermediate, ELEMENTS // hidden))


def describe_cpu() -> dict[str, str]:
    """Name and flags of the first processor; empty where the system does not say."""
    said = {"model name": "", "flags": ""}
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return said
    for line in lines:
        key, _, value = line.partition(":")
        key = {"Features": "flags"}.get(key.strip(), key.strip())
        if key in said:
            said[key] = value.strip()
    return said


def _memory(hidden: int, intermediate: int) -> Path:
    """Where the choice is remembered: for this processor, with as many cores, under this torch, for these shapes."""
    machine = [describe_cpu(), os.cpu_count(), version("torch")]
    return cache_folder() / "dtype" / f"{digest([machine, hidden, intermediate])}.json"
