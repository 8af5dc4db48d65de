"""The adapter added onto the dequantised base, written shard by shard.

The base in memory is the frozen one of training (4 bits a weight); of the sums only one shard at a time exists. The
4-bit weights themselves are left alone: merged back into 4 bits the adapter would be lost in rounding, and merged onto
the base's original weights it would meet another model than the one it was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.weights import summed, write_shards
from pipeline.plan.sizes import SHARD_BYTES
from pipeline.publish import adapter
from pipeline.publish.sealed import Sealed


def write(sealed: Sealed, folder: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config, tokenizer and weights; `dtype` as in training unless given, where float32 becomes bfloat16.

    Peak memory: the 4-bit base, one shard, and the float32 sum of one layer.
    """
    tokenizer = adapter.write_tokenizer(sealed, folder)
    frozen = bases.load_base(sealed.model, tokenizer, num_labels=sealed.num_labels)
    model = adapters.as_trained(frozen, sealed.artifact.adapter)
    target: torch.dtype = getattr(torch, dtype or ("float16" if sealed.model.dtype == "float16" else "bfloat16"))
    weights = dict(summed(model))
    with torch.no_grad():
        write_shards(weights, folder, target, shard_bytes)
    whole: Any = model.get_base_model()
    config = whole.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = target
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.architectures = [type(whole).__name__]  # of a score head another class than the base's
    if sealed.labels:
        config.problem_type = sealed.problem_type
        config.id2label = dict(enumerate(sealed.labels))
        config.label2id = {label: index for index, label in enumerate(sealed.labels)}
    if whole.get_output_embeddings() is not None and any(name.startswith("lm_head.") for name in weights):
        config.tie_word_embeddings = False  # the adapter has made two tables of one
    config.save_pretrained(folder)
