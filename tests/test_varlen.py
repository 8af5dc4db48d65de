"""Attention by segments as it is given to torch's kernel for CUDA, with the kernel stood in for by plain torch.

The references are the loop over segments and padded eager attention. The kernel itself has not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from test_packing import batch, loss_and_gradients, models
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.models import base, packing, varlen
from pipeline.models.spec import ModelSpec
from pipeline.models.varlen import Segment

APART = [Segment(0, 7), Segment(7, 8), Segment(8, 20)]
SHARED = [Segment(0, 9), Segment(9, 13, (0, 9)), Segment(13, 14, (0, 9)), Segment(14, 20)]


def plain_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends_q: torch.Tensor, ends_k: torch.Tensor,
    most_q: int, most_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What varlen_attn documents: causal and window aligned bottom right, one segment after the other."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q.is_contiguous() and ends_k.is_contiguous()
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert (int(ends_q.diff().max()), int(ends_k.diff().max())) == (most_q, most_k)
    assert (int(ends_q[-1]), int(ends_k[-1])) == (len(query), len(key)) and key.shape == value.shape
    assert enable_gqa or query.shape[1] == key.shape[1]
    groups = query.shape[1] // key.shape[1]
    parts = []
    for place in range(len(ends_q) - 1):
        q = query[ends_q[place] : ends_q[place + 1]]
        k, v = (one[ends_k[place] : ends_k[place + 1]].repeat_interleave(groups, 1) for one in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
        left, right = window_size
        scores = scores.masked_fill((ahead > right) | ((ahead < -left) & (left >= 0)), float("-inf"))
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go the kernel's way on the CPU."""
    monkeypatch.setattr(varlen, "DEVICE", "cpu")
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)


@pytest.mark.parametrize("window", [None, 1, 3, 12, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("segments", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.usefixtures("kernel")
def test_the_kernel_is_given_what_the_loop_computes(segments: list[Segment], kv_heads: int, window: int | None) -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = [(1, 4, 20, 8), (1, kv_heads, 20, 8), (1, kv_heads, 20, 8)]
    weight = torch.randn(1, 20, 4, 8, generator=draw)
    states = [torch.randn(shape, generator=draw) for shape in shapes]
    found = []
    for told in (segments, varlen.bounds_of(segments, torch.device("cpu"))):
        given = [state.clone().requires_grad_() for state in states]
        out, _ = packing.attend_by_segments(
            torch.nn.Module(), *given, None, scaling=0.3, sliding_window=window, segments=told
        )
        (out * weight).sum().backward()
        found.append([out.detach(), *(state.grad for state in given)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and torch.allclose(ours, theirs, atol=1e-5)


def test_rows_that_share_nothing_are_not_copied() -> None:
    assert varlen.bounds_of(APART, torch.device("cpu")).places_K is None
    shared = varlen.bounds_of(SHARED, torch.device("cpu"))
    assert shared.places_K is not None
    assert shared.queries_E.tolist() == [0, 9, 13, 14, 20] and shared.keys_E.tolist() == [0, 9, 22, 32, 38]
    assert shared.places_K.tolist() == [*range(9), *range(9), *range(9, 13), *range(9), 13, *range(14, 20)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "mistral", "gemma3_text", "granite"])
@pytest.mark.usefixtures("kernel")
def test_a_model_on_the_kernels_way_gives_the_padded_ones_gradients(name: str, side: str) -> None:
    plain, packed = models(name)
    ids, mask = batch(side)
    expected, found = loss_and_gradients(plain, ids, mask), loss_and_gradients(packed, ids, mask)
    assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-4)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.usefixtures("kernel")
def test_bounds_are_made_once_a_pass_and_every_batch_goes_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With activation checkpointing, which computes layers again, and of rows without padding as well, where sdpa would
    make a mask for a sliding window."""
    plain, packed = models("mistral")
    packed.activation_checkpointing_enable({"use_reentrant": False})
    made, computed = [], []

    def bounds(segments: list[Segment], device: torch.device) -> varlen.Bounds:
        made.append(len(segments))
        return _bounds(segments, device)

    def attend(*given: Any) -> torch.Tensor:
        computed.append(given[0].shape)
        return _attend(*given)

    _bounds, _attend = varlen.bounds_of, varlen.attend
    monkeypatch.setattr(varlen, "bounds_of", bounds)
    monkeypatch.setattr(varlen, "attend", attend)
    ids = torch.randint(1, 97, (5, 32), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    expected, found = loss_and_gradients(plain, ids, mask), loss_and_gradients(packed, ids, mask)
    assert made == [5] and len(computed) == 2 * 3
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_autocast_reaches_the_kernel(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *_, **__: seen.append(query.dtype) or query)
    states = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        varlen.attend(*states, varlen.bounds_of(APART, torch.device("cpu")), None, None)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "words", "dtype", "capability", "told"),
    [
        ("llama", {}, "bfloat16", (8, 0), ""),
        ("llama", {}, "float16", (7, 5), "compute capability 8.0, and the card has 7.5"),
        ("llama", {}, "float32", (9, 0), "16 bits only"),
        ("llama", {"head_dim": 20}, "bfloat16", (9, 0), "heads whose width is a multiple of 8"),
        ("llama", {"attention_dropout": 0.1}, "bfloat16", (9, 0), "uses dropout in its attention"),
        ("gemma2", {}, "bfloat16", (9, 0), "caps its attention scores"),
        ("deepseek_v3", {}, "bfloat16", (9, 0), "different widths"),
    ],
)
def test_what_the_kernel_cannot_compute_is_known_beforehand(
    name: str, words: dict, dtype: str, capability: tuple[int, int], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    config = AutoConfig.for_model(name, **words)
    monkeypatch.setattr(base, "load_config", lambda spec: config)
    card = torch.device("cuda", 0)
    found = varlen.why_not(config, getattr(torch, dtype), card)
    assert told in found and bool(told) == bool(found)
    asked, usual = (ModelSpec(base="x", dtype=dtype, attn_implementation=word) for word in ("segments", "sdpa"))
    assert not base.packs(usual, AutoModelForCausalLM, card)  # type: ignore[arg-type]
    if told:
        with pytest.raises(UserError, match=r"model.attn_implementation: segments .*model.attn_implementation=sdpa"):
            base.packs(asked, AutoModelForCausalLM, card)
    else:
        assert base.packs(asked, AutoModelForCausalLM, card)


def test_on_a_cpu_the_word_asks_for_what_sdpa_does_and_is_refused_where_that_pads(
    tiny_base: Path, tmp_path: Path
) -> None:
    spec = ModelSpec(**tiny_tree(tiny_base, tmp_path)["model"])
    asked = spec.model_copy(update={"attn_implementation": "segments"})
    tokenizer = base.load_tokenizer(spec)
    ids, mask = batch("right")
    found = [base.load_base(one, tokenizer)(input_ids=ids, attention_mask=mask).logits for one in (spec, asked)]
    assert torch.equal(*found) and asked.stock_attention == "sdpa"
    config = AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "load_config", lambda spec: config)
        assert not base.packs(spec, AutoModelForCausalLM, torch.device("cpu"))
        with pytest.raises(UserError, match="do more to a row than attend to it"):
            base.packs(asked, AutoModelForCausalLM, torch.device("cpu"))
