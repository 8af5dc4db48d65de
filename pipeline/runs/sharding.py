"""What spreads one model over several processes (DeepSpeed, FSDP, Megatron-LM) is refused by name, before any work.

Here each process holds the whole 4-bit base; checkpoints, and the checks between stages, count on that.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from pipeline.errors import UserError

SHARDS = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
INSTEAD = (
    "It is not supported: each GPU holds the whole 4-bit base, and the gradients of the adapter are averaged. For "
    "several GPUs use distributed_type: MULTI_GPU, as in recipes/accelerate/ddp.yaml."
)


def refuse(launch_config: Path | None = None) -> None:
    """Raises UserError naming the file and key, or the variable, that asks for it.

    Without a file it is accelerate's own, which `accelerate config` has written, that the launcher reads.
    """
    for shard, name in SHARDS.items():
        variable = f"ACCELERATE_USE_{shard}"
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UserError(f"{variable} is set in the environment and asks for {name}. {INSTEAD}")
    file = launch_config or _find_default_config()
    if not file.is_file():
        return
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: is not an accelerate config: {error}") from error
    if not isinstance(config, dict):
        return
    for shard, name in SHARDS.items():
        if str(config.get("distributed_type")).upper() == shard:
            raise UserError(f"{file}: distributed_type asks for {name}. {INSTEAD}")
        if config.get(f"{shard.lower()}_config"):
            raise UserError(f"{file}: {shard.lower()}_config asks for {name}. {INSTEAD}")


def _find_default_config() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface") / "accelerate" / "default_config.yaml"
