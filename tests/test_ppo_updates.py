"""PPO's optimizer steps: in float16, when memory runs out, and what a checkpoint holds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_ppo import filled, length, trainer

from pipeline.ppo import checkpoint as checkpoints
from pipeline.ppo import splitting
from pipeline.ppo.algorithm import LOSS_SCALE, RAISED_AFTER, LossScale
from pipeline.ppo.trainer import WHOLE_AGAIN, PPOTrainer


def state(ppo: PPOTrainer) -> dict[str, torch.Tensor]:
    """Weights and optimizer state, copied."""
    found = {}
    for role, optimizer in ppo.optimizers.items():
        for name, weight in ppo.actors.trained(role).items():  # type: ignore[arg-type]
            found[f"{role}/{name}"] = weight.detach().clone()
            found |= {f"{role}/{name}/{key}": value.clone() for key, value in optimizer.state[weight].items()}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("critic", ["trunk", "adapter"])
def test_small_gradients_arrive_in_float16(tiny_base: Path, critic: str) -> None:
    """Advantages and value errors around 1e-6: each role's gradient is float32's within a per cent."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    packs: list[Any] = []
    for dtype in ("float32", "float16"):
        ppo = trainer(tiny_base, length, dtype, "none", batch_size=4, critic=critic, max_grad_norm=1e9)
        with torch.no_grad():
            ppo.actors.value_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
        packs = packs or filled(ppo)
        for pack in packs:
            pack.noted_B[:] = True
            noise = torch.randn(pack.mask_BG.shape, generator=torch.Generator().manual_seed(5))
            pack.advantages_BG = 1e-6 * noise * pack.mask_BG
            with torch.no_grad():
                pack.values_BG = ppo.actors.values(pack)
            pack.returns_BG = pack.values_BG + 1e-6 * noise.flip(1) * pack.mask_BG
        for role, optimizer in ppo.optimizers.items():
            optimizer.step = lambda ppo=ppo, role=role, dtype=dtype: found.setdefault(dtype, {}).update(  # type: ignore[method-assign,misc]
                {f"{role}/{name}": weight.grad.clone() for name, weight in ppo.actors.trained(role).items()}  # type: ignore[union-attr]
            )
        ppo._minibatch(packs)
    for role in ("policy", "value"):
        full, half = (
            torch.cat([grad.flatten() for name, grad in found[dtype].items() if name.startswith(role)])
            for dtype in ("float32", "float16")
        )
        assert full.norm() > 0
        assert (half - full).norm() < 0.01 * full.norm(), role


def test_an_overflow_moves_neither_policy_nor_critic_and_lowers_the_scale(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, "float16", "none", batch_size=4, critic="adapter")
    packs = filled(ppo)
    ppo.scale.value = 2.0**60  # of a loss around 1 float16 cannot hold the gradients
    before = state(ppo)
    numbers = ppo._minibatch(packs)
    assert same(before, state(ppo)) and numbers["skipped_updates"] == 1.0 and "grad_norm" not in numbers
    assert ppo.scale.value == 2.0**58
    ppo.scale.value = LOSS_SCALE
    numbers = ppo._minibatch(packs)
    assert numbers["skipped_updates"] == 0.0 and numbers["grad_norm"] > 0 and numbers["loss_scale"] == LOSS_SCALE
    moved = [name for name, value in state(ppo).items() if not torch.equal(value, before[name])]
    assert any(name.startswith("policy") for name in moved) and any(name.startswith("value") for name in moved)

    # A gradient that is infinite at any scale is no overflow: it is told, and the run's health rules stop it.
    ppo.scale.value = 1.0
    packs[0].advantages_BG = packs[0].advantages_BG * 1e38
    before = state(ppo)
    numbers = ppo._minibatch(packs)
    assert same(before, state(ppo)) and not torch.isfinite(torch.tensor(numbers["grad_norm"]))


def test_the_scale_moves_by_its_rule() -> None:
    scale = LossScale(moves=True)
    assert scale.value == LOSS_SCALE and scale.overflowed(finite=False) and scale.value == LOSS_SCALE / 4
    assert not any(scale.overflowed(finite=True) for _ in range(RAISED_AFTER - 1)) and scale.value == LOSS_SCALE / 4
    scale.overflowed(finite=True)
    assert scale.value == LOSS_SCALE / 2 and scale.clean == 0
    fixed = LossScale(moves=False)
    assert not fixed.overflowed(finite=False) and fixed.value == 1.0


def test_a_checkpoint_holds_scale_and_optimizer(tiny_base: Path, tmp_path: Path) -> None:
    """Steps after it are bit-equal to those of a run that went on."""
    ran, resumed = (
        trainer(tiny_base, length, "float16", "none", batch_size=4, steps=3, critic="adapter") for _ in range(2)
    )
    steps = ran.steps()
    next(steps)
    ran.scale.value, ran.scale.clean = 2.0**12, RAISED_AFTER - 1
    checkpoints.save(ran, tmp_path)
    checkpoints.load(resumed, tmp_path)
    assert same(state(ran), state(resumed)) and vars(resumed.scale) == vars(ran.scale)
    next(steps)
    next(resumed.steps())
    assert same(state(ran), state(resumed)) and vars(resumed.scale) == vars(ran.scale)
    assert ran.scale.value == 2.0**13


def test_memory_is_tried_beside_the_optimizers_state(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there before the first pass, and is what AdamW would have made itself."""
    ppo = trainer(tiny_base, length, batch_size=4, steps=1)
    held: list[int] = []
    monkeypatch.setattr(ppo, "probes", True)
    monkeypatch.setattr(splitting, "probe", lambda trainer: held.append(len(state(trainer))))
    before = state(ppo)
    next(ppo.steps())
    assert held == [4 * sum(len(ppo.actors.trained(role)) for role in ("policy", "value"))]  # type: ignore[arg-type]
    lazy = trainer(tiny_base, length, batch_size=4, steps=1)
    for optimizer in lazy.optimizers.values():
        optimizer.state.clear()
    next(lazy.steps())
    assert same(state(ppo), state(lazy)) and not same(before, state(ppo))


def test_an_optimizer_step_without_memory_is_taken_again(tiny_base: Path) -> None:
    free, full = (trainer(tiny_base, length, batch_size=4, steps=1) for _ in range(2))
    next(free.steps())
    step, failed = full.optimizers["value"].step, []

    def once(*args: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        return step(*args)

    full.optimizers["value"].step = once  # type: ignore[method-assign]
    next(full.steps())
    assert failed and same(state(free), state(full))


def test_what_did_not_fit_once_is_tried_whole_again(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, batch_size=4, per_device_train_batch_size=4, num_ppo_epochs=1, steps=100)
    sizes: list[int] = []
    backward = ppo.backward

    def noted(pack: Any, tokens: float) -> torch.Tensor:
        sizes.append(len(pack.rows))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        return backward(pack, tokens)

    ppo.backward = noted  # type: ignore[method-assign]
    steps = ppo.steps()
    for _ in range(WHOLE_AGAIN + 1):
        next(steps)
    assert sizes == [4, *([2, 2] * WHOLE_AGAIN), 4]
