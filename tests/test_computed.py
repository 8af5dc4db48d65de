"""How many tokens packing leaves to compute, against a count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_packing import batch, loss_and_gradients, models
from test_ppo import length, trainer

from pipeline.data import render
from pipeline.measure import scoring
from pipeline.models.computed import take_computed


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_shared_beginning_counts_once_and_what_is_checkpointed_no_second_time(checkpointed: bool) -> None:
    plain, packed = models("llama")
    ids, mask = batch("right")
    if checkpointed:
        packed.gradient_checkpointing_enable()
    for _ in range(2):  # micro-batches of a step
        loss_and_gradients(packed, ids, mask)
    # Rows of 30, 21, 12, 26 and 21 tokens in a width of 32: two begin with the same 17, and two are the same 21.
    real = 30 + 21 + 12 + 26 + 21
    assert take_computed(packed) == {"computed_per_token": (real - 17 - 21) / real, "padded_per_token": 5 * 32 / real}
    assert take_computed(packed) == {}
    full, every = ids[:1, :30], mask[:1, :30]  # has nothing to pack, and no padding either
    packed(input_ids=full, attention_mask=every, use_cache=False)
    assert take_computed(packed) == {"computed_per_token": 1.0, "padded_per_token": 1.0}
    loss_and_gradients(plain, ids, mask)
    assert take_computed(plain) == {}


def test_a_step_of_ppo_counts_all_its_passes_but_sampling(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, batch_size=8, per_device_train_batch_size=4)
    trunk, counted = ppo.actors.backbone, {"computed": 0, "real": 0, "padded": 0}

    def entered(_: Any, args: Any, given: dict[str, Any]) -> None:
        if given.get("past_key_values") is None:
            counted["real"] += int(given["attention_mask"].sum())
            counted["padded"] += given["input_ids"].numel()

    def computing(_: Any, args: Any, given: dict[str, Any]) -> None:
        if given.get("past_key_values") is None:
            counted["computed"] += (args[0] if args else given["hidden_states"])[..., 0].numel()

    trunk.register_forward_pre_hook(entered, with_kwargs=True)
    trunk.layers[0].register_forward_pre_hook(computing, with_kwargs=True)
    torch.manual_seed(0)
    numbers = next(ppo.steps())
    assert counted["computed"] < counted["real"] < counted["padded"]
    for name in ("computed", "padded"):
        assert numbers[f"{name}_per_token"] == pytest.approx(counted[name] / counted["real"])


def test_held_out_pairs_compute_their_prompt_once(tiny_base: Path) -> None:
    """Though a long answer stands beside a short one, which a batch of like lengths would part."""
    ppo = trainer(tiny_base, length)
    prompts = [f"{letter}{letter} " * 40 for letter in "abcdefgh"]
    rows = [render.document(ppo.tokenizer, prompt + "q" * size) for prompt in prompts for size in (10, 300)]
    assert len(list(scoring.batches([len(row.ids) for row in rows]))) > 2
    take_computed(ppo.actors.model)
    apart = scoring.log_likelihoods(ppo.actors.model, ppo.tokenizer, rows)
    assert take_computed(ppo.actors.model)["computed_per_token"] == 1.0
    together = scoring.log_likelihoods(ppo.actors.model, ppo.tokenizer, rows, together=2)
    assert together == pytest.approx(apart, abs=1e-3)
    real = sum(len(row.ids) for row in rows)
    shared = sum(len(render.document(ppo.tokenizer, prompt).ids) - 3 for prompt in prompts)
    assert take_computed(ppo.actors.model)["computed_per_token"] <= (real - shared) / real
