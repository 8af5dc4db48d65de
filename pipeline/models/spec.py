"""What a recipe says of the model, and what the base on disk is. Plain Python: no torch."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.disk.atomic import digest, sha256_of_file, write_json
from pipeline.disk.manifest import Dtype
from pipeline.errors import UserError

SEGMENTS = "segments"
"""The attention of models/packing.py, which computes batches without padding: on a CPU sdpa does so too."""


class ModelSpec(BaseModel):
    """The frozen base and the shape of the adapter that is trained on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    """Hub id, local folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    public_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """The Hub id of a base that is read from a local folder; a published adapter names it."""
    quantize: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit data type of the frozen linear layers, constants quantised again (QLoRA, arXiv 2305.14314); `none` for
    plain LoRA on a base held in `dtype`."""
    dtype: Dtype | Literal["auto"] = "auto"
    """What the model computes in. `auto` is what is faster on the machine where the run begins; all its stages keep to
    that. The adapter itself is always held and updated in float32."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's own template."""
    attn_implementation: str = "sdpa"
    """Attention as transformers names it, or `segments`: batches without padding, on a GPU too."""
    lora: dict[str, Any] = Field(
        default={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    )
    """PEFT's LoraConfig, word for word (r, lora_alpha, target_modules, use_rslora, use_dora, ...)."""

    @property
    def computes_in(self) -> Dtype:
        """The dtype of a spec that a model is loaded by, where auto stands no longer (runs/dtype.py)."""
        assert self.dtype != "auto", "model.dtype: auto is settled before a model is loaded"
        return self.dtype

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The arguments of transformers' BitsAndBytesConfig; None for a base that is not quantised."""
        if self.quantize == "none":
            return None
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quantize,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": self.computes_in,
            "llm_int8_skip_modules": ["lm_head", "score"],
        }

    @property
    def stock_attention(self) -> str:
        """For what is loaded without this package: attention that transformers itself has."""
        return "sdpa" if self.attn_implementation == SEGMENTS else self.attn_implementation


def unpackable(stage: str, why: str) -> str:
    """Why a stage cannot train on rows that lie end to end."""
    return (
        f"stages.{stage}.train.packing: packed rows would see each other, as {why}. "
        f"Use -o stages.{stage}.train.packing=false"
    )


WEIGHTS = (".safetensors", ".json", ".model", ".jinja", ".txt")


def base_hash(spec: ModelSpec) -> str:
    """A name for the bytes of the base: sha256 over its files, or the commit of a Hub id.

    Raises UserError if there is no such base. Hashes of large files are remembered by path, size and time of change.
    """
    path = Path(spec.base)
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise UserError(f"model.base: {path} is a file, but not a .gguf file")
        return f"gguf:{_remembered_sha256(path)}"
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise UserError(f"model.base: the folder {path} holds no model (no config.json)")
        files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file())
        if not any(file.suffix == ".safetensors" for file in files):
            raise UserError(f"model.base: the folder {path} holds no .safetensors weights")
        return "folder:" + digest({file.name: _remembered_sha256(file) for file in files})
    if spec.base.count("/") != 1 or spec.base.startswith((".", "/", "~")):
        raise UserError(_not_found(spec.base))
    return f"hub:{spec.base}@{_first_commit(spec.base, spec.revision)}"


def pinned(spec: ModelSpec) -> ModelSpec:
    """The same with a commit for its revision, where the base is a Hub id: so what is loaded is what was fingerprinted,
    though a branch may move on between the two. Raises UserError if there is no such base."""
    if Path(spec.base).exists() or spec.base.endswith(".gguf"):
        return spec
    return spec.model_copy(update={"revision": base_hash(spec).partition("@")[2]})


def _not_found(base: str) -> str:
    return f"model.base: {base} is no local folder, no .gguf file and no Hub id.{_hint(base)}"


def _hint(base: str) -> str:
    return " The demo model is fetched by: python scripts/get_demo_model.py" if "SmolLM2-135M" in base else ""


def cached_config(base: str, revision: str | None) -> Path | None:
    """The config.json of a Hub id, if the client's cache has it. Raises UserError for what can be no Hub id."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(base, "config.json", revision=revision)
    except (ValueError, OSError) as error:  # of a name that the Hub does not allow, or no file system
        raise UserError(_not_found(base)) from error
    return Path(cached) if isinstance(cached, str) else None


@cache
def _first_commit(base: str, revision: str | None) -> str:
    """The commit at which this machine first saw a revision, by the Hub client's cache; else the Hub's present one."""
    from huggingface_hub import hf_hub_download

    config = cached_config(base, revision)
    failure = "" if config else hub_commit(base, revision)[1]
    if not config and not failure:
        try:
            # Fetched, not only asked for: the cache then knows the commit, in later processes and without a network.
            config = Path(hf_hub_download(base, "config.json", revision=revision, etag_timeout=4))
        except Exception as error:  # the client raises a different class for each way a network can fail
            failure = type(error).__name__
    if failure:
        raise UserError(
            f"model.base: {base} is no local folder and no .gguf file, and the Hub did not answer for it ({failure})."
            + _hint(base)
        )
    return Path(str(config)).parent.name


@cache
def hub_commit(base: str, revision: str | None) -> tuple[str, str]:
    """The commit that the Hub names, or else the failure's name; asked once, with a few seconds' patience."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(base, revision=revision, timeout=4).sha), ""
    except Exception as error:  # the client raises a different class for each way a network can fail
        return "", type(error).__name__


def cache_folder() -> Path:
    """Where things that can be made again are kept: $ONEBASE_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "onebase"
    return Path(os.environ.get("ONEBASE_CACHE", default))


def _remembered_sha256(path: Path) -> str:
    """Hashing 16 GB on every command would take longer than the command."""
    state = path.stat()
    if state.st_size < 1 << 20:
        return sha256_of_file(path)
    memory = cache_folder() / "hashes" / f"{digest(str(path.resolve()))}.json"
    key = f"{state.st_size}:{state.st_mtime_ns}"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get("key") != key:
        known = {"path": str(path.resolve()), "key": key, "sha256": sha256_of_file(path)}
        write_json(memory, known)
    return str(known["sha256"])
