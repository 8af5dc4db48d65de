"""The sealed adapter as others can load it: named after its base, with tokenizer, template and stop tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import WEIGHTS, Json, write_json
from pipeline.errors import UserError
from pipeline.publish.sealed import Sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write(sealed: Sealed, folder: Path) -> None:
    """Raises UserError if the base has no public name, or the Hub holds other weights under it."""
    if sealed.base_id is None:
        raise UserError(
            f"the base {sealed.model.base} is a local folder, and nobody else has it: name what it is on the Hub "
            "(model.public_id: OWNER/NAME in the recipe, or -o model.public_id=OWNER/NAME), or publish "
            "--as merged or gguf, which carry the base"
        )
    if sealed.base_verified is False:
        raise UserError(
            f"the weights in {sealed.model.base} are not those of {sealed.base_id} on the Hub: an adapter published "
            "for that base would answer differently there. Publish --as merged or gguf, or train on the Hub's weights"
        )
    shutil.copyfile(sealed.artifact.adapter / WEIGHTS, folder / WEIGHTS)
    write_json(folder / "adapter_config.json", config(sealed))
    write_tokenizer(sealed, folder)


def config(sealed: Sealed) -> Json:
    """PEFT's description, with the base's public name, a score head named once, and modules by name: no pattern, for
    nobody should have to match a stranger's."""
    found = json.loads((sealed.artifact.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    commit = sealed.manifest["base_hash"].partition("@")[2] or None
    found |= {"base_model_name_or_path": sealed.base_id, "revision": commit, "inference_mode": True}
    if isinstance(found.get("target_modules"), str):
        found |= {"target_modules": _adapted(sealed.artifact.adapter / WEIGHTS), "exclude_modules": None}
    if found.get("modules_to_save"):
        heads = {"classifier"} if sealed.reward else set()  # PEFT's other name for a head, which no base here has
        found["modules_to_save"] = sorted(set(found["modules_to_save"]) - heads)
    return dict(found)


def _adapted(weights: Path) -> list[str]:
    """The modules that an adapter's tensors belong to."""
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as tensors:
        names = list(tensors.keys())
    parted = [name.removeprefix("base_model.model.").partition(".lora_") for name in names]
    return sorted({module for module, lora, _ in parted if lora})


def write_tokenizer(sealed: Sealed, folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer and template as they were sealed; for a policy also a generation config with the stop tokens."""
    from transformers import AutoTokenizer

    from pipeline.data.render import stop_ids

    tokenizer = AutoTokenizer.from_pretrained(sealed.artifact.adapter)
    tokenizer.init_kwargs.pop("is_local", None)
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(folder)
    generation = _generation_config(sealed)
    generation.eos_token_id = stop_ids(tokenizer)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)
    return tokenizer


def _generation_config(sealed: Sealed) -> Any:
    from transformers import AutoConfig, GenerationConfig

    from pipeline.models.base import local_folder

    place, revision = local_folder(sealed.model), sealed.model.revision or "main"
    try:
        return GenerationConfig.from_pretrained(place, revision=revision)
    except OSError:  # a base without one: its model config names the tokens
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(place, revision=revision))


def loading(sealed: Sealed, folder: Path) -> Json:
    """How the base is to be loaded under this adapter, for transformers' from_pretrained."""
    model = sealed.model
    quantization = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": model.quantize,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": model.dtype,
        "llm_int8_skip_modules": ["lm_head", "score"],
    }
    return {
        "base": sealed.base_id,
        "revision": sealed.manifest["base_hash"].partition("@")[2] or None,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "quantization": None if model.quantize == "none" else quantization,
        "pad_token_id": json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["pad_token_id"],
    }
