"""GPUs by name: memory, and the two speeds a roofline needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from pipeline.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """`teraflops` dense bfloat16 with float32 accumulation, and `bandwidth` in GB/s, as the maker states them; None
    where only the memory is known. `reached` is the share of the peak that training reaches, recomputation counted."""

    name: str
    memory: int
    teraflops: float | None = None
    bandwidth: float | None = None
    reached: float = 0.6
    used: int = 0
    """Bytes that other programs hold, the desktop among them; known only of a card that is here."""
    usable: float = 0.975
    """Of the memory as it is sold, what CUDA hands out: its messages speak of 7.79 GiB on cards of 8, 11.76 on cards
    of 12 and 23.69 on cards of 24. What torch itself says is usable whole."""
    layer: float = 0.0
    """Seconds of a layer's pass, forward or backward, beside its matrix products; known of a CPU alone."""

    @property
    def room(self) -> int:
        return round(self.memory * self.usable) - self.used


CARDS = {
    name: Card(name, gib * GIB, teraflops, bandwidth, reached)
    for name, gib, teraflops, bandwidth, reached in (
        # Reached in public runs: 0.73 on a 3090, 0.61 to 0.70 on a 4090; 0.32 to 0.58 on an A100, 0.45 to 0.5 on an
        # H100, where other things than matrix products take their share.
        ("rtx3060", 12, 25.5, 360, 0.6),
        ("rtx3060ti", 8, 32.4, 448, 0.6),
        ("rtx3070", 8, 40.6, 448, 0.6),
        ("rtx3080", 10, 59.5, 760, 0.6),
        ("rtx3090", 24, 71, 936, 0.6),
        ("rtx4060", 8, 30.2, 272, 0.6),
        ("rtx4060ti", 16, 44.1, 288, 0.6),
        ("rtx4070", 12, 58.3, 504, 0.6),
        ("rtx4070super", 12, 71.0, 504, 0.6),
        ("rtx4070tisuper", 16, 88, 672, 0.6),
        ("rtx4080", 16, 97.5, 717, 0.6),
        ("rtx4090", 24, 165, 1008, 0.6),
        ("rtx5060ti", 16, 47.4, 448, 0.6),
        ("rtx5070ti", 16, 87.9, 896, 0.6),
        ("rtx5080", 16, 112.6, 960, 0.6),
        ("rtx5090", 32, 209.5, 1792, 0.6),
        ("a10", 24, 125, 600, 0.45),
        ("l4", 24, 121, 300, 0.45),
        ("l40s", 48, 362, 864, 0.45),
        ("a6000", 48, 154.8, 768, 0.5),
        ("a100-40gb", 40, 312, 1555, 0.45),
        ("a100-80gb", 80, 312, 2039, 0.45),
        ("h100", 80, 989, 3350, 0.45),
        ("h200", 141, 989, 4800, 0.45),
    )
}


def find_card(text: str) -> Card:
    """A card by name (rtx3060, "RTX 4090", h100) or by memory alone (12GB). Raises UserError for anything else."""
    name = re.sub(r"nvidia|geforce|[\s_]", "", text.lower())
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(g|gb|gib)", name):
        if not 1 <= float(size[1]) <= 4096:
            raise UserError(f"--gpu {text}: expected between 1GB and 4096GB")
        return Card(f"{size[1]} GB", round(float(size[1]) * GIB))
    name = name.replace("-", "")
    for known in CARDS:
        if known.replace("-", "") in (name, f"rtx{name}"):
            return CARDS[known]
    raise UserError(f"--gpu {text}: neither memory (12GB) nor a card that is known here ({', '.join(CARDS)})")


def detect_card() -> Card | None:
    """The first GPU of this machine, found without torch; None where there is none or its driver does not answer."""
    if not shutil.which("nvidia-smi"):
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    query = "--query-gpu=name,memory.total,memory.used"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={first}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True).stdout
        name, total, used = answer.split(",")
        return describe_card(name.strip(), int(total) * 2**20, int(used) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def half_of_ram() -> Card:
    """What a stage may take on a machine without a GPU: the other half is the system's and the data's."""
    import psutil

    return Card("half of this machine's RAM", psutil.virtual_memory().total // 2, usable=1.0)


def this_cpu(operations: float) -> Card:
    """This machine's CPU, of which was measured how many operations a second a matrix product reaches. The other
    figures are of one machine (2 cores of an AMD EPYC), on which the stages of recipes/quickstart.yaml were timed."""
    return replace(half_of_ram(), teraflops=operations / 1e12, bandwidth=15.0, reached=0.8, layer=0.003)


def describe_card(name: str, memory: int, used: int = 0, usable: float = 0.975) -> Card:
    """A card that is here, with the speeds that are known of its kind."""
    try:
        known = find_card(name)
    except UserError:
        known = Card(name, memory)
    return replace(known, name=name, memory=memory, used=used, usable=usable)
