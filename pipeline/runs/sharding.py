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
    """Raises UserError naming the file and key, or the variable, that asks for it."""
    for shard, name in SHARDS.items():
        variable = f"ACCELERATE_USE_{shard}"
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UserError(f"{variable} is set in the environment and asks for {name}. {INSTEAD}")
    if launch_config is None:
        return
    try:
        config = yaml.safe_load(launch_config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{launch_config}: is not an accelerate config: {error}") from error
    if not isinstance(config, dict):
        return
    for shard, name in SHARDS.items():
        if str(config.get("distributed_type")).upper() == shard:
            raise UserError(f"{launch_config}: distributed_type asks for {name}. {INSTEAD}")
        if config.get(f"{shard.lower()}_config"):
            raise UserError(f"{launch_config}: {shard.lower()}_config asks for {name}. {INSTEAD}")
