"""The sealed adapter as others can load it: named after its base, with tokenizer, template and stop tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.disk.artifact import WEIGHTS
from pipeline.disk.atomic import Json, write_json
from pipeline.errors import UserError
from pipeline.publish.sealed import Sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write(sealed: Sealed, folder: Path) -> None:
    """Raises UserError if the base has no public name, or the Hub holds other weights under it."""
    if sealed.base_id is None:
        raise UserError(
            f"the base {sealed.model.base} is a local folder, which others do not have: give its name on the Hub "
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
    description = json.loads((sealed.artifact.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    description |= {"base_model_name_or_path": sealed.base_id, "revision": sealed.base_commit, "inference_mode": True}
    if isinstance(description.get("target_modules"), str):
        description |= {"target_modules": _adapted(sealed.artifact.adapter / WEIGHTS), "exclude_modules": None}
    if description.get("modules_to_save"):
        heads = {"classifier"} if sealed.num_labels else set()  # PEFT's other name for a head, which no base here has
        description["modules_to_save"] = sorted(set(description["modules_to_save"]) - heads)
    return dict(description)


def _adapted(weights: Path) -> list[str]:
    """The modules that an adapter's tensors belong to."""
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as tensors:
        names = list(tensors.keys())
    parted = [name.removeprefix("base_model.model.").partition(".lora_") for name in names]
    return sorted({module for module, lora, _ in parted if lora})


def write_tokenizer(sealed: Sealed, folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer and template as they were sealed, and a generation config with the stop tokens; under a score
    head a tokenizer with a pad token by which transformers finds a sequence's last token."""
    from transformers import AutoTokenizer, GenerationConfig

    from pipeline.data.tokens import stop_ids

    tokenizer = AutoTokenizer.from_pretrained(sealed.artifact.adapter)
    tokenizer.init_kwargs.pop("is_local", None)
    tokenizer.init_kwargs.pop("local_files_only", None)
    if sealed.num_labels:
        tokenizer.pad_token_id = pad_that_ends_nothing(tokenizer)
    tokenizer.save_pretrained(folder)
    # Where an answer stops, and nothing else: the stages were trained and measured without the base's own decoding
    # arguments, so with them it would not answer as it was measured. The card names them (decoding_arguments).
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    generation = GenerationConfig(eos_token_id=stop_ids(tokenizer), **tokens)  # type: ignore[no-untyped-call]
    generation.save_pretrained(folder)
    return tokenizer


def pad_that_ends_nothing(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A pad token that no scored sequence ends in: transformers reads a score at the last token that is not the pad
    token. The tokenizer's own if it is one, else a special token that stands in no text or dialogue. None if there is
    none: then transformers reads one sequence at a time right and refuses to read several."""
    from pipeline.data.render import conversation

    examples = [list(tokenizer("a")["input_ids"])]
    if tokenizer.chat_template:
        talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
        examples.append(conversation(tokenizer, {"prompt": talk[:3], "answer": talk[3:]}, "answer"))
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, *(ids[-1] for ids in examples)):
        return int(tokenizer.pad_token_id)
    seen = {token for ids in examples for token in ids}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    free = sorted(special - {tokenizer.eos_token_id, tokenizer.bos_token_id, *seen})
    pads = [token for token in free if "pad" in str(tokenizer.added_tokens_decoder[token]).lower()]
    return next(iter([*pads, *free]), None)


def decoding_arguments(sealed: Sealed) -> Json:
    """What the base's own generation config says of decoding, beside its special tokens."""
    from transformers.utils.hub import cached_file

    from pipeline.models.base import local_folder

    options: dict[str, Any] = {"revision": sealed.model.revision, "_raise_exceptions_for_missing_entries": False}
    try:
        file = cached_file(local_folder(sealed.model), "generation_config.json", **options)
        arguments = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    ours = ("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version")
    without_effect = {"use_cache": True, "output_attentions": False, "output_hidden_states": False}
    return {
        name: value
        for name, value in arguments.items()
        if name not in ours and not name.startswith("_") and value is not without_effect.get(name, ...)
    }


def loading(sealed: Sealed, folder: Path) -> Json:
    """How the base is to be loaded under this adapter, for transformers' from_pretrained."""
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    return {
        "base": sealed.base_id,
        "revision": sealed.base_commit,
        "dtype": sealed.model.dtype,
        "attn_implementation": sealed.model.stock_attention,
        "quantization": sealed.model.quantization,
        "pad_token_id": generation.get("pad_token_id"),
        **({"labels": sealed.labels} if sealed.labels else {}),
    }
