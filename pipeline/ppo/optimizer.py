"""The optimizer's step of policy and critic: both, or neither."""

from __future__ import annotations

import math

import torch
from accelerate import PartialState

from pipeline.models.out_of_memory import try_twice
from pipeline.ppo.actors import Actors, Role
from pipeline.ppo.algorithm import LossScale
from pipeline.ppo.settings import RolloutSettings

Optimizers = dict[Role, torch.optim.AdamW]
AT_ONCE = 1 << 24
"""Numbers that travel between processes in one go; as many take memory beside the gradients."""


def make_optimizers(actors: Actors, settings: RolloutSettings) -> Optimizers:
    """With the state that AdamW would make in its first step, so that what is tried before the first rollout is tried
    beside it."""
    optimizers: Optimizers = {}
    roles: tuple[Role, ...] = ("policy", "value") if settings.critic else ("policy",)
    for role in roles:
        # On CUDA one kernel that changes everything in place: a step takes no memory that the first try did not see.
        optimizer = torch.optim.AdamW(
            list(actors.trained(role).values()),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=actors.device.type == "cuda" or None,
        )
        (group,) = optimizer.param_groups
        for weight in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=weight.device if group["fused"] else "cpu")
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": step, **moments}
        optimizers[role] = optimizer
    return optimizers


def trained_weights(optimizers: Optimizers) -> list[torch.nn.Parameter]:
    """All that is trained."""
    return [weight for optimizer in optimizers.values() for weight in optimizer.param_groups[0]["params"]]


def take_step(
    optimizers: Optimizers, scale: LossScale, settings: RolloutSettings, step: int, finite: bool
) -> dict[str, float]:
    """Add up the processes' gradients, clip them and move the weights; where a gradient is not finite, no weight moves.
    Leaves no gradient; gives learning rate, norms, and what became of the scale. `finite`: whether the loss was.
    """
    used_scale = scale.value
    weights = trained_weights(optimizers)
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    if PartialState().num_processes > 1:
        _add_up([weight.grad for weight in weights if weight.grad is not None])
    if scale.moves:
        for weight in weights:
            weight.grad.div_(used_scale)  # type: ignore[union-attr]
    norms = {
        role: torch.nn.utils.clip_grad_norm_(trained_weights({role: optimizer}), settings.max_grad_norm).item()
        for role, optimizer in optimizers.items()
    }
    fit = finite and all(map(math.isfinite, norms.values()))
    rates: dict[Role, float] = {"policy": settings.learning_rate, "value": settings.learning_rate}
    if settings.value_learning_rate is not None:
        rates["value"] = settings.value_learning_rate
    factor = settings.learning_rate_factor(step)
    for role, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = rates[role] * factor
        if fit:
            try_twice(optimizer.step)
        optimizer.zero_grad(set_to_none=True)
    # All processes have the same gradients by now, so they all skip and move the scale alike.
    skipped = finite and scale.overflowed(fit)
    numbers = {"learning_rate": rates["policy"] * factor}
    if scale.moves:
        numbers |= {"loss_scale": used_scale, "skipped_updates": float(skipped)}
    if not skipped:
        numbers |= {"grad_norm": norms["policy"]} | {
            f"{role}_grad_norm": norms[role] for role in norms if role == "value"
        }
    return numbers


def _add_up(gradients: list[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all processes; many small ones travel together."""
    together: list[torch.Tensor] = []
    for index, gradient in enumerate(gradients, 1):
        together.append(gradient)
        if index < len(gradients) and sum(map(torch.numel, together)) < AT_ONCE:
            continue
        flat = torch.cat([one.flatten() for one in together])
        torch.distributed.all_reduce(flat)
        totals = torch.split(flat, [one.numel() for one in together])
        for one, total in zip(together, totals, strict=True):
            one.copy_(total.view_as(one))
        together = []
