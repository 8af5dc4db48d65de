"""The shapes of a model, from its config.json alone. Plain Python: no torch.

An architecture that is not known here is refused: a guessed figure is worse than none. What is known is what
scripts/plan_oracle.py has confirmed against the live bytes of the model's own code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec, cached_config, hub_commit

FAMILIES: dict[str, dict[str, Any]] = {
    # model_type of config.json: in what its decoder layer differs from Llama's
    "llama": {},
    "mistral": {},
    "smollm3": {},
    "granite": {"scaled": True},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma": {"tied": True},
    "gemma3_text": {"tied": True, "qk_norm": True, "norms": 4},
    "phi3": {"fused": True},
}
WHY_NOT = {
    "gemma2": "it caps its attention scores, which sdpa attention cannot",
    "gpt2": "its layers are not the linear ones that are quantised",
}
KNOWN = Path(__file__).with_name("known_shapes.json")
"""Shapes of well-known bases by Hub id, as their config.json gave them on the day it says; `windows`:
max_position_embeddings of each id."""
QUANTISED_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in nf4 with double quantisation: blocks of 64, their scales in 8 bits, blocks of 256 scales
(arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer. `reads` names the tensor it takes: layers that read one share it."""

    name: str
    inputs: int
    outputs: int
    reads: str
    bias: bool = False


@dataclass(frozen=True)
class Shapes:
    """A decoder as llama's: hidden size, layers, heads, and what its family does otherwise."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int
    tied: bool
    fused: bool = False
    """One matrix makes q, k and v, another gate and up (Phi-3)."""
    qk_norm: bool = False
    """q and k are normalised head by head (Qwen3, Gemma 3)."""
    norms: int = 2
    """Norms of a layer beside those; with 4 the outputs of attention and MLP are normalised too (Gemma 3)."""
    scaled: bool = False
    """What a layer adds to the residual stream is multiplied by a number first (Granite)."""
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    noted: str = ""
    """The day on which this package noted them, where no config.json was at hand."""

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    def linears(self) -> Iterator[Linear]:
        """The linear layers of one decoder layer, those that are quantised."""
        h, i, q, kv = self.hidden, self.intermediate, self.q, self.kv
        if self.fused:
            yield Linear("qkv_proj", h, q + 2 * kv, "attention")
        else:
            yield Linear("q_proj", h, q, "attention", self.attention_bias)
            yield Linear("k_proj", h, kv, "attention", self.attention_bias)
            yield Linear("v_proj", h, kv, "attention", self.attention_bias)
        yield Linear("o_proj", q, h, "attended", self.output_bias)
        if self.fused:
            yield Linear("gate_up_proj", h, 2 * i, "mlp")
        else:
            yield Linear("gate_proj", h, i, "mlp", self.mlp_bias)
            yield Linear("up_proj", h, i, "mlp", self.mlp_bias)
        yield Linear("down_proj", i, h, "product", self.mlp_bias)

    @property
    def linear_parameters(self) -> int:
        """Of all decoder layers, biases not counted."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears())

    @property
    def largest_linear(self) -> int:
        """Parameters of the largest linear layer."""
        return max(linear.inputs * linear.outputs for linear in self.linears())

    @property
    def other_parameters(self) -> int:
        """What stays in the compute dtype: embeddings, LM head unless tied, norms, biases."""
        per_layer = self.norms * self.hidden + 2 * self.head_dim * self.qk_norm
        per_layer += sum(linear.outputs for linear in self.linears() if linear.bias)
        return self.embedding_parameters * (1 if self.tied else 2) + self.layers * per_layer + self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


@dataclass(frozen=True)
class Adapter:
    """What PEFT's LoraConfig says of an adapter's size."""

    r: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    """Names of the linear layers it is put on; all of them if None."""

    def on(self, shapes: Shapes) -> list[Linear]:
        return [linear for linear in shapes.linears() if self.targets is None or linear.name in self.targets]

    def parameters(self, shapes: Shapes) -> int:
        return shapes.layers * self.r * sum(linear.inputs + linear.outputs for linear in self.on(shapes))


def shapes_of(config: dict[str, Any], where: str = "config.json") -> Shapes:
    """The shapes a config.json describes. Raises UserError with the reason for one that is not known."""
    family = config.get("model_type")
    if family == "gemma3" and isinstance(config.get("text_config"), dict):
        raise UserError(f"{where}: a vision-language model (gemma3); its text-only form is gemma3_text")
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            f"{where}: a mixture of experts ({family}), which stay in 16 bits; what they need depends on routing: "
            "not planned"
        )
    if not isinstance(family, str) or family not in FAMILIES:
        reason = f" ({WHY_NOT[family]})" if family in WHY_NOT else ""
        raise UserError(
            f"{where}: model_type '{family}' is not one whose memory is known here{reason}; known are "
            f"{', '.join(FAMILIES)}"
        )
    own = FAMILIES[family]
    try:
        heads = int(config["num_attention_heads"])
        return Shapes(
            family=family,
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab=int(config["vocab_size"]),
            window=int(config.get("max_position_embeddings") or 1 << 17),
            tied=bool(config.get("tie_word_embeddings", own.get("tied", False))),
            fused=own.get("fused", False),
            qk_norm=own.get("qk_norm", False),
            norms=own.get("norms", 2),
            scaled=own.get("scaled", False),
            attention_bias=bool(config.get("attention_bias", own.get("attention_bias", False))),
            output_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: does not say the model's shapes ({type(error).__name__}: {error})") from error


def read_shapes(spec: ModelSpec) -> Shapes:
    """The shapes of a recipe's base. Of a Hub id only config.json is fetched, if it is not in the cache; where the Hub
    does not give it, those of a well-known base are the ones that this package noted.

    Raises UserError if there is no config to read, or none whose shapes are known.
    """
    try:
        config, where = read_config(spec)
    except UserError:
        known = None if "RevisionNotFoundError" in hub_commit(spec.base, spec.revision) else shipped(spec.base)
        if known is None:
            raise
        return known
    return shapes_of(config, where)


def read_config(spec: ModelSpec) -> tuple[dict[str, Any], str]:
    """The config.json of a recipe's base, and where it is. Raises UserError if there is none to read."""
    if spec.base.endswith(".gguf"):
        raise UserError(f"{spec.base}: a .gguf file has no config.json to plan from; name the model's folder or Hub id")
    local = Path(spec.base) / "config.json"
    path = local if os.path.isfile(local) else _from_hub(spec)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config, str(path) if path is local else f"{spec.base}: config.json"


def shipped(base: str) -> Shapes | None:
    """The shapes of a well-known base as this package noted them, by its Hub id."""
    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    for entry in known["models"]:
        if window := entry["windows"].get(base):
            shapes = shapes_of({**entry["config"], "max_position_embeddings": window}, f"{KNOWN}: {base}")
            return replace(shapes, noted=known["noted"])
    return None


def _from_hub(spec: ModelSpec) -> Path:
    from huggingface_hub import hf_hub_download

    if cached := cached_config(spec.base, spec.revision):
        return cached
    absent = f"{spec.base}: its config.json is not on this disk and the Hub did not give it"
    if failure := hub_commit(spec.base, spec.revision)[1]:  # a download would try again for half a minute
        raise UserError(f"{absent} ({failure})")
    try:
        return Path(hf_hub_download(spec.base, "config.json", revision=spec.revision, etag_timeout=3))
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise UserError(f"{absent} ({type(error).__name__})") from error
