"""A packed model gives what the padded one gives: hidden states, losses and gradients, with transformers' own eager
attention as the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models import packing

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 9}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {"original_max_position_embeddings": 128, **WINDOW},
    "mistral": WINDOW,
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 8, **WINDOW},
    "cohere2": WINDOW,
    "granite": {},
    "olmo2": {},
    "smollm3": {},
}


def models(name: str) -> tuple[Any, Any]:
    """The same weights under eager attention and packed."""
    config = AutoConfig.for_model(name, **SMALL, **ARCHITECTURES[name], initializer_range=0.3)
    torch.manual_seed(0)
    plain, packed = (
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).float().train()
        for attention in ("eager", packing.NAME)
    )
    assert plain.config._attn_implementation == "eager"
    packed.load_state_dict(plain.state_dict())
    assert packing.can_pack(packed.config, AutoModelForCausalLM)
    packing.pack_inside(packed)
    return plain, packed


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Five rows of unlike lengths: 0 and 3 begin with the same 17 tokens, 1 and 4 are equal, 2 is alone."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 97, (length,), generator=draw) for length in (30, 21, 12, 26)]
    rows[3][:17] = rows[0][:17]
    rows.append(rows[1].clone())
    ids, mask = torch.zeros(5, 32, dtype=torch.long), torch.zeros(5, 32, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(32 - len(row), 32)
        ids[place, where], mask[place, where] = row, 1
    return ids, mask


def loss_and_gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Of every row's tokens, each row weighed otherwise, so that no two gradients cancel."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    real = (mask[:, 1:] * mask[:, :-1]) * torch.arange(1, 6)[:, None]
    loss = -(logp * real).sum() / real.sum()
    loss.backward()
    return loss, logits[mask.bool()].detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_batch_gives_the_padded_ones_loss_and_gradients(name: str, side: str) -> None:
    plain, packed = models(name)
    ids, mask = batch(side)
    expected, found = loss_and_gradients(plain, ids, mask), loss_and_gradients(packed, ids, mask)
    assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-4)
    assert len(found[2]) == len(expected[2]) > 0
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_rows_begin_with_is_computed_once() -> None:
    ids, mask = batch("right")
    pack = packing.pack_rows(ids, mask, None, share=True)
    assert pack is not None
    shared = 17 + 21  # of the two that begin alike, and of the two that are equal
    assert pack.ids_1N.shape[1] == int(mask.sum()) - shared
    apart = packing.pack_rows(ids, mask, None, share=False)
    assert apart is not None and apart.ids_1N.shape[1] == int(mask.sum())
    for found in (pack, apart):
        assert torch.equal(found.ids_1N[0][found.places_BT][mask.bool()], ids[mask.bool()])
        positions = (mask.cumsum(1) - 1)[mask.bool()]
        assert torch.equal(found.positions_1N[0][found.places_BT][mask.bool()], positions)


def test_a_row_that_a_collator_packed_is_attended_to_in_its_segments() -> None:
    plain, packed = models("llama")
    ids, mask = batch("right")
    lengths = mask.sum(1).tolist()
    flat = ids[mask.bool()][None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = packed(input_ids=flat, position_ids=positions, use_cache=False).logits[0]
    rows = [
        plain(input_ids=row[None, :length], use_cache=False).logits[0] for row, length in zip(ids, lengths, strict=True)
    ]
    assert torch.allclose(found, torch.cat(rows), atol=1e-4)


def test_dropout_is_drawn_for_each_row() -> None:
    _, packed = models("llama")
    ids, mask = batch("right")
    trunk, seen = packed.model, []
    trunk.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    packed(input_ids=ids, attention_mask=mask, use_cache=False)
    trunk.layers[0].self_attn.extra = torch.nn.Dropout(0.1)
    packed(input_ids=ids, attention_mask=mask, use_cache=False)
    assert seen == [int(mask.sum()) - 38, int(mask.sum())]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_sampling_is_left_as_it_is(name: str) -> None:
    plain, packed = models(name)
    ids, mask = batch("left")
    told = [
        model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        for model in (plain, packed)
    ]
    assert torch.equal(*told)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lfm2", ["conv", "full_attention"]),
        ("mamba", None),
        ("falcon_h1", None),
        ("qwen3_next", None),
        ("gpt_oss", None),
    ],
)
def test_layers_that_would_run_over_the_ends_of_rows_are_not_packed(name: str, layers: list[str] | None) -> None:
    config = AutoConfig.for_model(name, **({"layer_types": layers, "num_hidden_layers": 2} if layers else {}))
    assert not packing.can_pack(config, AutoModelForCausalLM)
