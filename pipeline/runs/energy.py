"""Energy, where the machine counts it: an NVIDIA GPU by itself, a processor package for the kernel (RAPL)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pipeline.language.say import kept

PACKAGES = Path("/sys/class/powercap")
JOULES_PER_WH = 3600.0


class Meter:
    """Watt-hours since it was made. `of`: what is counted; "" where nothing is."""

    def __init__(self) -> None:
        self.of, self.start = _counted()

    def watt_hours(self) -> float | None:
        """None where nothing is counted, or where a counter has begun anew in between."""
        of, now = _counted()
        if not of or of != self.of or len(now) != len(self.start):
            return None
        spent = [after - before for after, before in zip(now, self.start, strict=True)]
        return sum(spent) / JOULES_PER_WH if min(spent) >= 0 else None


def _counted() -> tuple[str, list[float]]:
    """What is counted, and the joules of every counter so far."""
    on_gpus = _gpus()
    if on_gpus:
        return kept("GPU"), on_gpus
    try:
        files = sorted(PACKAGES.glob("intel-rapl:[0-9]*/energy_uj"))  # AMD's packages are called so as well
        joules = [int(file.read_text()) / 1e6 for file in files if file.parent.name.count(":") == 1]
    except (OSError, ValueError):  # most systems let only root read it
        return "", []
    return (kept("processor, whatever else it did") if joules else ""), joules


def _gpus() -> list[float]:
    """Joules of each visible GPU since its driver was loaded; none without nvidia-ml-py."""
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        pynvml.nvmlInit()
        identifiers = [torch.cuda.get_device_properties(i).uuid for i in range(torch.cuda.device_count())]
        devices = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identifier}") for identifier in identifiers]
        return [pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3 for device in devices]
    except pynvml.NVMLError:  # before Volta nothing is counted
        return []
