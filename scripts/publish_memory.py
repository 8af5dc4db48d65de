"""Peak memory of writing merged weights: the base in 4 bits, one shard, one layer in float32.

    python scripts/publish_memory.py [--layers 8] [--shard-mib 32]

Makes a base of a scaled-down shape of Llama-3-8B with random weights, an adapter on it, and measures what
pipeline.publish.merged needs above the loaded base; then says by the same formula what the true shape needs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "131072")

import psutil
import torch
from make_tiny_base import make_tiny_base
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.models import adapters, base
from pipeline.models.spec import ModelSpec
from pipeline.publish import merged

LLAMA_3_8B = {"hidden": 4096, "inner": 14336, "layers": 32, "kv": 1024, "vocabulary": 128256}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard-mib", type=int, default=32)
    given = parser.parse_args()
    shard = given.shard_mib << 20
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_base(Path(scratch) / "base")
        hidden, inner = 1024, 3584
        config = LlamaConfig.from_pretrained(
            folder, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=given.layers,
            num_attention_heads=8, num_key_value_heads=2, head_dim=128,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        spec = ModelSpec(base=str(folder), dtype="bfloat16")
        tokenizer = base.load_tokenizer(spec)
        model = adapters.fresh(base.load_base(spec, tokenizer), {"r": 16, "target_modules": "all-linear"})
        held = psutil.Process().memory_info().rss
        with watched() as peak, torch.no_grad():
            merged.write_shards(dict(merged.summed(model)), Path(scratch), torch.bfloat16, shard)
        written = sum(file.stat().st_size for file in Path(scratch).glob("*.safetensors"))
        bound = shard + transient(hidden, inner)
    print(f"{written / 2**20:.0f} MiB written in shards of {given.shard_mib} MiB")
    print(f"above the loaded base: {(peak[0] - held) / 2**20:.0f} MiB measured, {bound / 2**20:.0f} MiB by the formula")
    big = LLAMA_3_8B
    above = merged.SHARD_BYTES + transient(big["hidden"], big["inner"])
    print(f"Llama-3-8B: {four_bit(big) / GIB:.1f} GiB of base, {above / GIB:.1f} GiB above it (by the formula)")


def transient(hidden: int, inner: int) -> int:
    """The largest layer's weights dequantised, their sum and the adapter's product: 2 + 3 x 4 bytes a weight."""
    return 14 * hidden * inner


def four_bit(shape: dict[str, int]) -> float:
    """0.5 bytes a weight and 0.127 bits of constants (QLoRA, arXiv 2305.14314, section 3); two tables in bfloat16."""
    hidden, inner, kv = shape["hidden"], shape["inner"], shape["kv"]
    linear = shape["layers"] * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    return linear * (4 + 0.127) / 8 + 2 * 2 * shape["vocabulary"] * hidden


class watched:
    """The highest resident set of this process while it is entered, sampled every millisecond."""

    def __enter__(self) -> list[int]:
        self.peak, self.over = [0], threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self.peak

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.over.wait(0.001):
            self.peak[0] = max(self.peak[0], process.memory_info().rss)

    def __exit__(self, *error: Any) -> None:
        self.over.set()
        self.watcher.join()


if __name__ == "__main__":
    main()
