"""GPUs by name: memory, and the two speeds a roofline needs."""

from __future__ import annotations

import os
import re
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
    taken: int = 0
    """Bytes that other programs hold, the desktop among them; known only of a card that is here."""
    usable: float = 0.975
    """Of the memory as it is sold, what CUDA hands out: its messages speak of 7.79 GiB on cards of 8, 11.76 on cards
    of 12 and 23.69 on cards of 24. What torch itself says is usable whole."""

    @property
    def room(self) -> int:
        return round(self.memory * self.usable) - self.taken


def _card(name: str, gib: int, teraflops: float, bandwidth: float, reached: float = 0.6) -> Card:
    return Card(name, gib * GIB, teraflops, bandwidth, reached)


CARDS = {
    card.name: card
    for card in (
        # Public runs: 0.73 on a 3090, 0.61 to 0.70 on a 4090; 0.32 to 0.58 on an A100, 0.45 to 0.5 on an H100, where
        # other things than matrix products take their share.
        _card("rtx3060", 12, 25.5, 360),
        _card("rtx3060ti", 8, 32.4, 448),
        _card("rtx3070", 8, 40.6, 448),
        _card("rtx3080", 10, 59.5, 760),
        _card("rtx3090", 24, 71, 936),
        _card("rtx4060", 8, 30.2, 272),
        _card("rtx4060ti", 16, 44.1, 288),
        _card("rtx4070", 12, 58.3, 504),
        _card("rtx4070super", 12, 71.0, 504),
        _card("rtx4070tisuper", 16, 88, 672),
        _card("rtx4080", 16, 97.5, 717),
        _card("rtx4090", 24, 165, 1008),
        _card("rtx5060ti", 16, 47.4, 448),
        _card("rtx5070ti", 16, 87.9, 896),
        _card("rtx5080", 16, 112.6, 960),
        _card("rtx5090", 32, 209.5, 1792),
        _card("a10", 24, 125, 600, 0.45),
        _card("l4", 24, 121, 300, 0.45),
        _card("l40s", 48, 362, 864, 0.45),
        _card("a6000", 48, 154.8, 768, 0.5),
        _card("a100-40gb", 40, 312, 1555, 0.45),
        _card("a100-80gb", 80, 312, 2039, 0.45),
        _card("h100", 80, 989, 3350, 0.45),
        _card("h200", 141, 989, 4800, 0.45),
    )
}


def card(text: str) -> Card:
    """A card by name (rtx3060, "RTX 4090", h100) or by memory alone (12GB). Raises UserError for anything else."""
    word = re.sub(r"nvidia|geforce|[\s_]", "", text.lower())
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(g|gb|gib)", word)
    if size:
        if not 1 <= float(size[1]) <= 4096:
            raise UserError(f"--gpu {text}: expected between 1GB and 4096GB")
        return Card(f"{size[1]} GB", round(float(size[1]) * GIB))
    plain = {name.replace("-", ""): found for name, found in CARDS.items()}
    for candidate in (word.replace("-", ""), f"rtx{word}".replace("-", "")):
        if candidate in plain:
            return plain[candidate]
    raise UserError(f"--gpu {text}: neither memory (12GB) nor a card that is known here ({', '.join(CARDS)})")


def present() -> Card | None:
    """The first GPU of this machine, found without torch; None where there is none or its driver does not answer."""
    import shutil
    import subprocess

    if not shutil.which("nvidia-smi"):
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    query = "--query-gpu=name,memory.total,memory.used"
    ask = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={first}"]
    try:
        name, total, used = subprocess.run(ask, capture_output=True, text=True, timeout=3, check=True).stdout.split(",")
        memory, taken = int(total) * 2**20, int(used) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return named(name.strip(), memory, taken)


def half_of_ram() -> Card:
    """What a stage may take on a machine without a GPU: the other half is the system's and the data's."""
    import psutil

    return Card("half of this machine's RAM", psutil.virtual_memory().total // 2, usable=1.0)


def named(name: str, memory: int, taken: int = 0, usable: float = 0.975) -> Card:
    """A card that is here, with the speeds that are known of its kind."""
    try:
        known = card(name)
    except UserError:
        known = Card(name, memory)
    return replace(known, name=name, memory=memory, taken=taken, usable=usable)
