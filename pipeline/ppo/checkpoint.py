"""A PPO run on disk between two steps. No state of a generator is kept: every step seeds its own by its number."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.models import adapters
from pipeline.ppo.actors import POLICY
from pipeline.ppo.trainer import RolloutTrainer


def save(trainer: RolloutTrainer, folder: Path) -> None:
    """All that the next step depends on: adapters and heads, optimizers, counters."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(trainer).items()}
    save_file(tensors, folder / "ppo.safetensors")
    state = {
        "step": trainer.step,
        "kl_coef": trainer.kl.coef,
        "loss_scale": [trainer.scale.value, trainer.scale.clean],
        "score_moments": trainer.score_scale.moments_3.tolist(),
        "tokens": trainer.tokens,
        "health": {"history": trainer.health.history, "warned": trainer.health.warned},
    }
    (folder / "ppo.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    trainer.actors.act_as(POLICY)
    adapters.save(trainer.actors.model, folder / "adapter")


def load(trainer: RolloutTrainer, folder: Path) -> None:
    """Stand where `save` was called."""
    saved = load_file(folder / "ppo.safetensors", device=str(trainer.actors.device))
    for name, tensor in _tensors(trainer).items():
        tensor.copy_(saved[name])
    state = json.loads((folder / "ppo.json").read_text(encoding="utf-8"))
    trainer.step, trainer.kl.coef, trainer.tokens = state["step"], state["kl_coef"], state["tokens"]
    trainer.scale.value, trainer.scale.clean = state["loss_scale"]
    trainer.score_scale.moments_3 = torch.tensor(state["score_moments"], dtype=torch.float64)
    trainer.health.history, trainer.health.warned = state["health"]["history"], state["health"]["warned"]


def _tensors(trainer: RolloutTrainer) -> dict[str, torch.Tensor]:
    """The trained weights and the optimizers' state, as they stand in memory."""
    tensors = {}
    for role, optimizer in trainer.optimizers.items():
        for name, weight in trainer.actors.trained(role).items():
            tensors[f"{role}/{name}"] = weight.data
            for key, value in optimizer.state[weight].items():
                tensors[f"optimizer/{key}/{role}/{name}"] = value
    return tensors
