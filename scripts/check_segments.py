"""Batches without padding against padded ones on a card: the same losses and gradients? how fast, how much memory?

A row of scripts/gpu_check.py. First the kernel alone against the loop over segments in float32, then a model of 8B's
widths, with fewer layers and tokens, on rows of unlike length and on pairs under one prompt. On a CPU, which does not
have the kernel, both sides of the first part are the loop: there only the script is tried.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import bench_gpu
import torch
from peft import LoraConfig, get_peft_model
from plan_oracle import LORA, MODELS

from pipeline.models import adapters, packing, varlen
from pipeline.models.base import computing
from pipeline.models.varlen import Segment

FEWER = {"num_hidden_layers": 8, "vocab_size": 32000}
KERNEL_ROUNDING = 0.01
"""Of a result's length, the most by which 16 bits may turn it in one attention."""
MODEL_ROUNDING = 0.05
"""The same of all gradients, through the layers."""
TIMED = 3


def kernel(device: torch.device) -> dict[str, float]:
    """How far output and gradients lie from the loop's in float32, by what is tried."""
    found = {}
    apart = [Segment(0, 130), Segment(130, 131), Segment(131, 300)]
    shared = [Segment(0, 90), Segment(90, 170, (0, 90)), Segment(170, 171, (0, 90)), Segment(171, 300)]
    for name, segments in (("apart", apart), ("shared", shared)):
        for kv_heads, window in ((8, None), (2, None), (2, 40)):
            draw = torch.Generator().manual_seed(17)
            shapes = [(1, 8, 300, 64), (1, kv_heads, 300, 64), (1, kv_heads, 300, 64)]
            states = [torch.randn(shape, generator=draw).bfloat16().to(device) for shape in shapes]
            weight = torch.randn(1, 300, 8, 64, generator=draw).to(device)
            sides = []
            for dtype in (torch.float32, torch.bfloat16):
                given = [state.detach().to(dtype).requires_grad_() for state in states]
                to_kernel = dtype is torch.bfloat16 and device.type == varlen.DEVICE
                told = varlen.bounds_of(segments, device) if to_kernel else segments
                out, _ = packing.attend_by_segments(
                    torch.nn.Module(), *given, None, sliding_window=window, segments=told
                )
                (out.float() * weight).sum().backward()
                sides.append([out.detach(), *(state.grad for state in given)])
            worst = max(_apart(ours, theirs) for ours, theirs in zip(*sides, strict=True))  # type: ignore[arg-type]
            found[f"{name}, {kv_heads} of 8 heads, window {window}"] = worst
    return found


def _apart(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((expected.float() - found.float()).norm() / expected.float().norm()).item()


def batches(length: int, vocab: int, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(17)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, vocab, (count,), generator=draw)

    unlike = [tokens(length * part // 8) for part in (8, 2, 5, 3, 7, 2, 4, 6)]
    prompts = [tokens(length // 2) for _ in range(4)]
    pairs = [torch.cat([prompt, tokens(length * part // 8)]) for part in (4, 2) for prompt in prompts]
    found = {}
    for name, rows in (("rows of unlike length", unlike), ("pairs", pairs)):
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        found[name] = {key: value.to(device) for key, value in batch.items()}
    return found


def side(attention: str, config: dict[str, Any], length: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Loss, gradients, tokens/s and GiB of each batch under this attention."""
    torch.manual_seed(17)
    base = bench_gpu.random_base(config, device, attention=attention)
    model = adapters._ready(get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")))
    bench_gpu.checkpoint_first(model, config["num_hidden_layers"])
    model.train()
    trained = adapters.trainable(model)
    draw = torch.Generator().manual_seed(18)
    for weight in trained.values():
        weight.data = (torch.randn(weight.shape, generator=draw) * 0.02).to(weight)
    found: dict[str, dict[str, Any]] = {}
    for name, batch in batches(length, config["vocab_size"], device).items():
        bench_gpu._reset(device)
        for turn in range(1 + TIMED):
            if turn == 1:
                bench_gpu._wait(device)
                begun = time.perf_counter()
            model.zero_grad()
            with computing(model):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
        bench_gpu._wait(device)
        seconds = (time.perf_counter() - begun) / TIMED
        gradients = torch.cat([weight.grad.flatten().float().cpu() for weight in trained.values()])
        peak = bench_gpu._peaks(device)[0]
        tokens = int(batch["attention_mask"].sum()) / seconds
        found[name] = {"loss": loss.item(), "gradients": gradients, "tokens_per_second": tokens, "gib": peak}
    return found


def check(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What was found, and what of it is wrong."""
    device = torch.device(given.device)
    alone = kernel(device)
    config = bench_gpu.TINY if given.tiny else {**MODELS["Llama-3.1-8B"], **FEWER}
    length = 64 if given.tiny else 1024
    padded, packed = (side(attention, config, length, device) for attention in ("sdpa", "segments"))
    found: dict[str, Any] = {"kernel": alone}
    for name, ours in packed.items():
        theirs = padded[name]
        found[name] = {
            "losses": [theirs["loss"], ours["loss"]],
            "gradients_apart": _apart(theirs["gradients"], ours["gradients"]),
            "tokens_per_second": [theirs["tokens_per_second"], ours["tokens_per_second"]],
            "gib": [theirs["gib"], ours["gib"]],
        }
    wrong = [f"the kernel is {apart:.2g} off the loop ({name})" for name, apart in alone.items()]
    wrong = [told for told, apart in zip(wrong, alone.values(), strict=True) if not apart <= KERNEL_ROUNDING]
    for name in packed:
        if not (apart := found[name]["gradients_apart"]) <= MODEL_ROUNDING:
            wrong.append(f"gradients of {name} are {apart:.2g} of their length from the padded ones")
    return found, "; ".join(wrong)


def told(found: dict[str, Any]) -> str:
    """In one cell of the table."""
    parts = [f"kernel within {max(found['kernel'].values()):.1g}"]
    for name, one in found.items():
        if name == "kernel":
            continue
        (slow, fast), (more, less) = one["tokens_per_second"], one["gib"]
        room = f", {more:.2f} -> {less:.2f} GiB" if more else ""
        parts.append(f"{name}: {slow:.0f} -> {fast:.0f} tokens/s{room}, gradients {one['gradients_apart']:.1g} apart")
    return "; ".join(parts)
