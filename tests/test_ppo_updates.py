"""PPO's optimizer steps: in float16, when memory runs out, and what a checkpoint holds of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_two_processes
from test_ppo import ROWS, length, make_batch, trainer

from pipeline.data import render
from pipeline.measure import answers, scoring
from pipeline.models import processes
from pipeline.ppo import checkpoint as checkpoints
from pipeline.ppo import held_out as held_out_numbers
from pipeline.ppo import invariants
from pipeline.ppo.algorithm import LOSS_SCALE, RAISED_AFTER, LossScale
from pipeline.ppo.ppo import PPOTrainer
from pipeline.ppo.trainer import WHOLE_AGAIN


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
    batch: list[Any] = []
    for dtype in ("float32", "float16"):
        ppo = trainer(tiny_base, length, dtype, "none", batch_size=4, critic=critic, max_grad_norm=1e9)
        with torch.no_grad():
            ppo.actors.value_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
        batch = batch or make_batch(ppo)
        assert all(one.old_logp_BG is None for one in batch)
        for place, one in enumerate(batch):
            mask_BG = one.pack.mask_BG
            noise = torch.randn(mask_BG.shape, generator=torch.Generator().manual_seed(5))
            with torch.no_grad():
                values_BG = ppo.actors.values(one.pack)
            returns_BG = values_BG + 1e-6 * noise.flip(1) * mask_BG
            batch[place] = replace(
                one, old_values_BG=values_BG, advantages_BG=1e-6 * noise * mask_BG, returns_BG=returns_BG
            )
        for role, optimizer in ppo.optimizers.items():
            optimizer.step = lambda ppo=ppo, role=role, dtype=dtype: found.setdefault(dtype, {}).update(  # type: ignore[method-assign,misc]
                {f"{role}/{name}": weight.grad.clone() for name, weight in ppo.actors.trained(role).items()}  # type: ignore[union-attr]
            )
        ppo.update_minibatch(batch)
    for role in ("policy", "value"):
        full, half = (
            torch.cat([grad.flatten() for name, grad in found[dtype].items() if name.startswith(role)])
            for dtype in ("float32", "float16")
        )
        assert full.norm() > 0
        assert (half - full).norm() < 0.01 * full.norm(), role


def test_an_overflow_moves_neither_policy_nor_critic_and_lowers_the_scale(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, "float16", "none", batch_size=4, critic="adapter")
    batch = make_batch(ppo)
    ppo.scale.value = 2.0**60  # of a loss around 1 float16 cannot hold the gradients
    before = state(ppo)
    numbers, batch = ppo.update_minibatch(batch)
    assert same(before, state(ppo)) and numbers["skipped_updates"] == 1.0 and "grad_norm" not in numbers
    assert ppo.scale.value == 2.0**58
    ppo.scale.value = LOSS_SCALE
    numbers, batch = ppo.update_minibatch(batch)
    assert numbers["skipped_updates"] == 0.0 and numbers["grad_norm"] > 0 and numbers["loss_scale"] == LOSS_SCALE
    moved = [name for name, value in state(ppo).items() if not torch.equal(value, before[name])]
    assert any(name.startswith("policy") for name in moved) and any(name.startswith("value") for name in moved)

    # A gradient that is infinite at any scale is no overflow: it is told, and the run's health rules stop it.
    ppo.scale.value = 1.0
    batch[0] = replace(batch[0], advantages_BG=batch[0].advantages_BG * 1e38)
    before = state(ppo)
    numbers, _ = ppo.update_minibatch(batch)
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
    monkeypatch.setattr(ppo, "try_longest", lambda: held.append(len(state(ppo))))
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

    def noted(batch: Any, tokens: float) -> Any:
        sizes.append(len(batch.pack.rows))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        return backward(batch, tokens)

    ppo.backward = noted  # type: ignore[method-assign]
    steps = ppo.steps()
    for _ in range(WHOLE_AGAIN + 1):
        next(steps)
    assert sizes == [4, *([2, 2] * WHOLE_AGAIN), 4]


def test_another_attention_kernel_for_gradients_moves_no_ratio(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA takes another one for some shapes once there is a way back; here it is planted. What an answer was scored
    by must be the pass that learns from it, so that the ratio is exactly 1 before the first update."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def planted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        found = attention(query, *args, **options)
        return found * 1.01 if torch.is_grad_enabled() and query.requires_grad else found

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", planted)
    ppo = trainer(tiny_base, length, batch_size=4, mini_batch_size=2, per_device_train_batch_size=2)
    found = invariants.policy_is_reference(ppo)
    assert found["step_0_ratio_minus_1"] == 0.0 and found["step_0_kl"] == 0.0
    numbers, _ = ppo.update_minibatch(make_batch(ppo)[:1])
    assert numbers["ratio"] == 1.0 and numbers["update_kl"] == 0.0
    assert all(not module.training for module in ppo.actors.model.modules())


def held_out(base: Path) -> dict[str, Any]:
    """What evaluation says, with numbers that it must not matter how many processes share; and a sum over them."""
    ppo = trainer(base, length, batch_size=4)
    ppo.step = 1  # so that KL is asked
    model, tokenizer = ppo.actors.model, ppo.tokenizer
    documents = [render.document(tokenizer, "zq " * (100 + i)) for i in range(12)]
    assert len(list(scoring.batches([len(row.ids) for row in documents]))) > 2
    read: list[int] = []
    trunk = model.get_base_model().model
    hook = trunk.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
    likelihoods = scoring.log_likelihoods(model, tokenizer, documents)
    hook.remove()
    asked = held_out_numbers.ask(ppo, ROWS[:3])
    tensors = [torch.full((3,), 1.0 + ppo.rank), torch.full((2, 2), 10.0)]
    return {
        "likelihoods": likelihoods, "read": sum(read),
        "greedy": [answer.text for answer in answers.generate(model, tokenizer, ROWS, new_tokens=5)],
        "asked": asked["reward"].size, "kl": asked["kl"].size,
        "lengths": asked["answer_length"].tolist(), "scores": asked["reward"].tolist(),
        "sums": [processes.add_up(tensor).flatten().tolist() for tensor in tensors],
    }  # fmt: skip


def test_processes_share_what_is_held_out(tiny_base: Path, tmp_path: Path) -> None:
    """Each takes a part, and all end with the same numbers, which are those of one process."""
    ranks = on_two_processes("test_ppo_updates", "held_out", tiny_base, tmp_path)
    alone = held_out(tiny_base)
    shares = [found.pop("read") for found in ranks]
    assert sum(shares) == alone["read"] == 12 and min(shares) > 0
    assert ranks[0] == ranks[1]
    assert ranks[0]["likelihoods"] == pytest.approx(alone["likelihoods"], abs=1e-4)
    assert ranks[0]["greedy"] == alone["greedy"]
    assert ranks[0]["asked"] == ranks[0]["kl"] == alone["asked"] == 3 * held_out_numbers.ANSWERS
    assert ranks[0]["sums"] == [[3.0] * 3, [20.0] * 4] and alone["sums"] == [[1.0] * 3, [10.0] * 4]
